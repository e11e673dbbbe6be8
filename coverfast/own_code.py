"""Code of the user's own by its name, `package.module:name` or `file.py:name`; nothing else is ever imported."""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coverfast.checks import InputError, require


def imported(what: str, place: str, known: str) -> Any:
    """What the user's code calls by that name.

    Args:
        what: the setting that names it.
        place: "package.module:name" or "file.py:name".
        known: what else the setting can be, for people.

    Raises:
        InputError: when there is no such thing, or importing it fails.
    """
    where, _, attribute = place.rpartition(":")
    require(bool(where and attribute), f"{what} must be {known}, got {place!r}")
    # What the code itself imports lies beside it, or where the command was given; it may do so later, too.
    folder = str(Path(where).parent.absolute() if where.endswith(".py") else Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    with refusing(f"{what} must be code that can be imported, {place} for one"):
        module = _from_file(what, Path(where)) if where.endswith(".py") else importlib.import_module(where)
    close = difflib.get_close_matches(attribute, vars(module), 1)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    require(
        hasattr(module, attribute), f"{what} must be code that can be imported, but {where} has no {attribute!r}{meant}"
    )
    return getattr(module, attribute)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Say in one sentence what failed, whatever foreign code may raise."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{what}, but it fails: {first}") from error


def parsed(args: Sequence[str], what: str) -> dict[str, Any]:
    """`feature_size=24` and the like by name; what Python does not read as a value is a string.

    what: the setting that they are of.
    """
    found: dict[str, Any] = {}
    for arg in args:
        key, equals, text = arg.partition("=")
        require(bool(equals) and key.isidentifier(), f"{what} must be KEY=VALUE, got {arg!r}")
        require(key not in found, f"{what} must name an argument once, got {key} twice")
        try:
            found[key] = plain(ast.literal_eval(text), what)
        except (ValueError, SyntaxError):
            found[key] = text
    return found


def plain(value: Any, what: str) -> Any:
    """As JSON gives it back, so that it is the same before and after a file."""
    if isinstance(value, (list, tuple)):
        return [plain(v, what) for v in value]
    if isinstance(value, dict):
        return {str(k): plain(v, what) for k, v in value.items()}
    require(value is None or isinstance(value, (bool, int, float, str)), f"{what} must be plain, got {value!r}")
    return value


def _from_file(what: str, path: Path) -> Any:
    require(path.is_file(), f"{what} must be code that can be imported, but there is no file {path}")
    # One module a file and content: a class made twice would be two classes, and files may share their names.
    digest = hashlib.sha256(str(path.absolute()).encode() + path.read_bytes()).hexdigest()
    name = f"coverfast_own_{path.stem}_{digest[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and the like look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
