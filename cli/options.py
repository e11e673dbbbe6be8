"""Command-line flags made from the table of settings, so that no setting is written twice."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any

import typer

#: Consent to import the code that made a network of the user's own.
OwnBackbone = Annotated[
    str | None,
    typer.Option("--backbone", help="Code of your own that makes the network: module:factory, file.py:factory."),
]

OwnMethod = Annotated[
    str | None,
    typer.Option("--method", help="Code of your own that is the method: module:Class, file.py:Class."),
]


def ints(text: str) -> tuple[int, ...]:
    """`128` or `128,96,96`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"expected an int or ints with commas between, got {text!r}") from None


def numbers(text: str) -> tuple[float, ...]:
    """`0.5` or `1,2.5,1`."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"expected a number or numbers with commas between, got {text!r}") from None


def _option(setting: Any) -> inspect.Parameter:
    kind = type(setting.default)
    names = [f"--{name.replace('_', '-')}" for name in (setting.name, *setting.metadata.get("also", ()))]
    extra: dict[str, Any] = {"help": setting.metadata["help"], "show_default": False}
    if kind is bool:
        names = [f"{names[0]}/--no-{names[0][2:]}"]
    if setting.default == ():
        annotation: Any = Annotated[list[str] | None, typer.Option(*names, **extra)]
    elif kind is tuple:
        several: Any = (numbers, "NUMBERS") if type(setting.default[0]) is float else (ints, "INTS")
        annotation = Annotated[Any, typer.Option(*names, parser=several[0], metavar=several[1], **extra)]
    else:
        annotation = Annotated[kind | None, typer.Option(*names, **extra)]
    return inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def with_settings(settings: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a flag for every field of a settings class; it receives those that were given as `flags`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        ordered = sorted(fields(settings), key=lambda f: f.name != "preset" and not f.metadata.get("first", False))
        names = [f.name for f in ordered]

        def wrapped(**values: Any) -> None:
            flags = {n: values.pop(n) for n in names}
            command(flags={n: v for n, v in flags.items() if v is not None and v != []}, **values)

        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "flags"]
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        parameters = [*own, *(_option(f) for f in ordered)]
        wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
        wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
        return wrapped

    return decorate
