"""The figures of a run: its metrics file, and what the names in it mean."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coverfast.checks import InputError, require
from coverfast.report.colours import Array

_REQUIRED = ("iteration", "loss")
# Lines that are held as Python objects at a time.
_BLOCK = 8192

#: What figures are, by name; `NAME_0`, `NAME_1`, ... are those of the levels, and `val_NAME` of held-out samples.
MEANINGS = {
    "loss": "what is minimised",
    "loss_vec": "L1 distance between predicted and true displacement, px",
    "loss_con": "1 - cosine between the features of both views at the same place",
    "loss_dice": "soft Dice loss of the batch, over the foreground classes",
    "loss_ce": "cross-entropy of the batch",
    "loss_ncc": "1 - ncc",
    "loss_smooth": "squared forward differences of the displacement, summed over axes and components, mean over pixels",
    "loss_restore": "mean square error of the image restored from its distorted form",
    "dsc": "Dice similarity, mean over cases and foreground classes",
    "auc": "area under the ROC curve, one class against the rest",
    "accuracy": "share of right labels",
    "cross_entropy": "mean cross-entropy",
    "epe_ratio": "end-point error over that of no displacement: 0 is exact, 1 no better than nothing",
    "epe": "end-point error: distance between predicted and true displacement, px of its level",
    "ratio": "end-point ratio",
    "ncc": "local correlation, squared, of image A and B brought over: 1 is the same but for contrast, 0 unrelated",
    "ncc_before": "the same before matching, of A and B as they are",
    "displacement": "mean length of the displacement, px",
    "folded": "share of the displacement that folds: its Jacobian determinant is not positive",
    "mask": "share of view b that view a shows too",
    "beyond_reach": "share of displacements longer than the pyramid can express",
    "background": "share of view b with nothing to match",
    "cos_random": "mean cosine between the features of random pixels: near 1 they have collapsed",
    "cos_random_std": "its standard deviation",
    "cos_near": "mean cosine between the features of neighbouring pixels: near cos_random they are over-dispersed",
    "cos_near_std": "its standard deviation",
    "rank": "effective rank of the finest features: how many directions they use",
    "rank_coarse": "effective rank of the coarsest features",
    "lr": "learning rate",
    "grad_norm": "gradient norm before clipping",
    "skipped": "1 where a step was skipped, its loss or gradient not being finite",
    "data_wait": "share of the time spent waiting for data",
    "seconds": "seconds an iteration",
    "iterations_per_s": "iterations a second",
    "images_per_s": "images, or pairs of them, a second",
    "mfu": "floating point operations over what the devices can do",
    "peak_memory_gb": "most memory used, GB",
}


def load_metrics(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Read a run's metrics.jsonl: one float64 array a name, an entry a line; NaN for null and where a line lacks it.

    Only "iteration" and "loss" must be on every line; what is no number is left out. A last line cut off in the
    middle, as a killed run leaves it, is dropped; any other line that is no JSON object with those two numbers raises
    `InputError`, as does a file that cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    except OSError as error:
        raise InputError(f"metrics file {path} cannot be read: {error.strerror or error}") from error
    if lines and _parsed(lines[-1]) is None:
        lines.pop()
    blocks = [_columns(path, lines[start : start + _BLOCK], start + 1) for start in range(0, len(lines), _BLOCK)]
    names = dict.fromkeys((*_REQUIRED, *(name for block in blocks for name in block)))
    lengths = [len(block["iteration"]) for block in blocks]
    columns = {}
    for name in names:
        parts = [block.get(name, np.full(n, np.nan)) for block, n in zip(blocks, lengths, strict=True)]
        columns[name] = np.concatenate([np.empty(0), *parts])
    return columns


def _columns(path: str | os.PathLike[str], lines: Sequence[str], first: int) -> dict[str, Array]:
    """The columns of a block of lines, the first of which has this number."""
    entries = _entries(lines)
    for number, (line, entry) in enumerate(zip(lines, entries, strict=True), start=first):
        require(isinstance(entry, dict), f"{path} line {number} must be a JSON object, got {line[:40]!r}")
        for name in _REQUIRED:
            found = entry.get(name, "nothing")
            ok = found is None or isinstance(found, (int, float))
            require(ok, f"{path} line {number} must hold a number {name!r}, got {found!r}")
    columns = {}
    for name in dict.fromkeys(name for entry in entries for name in entry):
        values = [entry.get(name) for entry in entries]
        if set(map(type, values)) <= {int, float, type(None)}:
            columns[name] = np.array(values, dtype=np.float64)
    return columns


def _entries(lines: Sequence[str]) -> list[Any]:
    """What each line holds, None where it is no JSON."""
    try:  # all at once takes half the time
        entries = json.loads(f"[{','.join(lines)}]")
    except ValueError:
        entries = []
    return entries if len(entries) == len(lines) else [_parsed(line) for line in lines]


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def of_levels(metrics: Mapping[str, Array], name: str) -> list[str]:
    """The names `NAME_0`, `NAME_1`, ... among `metrics` that hold a value, in order."""
    found = [key for key in metrics if re.fullmatch(rf"{re.escape(name)}_\d+", key)]
    found = [key for key in found if np.isfinite(metrics[key]).any()]
    return sorted(found, key=lambda key: (len(key), key))


def stem_of(name: str) -> str:
    """The name without the level and without "val_"."""
    return re.sub(r"_\d+$", "", name.removeprefix("val_"))


def meaning(name: str) -> str:
    """What a figure is, "" if unknown."""
    text = MEANINGS.get(stem_of(name), "")
    text += f", level {name.rpartition('_')[2]}" if text and stem_of(name) != name.removeprefix("val_") else ""
    return f"held out: {text}" if name.startswith("val_") and text else text


def last_figures(metrics: Mapping[str, Array]) -> list[tuple[str, float, float, int]]:
    """Of every figure: name, last value, mean of its last 50 values, iteration of the last; known ones first."""
    order = list(MEANINGS)
    names = [name for name in metrics if name != "iteration" and np.isfinite(metrics[name]).any()]

    def place(name: str) -> tuple[int, bool]:
        stem = stem_of(name)
        return order.index(stem) if stem in MEANINGS else len(order), name.startswith("val_")

    rows = []
    for name in sorted(names, key=place):
        at = np.flatnonzero(np.isfinite(metrics[name]))
        values = metrics[name][at]
        rows.append((name, float(values[-1]), float(values[-50:].mean()), int(metrics["iteration"][at[-1]])))
    return rows
