"""A method of pretraining by its name: one of the library, or one of the user's."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from coverfast.backbones import Backbone
from coverfast.checks import require
from coverfast.method_names import KNOWN, METHODS
from coverfast.methods import Pretext
from coverfast.own_code import imported, parsed, refusing

#: What every method is called with.
_COMMON = ("self", "backbone", "crop", "pad", "impl")


def method_class(name: str) -> type[Pretext]:
    """The class of a method.

    name: "cover", "gvsl", or "package.module:Class" or "file.py:Class" for code of your own, which is imported.

    Raises:
        InputError: for a name that is none, or code that cannot be imported or is no `Pretext`.
    """
    if name in METHODS:
        module, attribute = METHODS[name]
        found = getattr(import_module(f"coverfast.methods.{module}"), attribute)
    else:
        found = imported("method", name, KNOWN)
    fits = isinstance(found, type) and issubclass(found, Pretext)
    require(fits, f"method must be a class derived from coverfast.methods.Pretext, but {name} is {found!r:.60}")
    kind: type[Pretext] = found
    return kind


def build(
    name: str, args: Sequence[str], backbone: Backbone, *, crop: tuple[int, ...], pad: bool, impl: str
) -> Pretext:
    """The method of a name for a backbone, its own weights drawn anew.

    Args:
        name: see `method_class`; not "cover", which needs a pyramid.
        args: further arguments of the class, "KEY=VALUE" with values as Python writes them.
        backbone: what it trains.
        crop, pad, impl: see `Pretext`.

    Raises:
        InputError: see `method_class`; for an argument that the method does not have or take.
    """
    kind, values = method_class(name), parsed(args, "method_args")
    taken = inspect.signature(kind.__init__).parameters
    known = [key for key, p in taken.items() if key not in _COMMON and p.kind is not p.VAR_KEYWORD]
    has = f"it has {', '.join(known)}" if known else "it has none"
    # Further keywords of a class are for its base, which takes no more than all methods do.
    for key in values:
        require(key in known, f"method_args must be arguments of the method {name}, {has}; got {key!r}")
    common: dict[str, Any] = {"crop": crop, "pad": pad, "impl": impl}
    with refusing(f"method {name} must be called as {kind.__name__}(backbone, crop=, pad=, impl=, ...)"):
        return kind(backbone, **common, **values)
