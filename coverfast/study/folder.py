"""A study's folder: its settings, the tables of settings of its runs, and whether what is given agrees with them."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self, cast

from coverfast.backbone_names import absolute_code
from coverfast.checks import InputError, per_axis, require
from coverfast.disk import explained, write_atomically
from coverfast.downstream.settings import FinetuneSettings
from coverfast.geometry import level_size
from coverfast.method_names import without_folder
from coverfast.shard_set import ShardSet
from coverfast.study.settings import MADE, StudySettings, label
from coverfast.training.assembly import choose_device
from coverfast.training.config import as_plain, to_toml
from coverfast.training.runs import provenance
from coverfast.training.settings import check_values, resolve

#: Settings of runs that are not the study's own, by the table they stand in; [pretrain.gvsl] is "pretrain.gvsl".
Tables = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Study:
    """A study's folder, its settings, and those of its runs by table. content: SHA-256 of given shards and weights."""

    folder: Path
    settings: StudySettings
    tables: Tables
    content: dict[str, str]

    @property
    def file(self) -> Path:
        """Where the settings are kept."""
        return self.folder / "study.toml"

    @classmethod
    def open(
        cls, kind: type[StudySettings], folder: Path, flags: Mapping[str, Any], config: Path | None = None
    ) -> Self:
        """A new study, or the one in `folder` if what is given agrees with it.

        flags: settings by name, which win over those of `config`, a TOML file that may hold the tables of the runs'
        settings too.

        Raises:
            InputError: for values that are none, and for those that are not the ones of the study in `folder`.
        """
        given, tables, _ = _read(config, kind) if config else ({}, {}, {})
        given |= check_values(_absolute(flags), cast(Any, kind))
        with explained(folder, "read"):
            there = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        file = folder / "study.toml"
        if not there:
            settings = _resolved(kind, given)
            study = cls(folder, settings, {name: {} for name in kind.tables} | tables, {})
            study._check_tables()
            return replace(study, content=_content(settings))
        require(
            file.is_file(), f"out must be a new or empty folder or one with a study to go on with, but {folder} is none"
        )
        stored, old, content = _read(file, kind)
        settings = cast(Any, kind)(**stored)
        free = {f.name for f in fields(kind) if f.metadata.get("free")}
        for name, value in given.items():
            old_value = getattr(settings, name)
            require(
                name in free or value == old_value,
                f"{name} must be {_shown(old_value)} as in {file}, got {_shown(value)}; leave it out to go on, or name "
                "another folder with --out",
            )
        for name, table in tables.items():
            require(
                table == old.get(name),
                f"the table {name} of {config} must be that of {file}; leave --config out to go on, or name another "
                "folder with --out",
            )
        for name, now in _content(settings).items():
            require(
                now == content.get(name),
                f"{name} must be what the study began with (SHA-256 {content.get(name)}), but it is now {now}",
            )
        return cls(folder, replace(settings, **{n: v for n, v in given.items() if n in free}), old, content)

    def keep(self) -> bool:
        """Write the settings, if they are not there yet; whether they were."""
        if self.file.exists():
            return True
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        text = to_toml(cast(Any, self.settings), tables={**self.tables, "content": self.content})
        write_atomically(self.file, f'study = "{self.settings.name}"\n{text}')
        return False

    def pretraining(self, method: str) -> dict[str, Any]:
        """Settings of a pretraining that its tables hold, with the method; "" for that of the table."""
        chosen = {"method": method} if method else {}
        return {**self.tables["pretrain"], **self.tables.get(f"pretrain.{label(method)}", {}), **chosen}

    def _check_tables(self) -> None:
        """Refuse settings of runs that are none, before anything is trained."""
        s, own = self.settings, {"crop": self.settings.crop}
        methods = {label(method): method for method in s.pretrained.values()}
        for name in self.tables.keys() - set(s.tables):
            known = name.removeprefix("pretrain.") in methods
            require(known, f"the table [{name}] must be of a method of this study, which has {_shown(tuple(methods))}")
        for name, method in methods.items():
            try:
                found = resolve(s.preset, self.pretraining(method), own, {"iterations": s.pretrain_iterations})
            except InputError as error:
                if len(methods) == 1:
                    raise
                raise InputError(
                    f"{name} cannot pretrain: {error}; a setting of one method alone goes into its own table of "
                    f"--config, such as [pretrain.{name}]"
                ) from None
            if found.backbone == "unet":
                crop = per_axis("crop", s.crop[0] if len(s.crop) == 1 else s.crop, s.ndim)
                level_size(crop, (len(found.unet_channels()) + 1) // 2)
        scratch = own | {"iterations": s.iterations, "scratch": True}
        for name in {"finetune", "probe"} & self.tables.keys():
            resolve(s.preset, self.tables[name], scratch, kind=FinetuneSettings)

    def about(self) -> dict[str, Any]:
        """What a result depends on, JSON-able: the same wherever the study lies and whenever it was made."""
        names = ("coverfast", "torch", "numpy", "python", "commit")
        made = provenance("")
        places = ("unlabelled", "checkpoint", "device")
        plain = {n: v for n, v in as_plain(cast(Any, self.settings)).items() if n not in places}
        named = {n: [without_folder(p) for p in plain[n]] for n in ("data", "methods") if n in plain}
        return {
            "settings": plain | named,
            "tables": self.tables,
            "content": self.content,
            "software": {name: made[name] for name in names},
        }


def _resolved(kind: type[StudySettings], given: Mapping[str, Any]) -> StudySettings:
    """The settings with what follows from data, preset and device."""
    data = given.get("data") or (MADE[0],)
    ndim = 0 if set(data) & set(MADE) else ShardSet(data, "all").ndim
    preset = str(given.get("preset", ""))
    asked = given.get("ndim") or ndim or (int(preset[-2]) if preset in kind.presets else 2)
    require(asked in (2, 3), f"ndim must be 2 or 3, got {asked}")
    require(ndim in (0, asked), f"ndim must be {ndim}, that of the data, got {asked}")
    if not preset:
        on_gpu = choose_device(str(given.get("device", "auto"))).type == "cuda"
        preset = f"{'paper' if on_gpu else 'small'}-{asked}d"
    values = {**kind.presets.get(preset, {}), **given, "data": data, "preset": preset, "ndim": asked}
    settings = kind(**values)
    settings.check()
    return settings


def _content(s: StudySettings) -> dict[str, str]:
    """SHA-256 of what was given, by the setting that names it."""
    found = {}
    for name in ("data", "unlabelled"):
        if (paths := getattr(s, name)) and not s.made:
            found[name] = ShardSet(paths, "all").content_hash
    if checkpoint := getattr(s, "checkpoint", ""):
        path = Path(checkpoint)
        path = path / "backbone.safetensors" if path.is_dir() else path
        require(
            path.is_file(), f"checkpoint must be a backbone.safetensors or a run that has one, but there is no {path}"
        )
        with explained(path, "read"):
            found["checkpoint"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _read(path: Path, kind: type[StudySettings]) -> tuple[dict[str, Any], Tables, dict[str, str]]:
    """Settings of a study, the tables of settings of its runs, and the SHA-256 of what was given, from TOML."""
    with explained(path, "read"):
        require(path.is_file(), f"config must be a TOML file, but there is no file {path}")
        data = path.read_bytes()
    try:
        values = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"config must be a TOML file, but {path} is none: {error}") from None
    study = values.pop("study", kind.name)
    require(study == kind.name, f"{path} must be of a study of the kind {kind.name}, but it is of the kind {study}")
    tables = {name: value for name, value in values.items() if isinstance(value, dict)}
    content = tables.pop("content", {})
    common = tables.get("pretrain", {})
    for method in [name for name, value in common.items() if isinstance(value, dict)]:
        tables[f"pretrain.{method}"] = common.pop(method)
    for name, table in tables.items():
        own = name.startswith("pretrain.")
        require(
            own or name in kind.tables,
            f"{path} must have settings of this study and the tables {', '.join(kind.tables)}, got [{name}]",
        )
        for key in table:
            # A network from scratch is built as the pretrained one is, and all methods pretrain the same.
            taken = key in kind.taken or (key in ("channels", "backbone", "backbone_args") and name != "pretrain")
            require(not taken, f"{key} of the table {name} of {path} must be left to the study")
            require(not own or key != "batch", f"batch of the table {name} of {path} must be left to [pretrain]")
    given = _absolute({name: value for name, value in values.items() if not isinstance(value, dict)})
    try:
        return check_values(given, cast(Any, kind)), tables, content
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _absolute(given: Mapping[str, Any]) -> dict[str, Any]:
    """Whole paths, so that a study can go on from another folder."""
    whole = dict(given)
    for name in ("data", "unlabelled"):
        if paths := given.get(name):
            names = [paths] if isinstance(paths, str) else paths
            whole[name] = [str(p) if p in MADE else str(Path(p).absolute()) for p in names]
    if methods := given.get("methods"):
        whole["methods"] = [absolute_code(m) for m in ([methods] if isinstance(methods, str) else methods)]
    if given.get("checkpoint"):
        whole["checkpoint"] = str(Path(given["checkpoint"]).absolute())
    return whole


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else repr(value)
