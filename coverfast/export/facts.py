"""What is known of how weights came about, and how much of it may travel with them.

Numbers travel, and words of a few settings. All else that a run knows, such as the paths of its data, may name a
machine, a person or a patient: it stays at home, since only what is listed here is taken along.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import PureWindowsPath
from typing import Any

import numpy as np
import torch

from coverfast.backbone_names import kind_of
from coverfast.backbones import Adapted, Backbone
from coverfast.checks import InputError, require
from coverfast.ingest.presets import PRESETS
from coverfast.ingest.presets import preprocessing as preset_settings
from coverfast.method_names import is_own
from coverfast.report.metrics import last_figures
from coverfast.training.config import numbers_of
from coverfast.training.settings import OF_COVER, Settings

_WORD = re.compile(r"[A-Za-z0-9][\w.:+-]{0,99}", re.ASCII)
#: Settings whose values are words, and the facts of a run that travel.
_WORDS = {*Settings.choices, "preset", "backbone", "method", "source", "checkpoint_sha256"}
_ORIGIN = {"coverfast", "torch", "triton", "numpy", "h5py", "einops", "python", "commit", "data_sha256", "processes"}
_ORIGIN |= {"device", "precision", "day", "started_from"}
#: Figures of what was learned, not of how fast, and what is kept of each.
_FIGURE = re.compile(r"val_.+|loss.*|epe.*|ncc.*|cos_.+|rank.*")
_KEPT = ("last", "mean", "iteration")


@dataclass(frozen=True)
class Facts:
    """How weights came about; nothing of it names a place, a file or a person.

    Attributes:
        settings: of the run, by name.
        preprocessing: of its images, as shards say it.
        provenance: versions, commit, `data_sha256`, the day it began, whether it started from other weights.
        figures: of each figure the last value, the mean of the last 50 and the iteration of the last.
        weights_sha256: `fingerprint` of the backbone when it was new; empty where nothing is known.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    preprocessing: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    weights_sha256: str = ""

    @classmethod
    def of(cls, about: Mapping[str, Any], source: str) -> tuple[Facts, list[str]]:
        """What may travel of facts as JSON holds them, and the names of what stays.

        Raises:
            InputError: naming `source`, where they are none.
        """
        found = {**asdict(cls()), **{name: about[name] for name in asdict(cls()) if name in about}}
        for name, value in found.items():
            kind = str if name == "weights_sha256" else dict
            require(isinstance(value, kind), f"{name} of {source} must be a {kind.__name__}, got {value!r:.60}")
        if found["settings"].get("method", "cover") != "cover":  # of another method these say nothing
            found["settings"] = {name: v for name, v in found["settings"].items() if name not in OF_COVER}
        facts = cls(
            _settings(found["settings"]),
            _preprocessing(found["preprocessing"]),
            _provenance(found["provenance"], found["settings"]),
            {name: {k: row[k] for k in _KEPT} for name, row in found["figures"].items() if _is_figure(name, row)},
            found["weights_sha256"] if _WORD.fullmatch(found["weights_sha256"]) else "",
        )
        parts = [(found[name], getattr(facts, name)) for name in ("settings", "preprocessing")]
        return facts, [key for whole, kept in parts for key in whole if whole[key] not in ("", []) and key not in kept]

    def as_json(self) -> dict[str, Any]:
        """For `of` to read again."""
        return asdict(self)


def figures_of(metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The figures of a run at its end, by name, see `Facts`."""
    rows = {name: dict(zip(_KEPT, row, strict=True)) for name, *row in last_figures(metrics)}
    return {name: row for name, row in rows.items() if _is_figure(name, row)}


def fingerprint(backbone: Backbone) -> str:
    """The SHA-256 of names, shapes and values of the weights, wherever they lie."""
    found = hashlib.sha256()
    for name, value in sorted(backbone.core.state_dict().items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        plain = value.detach().cpu().contiguous().reshape(-1)
        found.update(memoryview(plain.view(torch.uint8).numpy()) if plain.numel() else b"")
    return found.hexdigest()


def shareable(backbone: Backbone) -> Backbone:
    """The backbone with a description that names no place: of code in a file the file's name alone.

    Raises:
        InputError: when an argument that it is made with is a path.
    """
    description = dict(backbone.description)
    paths = [text for text in _texts(description.get("args")) if re.search(r"[/\\]|^~", text)]
    require(not paths, f"a backbone must be made without paths to be shared, got {', '.join(paths)}")
    if description["kind"] == "own" and isinstance(backbone, Adapted):
        description["name"] = _without_folder(str(description["name"]))
        return Adapted(backbone.core, backbone.run, description, size=backbone.image_size)
    return backbone


def _without_folder(place: str) -> str:
    """`net.py:factory` of `/home/me/net.py:factory`."""
    return PureWindowsPath(place).name


def _texts(value: Any) -> Iterator[str]:
    """All strings in JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key in value:
            yield from _texts([key, value[key]])
    elif isinstance(value, Iterable):
        for item in value:
            yield from _texts(item)


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in values.items() if _WORD.fullmatch(name)}
    if isinstance(found := kept.get("backbone"), str) and kind_of(found) == "own":
        kept["backbone"] = "own"  # its description says more, and no place
    if isinstance(found := kept.get("method"), str) and is_own(found):
        kept["method"] = "own"
    args = kept.get("method_args")
    kept["method_args"] = numbers_of(map(str, args)) if isinstance(args, (list, tuple)) else []
    if kept.get("backbone", "unet") != "unet":
        kept.pop("channels", None)  # those of a U-Net that is not there
    travels = {name for name, value in kept.items() if _plain(value) or (name in _WORDS and _is_word(value))}
    travels |= {"method_args"} if kept.get("method_args") else set()
    return {name: value for name, value in kept.items() if name in travels}


def _preprocessing(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a preset knows; of what somebody wrote down in their own way the numbers, and what it is called by."""
    preset = values.get("preset")
    if not (isinstance(preset, str) and preset in PRESETS):
        kept = {name: value for name, value in values.items() if _WORD.fullmatch(name)}
        return {name: value for name, value in kept.items() if _plain(value) or (name == "preset" and _is_word(value))}
    try:
        return preset_settings(preset, **{name: value for name, value in values.items() if name in PRESETS[preset]})
    except InputError:  # no value that the preset can have
        return {}


def _provenance(values: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in values.items() if name in _ORIGIN and (_plain(value) or _is_word(value))}
    if isinstance(device := found.get("device"), str):
        found["device"] = device.partition(":")[0]
    if day := re.match(r"\d{4}-\d\d-\d\d", str(values.get("started", ""))):
        found["day"] = day[0]
    if "init" in settings:
        found["started_from"] = "other-weights" if settings["init"] else "scratch"
    return found


def _plain(value: Any) -> bool:
    """A number, a truth value, nothing, or several of them."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value))


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and _WORD.fullmatch(value) is not None


def _is_figure(name: str, row: Any) -> bool:
    named = _WORD.fullmatch(name) and _FIGURE.fullmatch(name) and not re.search(r"_(\d+|std)$", name)
    return bool(named) and isinstance(row, Mapping) and all(np.isscalar(row.get(k)) and _plain(row[k]) for k in _KEPT)
