"""Settings on disk: TOML to write a run's configuration and to read one, and what a resumed run may change."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from coverfast.backbone_names import kind_of
from coverfast.checks import InputError, require
from coverfast.disk import explained
from coverfast.method_names import is_own, without_folder
from coverfast.training.settings import S, Settings, TrainingSettings, check_values, checked


def to_toml(
    settings: TrainingSettings, *, comments: bool = False, tables: Mapping[str, Mapping[str, Any]] | None = None
) -> str:
    """The settings as a TOML document, with the help of every key as a comment or with further tables behind."""
    lines = []
    # Of a study, whose settings are of another kind, all of them.
    for f in settings.told if isinstance(settings, TrainingSettings) else fields(settings):
        line = f"{f.name} = {_toml_value(getattr(settings, f.name))}"
        lines.append(f"{line:<48}# {f.metadata['help']}" if comments else line)
    for title, table in (tables or {}).items():
        lines += ["", f"[{title}]", *(f"{key} = {_toml_value(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, tuple):
        return _toml_value(value[0]) if len(value) == 1 else f"[{', '.join(map(_toml_value, value))}]"
    # JSON's strings, numbers and truth values are TOML's, but for escapes beyond 16 bits and a bare DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_toml(
    path: str | Path, kind: type[TrainingSettings] = Settings
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Settings of a TOML file, checked, and its tables (of a run's own file: provenance, resumed)."""
    path = Path(path)
    with explained(path, "read"):
        require(path.is_file(), f"config must be a TOML file, but there is no file {path}")
        data = path.read_bytes()
    try:
        values = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"config must be a TOML file, but {path} is none: {error}") from None
    tables = {title: values.pop(title, {}) for title in ("provenance", "resumed")}
    try:
        return check_values(values, kind), tables
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


# --- resume ------------------------------------------------------------------------------------------------------


def check_resume(old: S, given: Mapping[str, Any]) -> S:
    """The settings of a resumed run: the old ones, and what was given anew where that may change."""
    given = check_values(given, type(old))
    for f in fields(old):
        if f.name in given and not f.metadata.get("free") and _another(f.name, getattr(old, f.name), given[f.name]):
            free = ", ".join(free_settings(old))
            raise InputError(
                f"{f.name} cannot change on resume, the run has {getattr(old, f.name)!r}, got {given[f.name]!r} "
                f"(free to change: {free})"
            )
    return checked(replace(old, **given))


def changed_settings(stored: Mapping[str, Any], settings: TrainingSettings) -> str:
    """Names of the settings of a checkpoint that may not change and did; one older than a setting has its default."""
    now, usual, free = as_plain(settings), as_plain(type(settings)()), set(free_settings(settings))
    there = ((name, stored.get(name, usual[name])) for name in now if name not in free)
    return ", ".join(name for name, value in there if _another(name, value, now[name]))


def _another(name: str, old: Any, new: Any) -> bool:
    """Whether a setting was changed; the user's own code may have moved."""
    if name == "backbone" and kind_of(old) == kind_of(new) == "own":
        return False
    if name == "method" and is_own(old) and is_own(new):
        return old.rpartition(":")[2] != new.rpartition(":")[2]
    return old != new


def free_settings(settings: TrainingSettings) -> Iterable[str]:
    """Names of the settings that may change on resume."""
    return (f.name for f in fields(settings) if f.metadata.get("free"))


#: Settings that say where something lies on this machine.
_PLACES = ("data", "val", "run")


def travelling(settings: TrainingSettings) -> dict[str, Any]:
    """The settings as JSON-able values for files that go to others: config.toml says where things lie."""
    found = {name: value for name, value in as_plain(settings).items() if name not in _PLACES}
    if "method" in found:
        found |= {"method": without_folder(found["method"]), "method_args": numbers_of(found["method_args"])}
    return found | {"init": "other weights" if settings.init else ""}


def numbers_of(args: Iterable[str]) -> list[str]:
    """Those arguments whose value is a number or a truth value, which name no place."""
    return [arg for arg in args if re.fullmatch(r"\w+=(-?[\d.]+(e[+-]?\d+)?|True|False)", arg, re.ASCII)]


def as_plain(settings: TrainingSettings) -> dict[str, Any]:
    """The settings as JSON-able values."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(settings).items()}
