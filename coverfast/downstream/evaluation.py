"""A network against the labels of a shard: every case, every class, and the means with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from coverfast.checks import InputError, require
from coverfast.class_tables import ClassIndices
from coverfast.downstream.bootstrap import LEVEL, RESAMPLES, Interval, bootstrap_mean, bootstrap_statistic
from coverfast.downstream.metrics import SEGMENTATION_METRICS, auc, auc_one_vs_rest, score_case
from coverfast.downstream.windows import predict_windows
from coverfast.samples import Sample
from coverfast.shard_set import ShardSet

if TYPE_CHECKING:
    from coverfast.downstream.network import Network

#: Mm within which surfaces count as met.
TOLERANCE = 1.0
CLASSIFICATION_METRICS = {
    "accuracy": "share of the cases whose most probable class is theirs",
    "auc": "area under the ROC curve: of two classes that of the second; of more, the mean over the classes, each "
    "against the rest",
}

Progress = Callable[[float, int], None]


@dataclass(frozen=True)
class Case:
    """One sample of a set.

    index: in the set. score: what cases are ranked by: mean DSC over the foreground classes, or the probability given
    to the true class. figures: of the whole case. classes: figures by class. labels: of a classification, the true
    class and the most probable one.
    """

    index: int
    source: str
    group: str
    score: float
    figures: dict[str, float]
    classes: dict[str, dict[str, float]]
    labels: tuple[str, str] | None = None


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    task, names: of the network. cases: in the order of the set. figures: over the cases, by metric. classes: the same
    of one class each (of a segmentation, the foreground). one_empty: by class, the cases where either truth or
    prediction lacks it, whose HD95 is infinite and in no mean. definitions: of the figures. settings: what they depend
    on. notes: what else to know.
    """

    task: str
    names: tuple[str, ...]
    cases: tuple[Case, ...]
    figures: dict[str, Interval]
    classes: dict[str, dict[str, Interval]]
    one_empty: dict[str, int]
    definitions: dict[str, str]
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()

    def values(self, figure: str) -> NDArray[np.float64]:
        """A figure of every case, `(N,)`."""
        return np.array([case.figures[figure] for case in self.cases])

    def ranked(self) -> list[Case]:
        """The cases, the worst first."""
        return sorted(self.cases, key=lambda case: case.score)

    def plain(self) -> dict[str, Any]:
        """All of it for JSON; what is not finite becomes None."""
        cases = []
        for case in self.cases:
            found: dict[str, Any] = {"source": case.source, "group": case.group, **_plain(case.figures)}
            if case.labels:
                found |= dict(zip(("truth", "prediction"), case.labels, strict=True))
            cases.append(found | {"classes": {name: _plain(values) for name, values in case.classes.items()}})
        return {
            "task": self.task,
            "settings": self.settings,
            "definitions": self.definitions,
            "notes": list(self.notes),
            "mean": {name: interval.plain() for name, interval in self.figures.items()},
            "classes": {
                name: {metric: interval.plain() for metric, interval in found.items()}
                | ({"one_empty": self.one_empty[name]} if name in self.one_empty else {})
                for name, found in self.classes.items()
            },
            "cases": cases,
        }


def evaluate(
    network: Network,
    shards: ShardSet,
    *,
    device: torch.device | str | None = None,
    overlap: float = 0.5,
    batch: int = 4,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a network on labelled samples, on the grid that the shards have them on.

    Segmentation: `SEGMENTATION_METRICS` of every foreground class of every case; the figure of a case is the mean over
    its classes, HD95 over those where it is finite; spacing is the sample's. Classification: accuracy and AUC; samples
    without a target are left out. Intervals: `bootstrap_mean`, cases of one patient drawn together. device: where to
    move the network, which stays there; None leaves it where it is. overlap, batch: see `predict_windows`. tolerance:
    of the surface Dice, mm. progress: called with (cases done, a part of one included, cases).

    `InputError`: `check_fits`; scipy is not installed; a sample that cannot be read.
    """
    notes = check_fits(network, shards)
    require(tolerance >= 0, f"tolerance must be at least 0 mm, got {tolerance!r}")
    if device is not None:
        network.to(device)
    dense = network.task == "segmentation"
    wanted = range(len(shards)) if dense else np.flatnonzero(shards.targets >= 0).tolist()
    if len(wanted) < len(shards):
        notes.append(f"{len(shards) - len(wanted)} of {len(shards)} samples have no class and are left out")
    cases, occurs = [], np.zeros(len(network.names), bool)
    for done, index in enumerate(wanted):
        part = None if progress is None else lambda share, at=done: progress(at + share, len(wanted))
        seen = predict_case(network, shards, index, overlap=overlap, batch=batch, progress=part)
        cases.append(_segmented(network, seen, tolerance) if dense else _classified(network, seen))
        occurs[np.unique(seen.truth)] = True
    groups = [case.group for case in cases]
    intervals = f"{LEVEL:.0%} percentile bootstrap over cases, {RESAMPLES} draws, patients drawn whole, seed {seed}"
    settings = {"overlap": overlap, "crop": list(network.crop), "intervals": intervals}
    if dense:
        settings |= {"tolerance_mm": tolerance}
        figures, classes = _over_cases(cases, groups, seed)
        one_empty = {name: sum(math.isinf(case.classes[name]["hd95"]) for case in cases) for name in classes}
        definitions = SEGMENTATION_METRICS
        if absent := [name for name, there in zip(network.names[1:], occurs[1:], strict=True) if not there]:
            notes.append(
                f"no case has a true pixel of {_some(absent)}: DSC, IoU and surface Dice are 1 wherever that is not "
                "predicted, and lift the mean"
            )
    else:
        figures, classes = _over_targets(network.names, cases, groups, seed)
        one_empty, definitions = {}, CLASSIFICATION_METRICS
    return Evaluation(
        network.task, network.names, tuple(cases), figures, classes, one_empty, definitions, settings, tuple(notes)
    )


@dataclass(frozen=True, eq=False)
class Seen:
    """A sample and what a network makes of it.

    image: `(C, *S)` float32 in [0, 1]. truth, prediction: class indices `(*S)` uint8, or one of the whole image.
    probabilities: of a classification, `(K,)`. spacing: mm along S.
    """

    index: int
    source: str
    group: str
    image: NDArray[np.float32]
    truth: Any
    prediction: Any
    probabilities: NDArray[np.float32]
    spacing: tuple[float, ...]


def predict_case(
    network: Network,
    shards: ShardSet,
    index: int,
    *,
    overlap: float = 0.5,
    batch: int = 4,
    progress: Callable[[float], None] | None = None,
) -> Seen:
    """Sample `index` of a set that fits the network, its truth and its prediction; see `predict_windows`."""
    dense = network.task == "segmentation"
    if dense:
        shards.need_labels()
    sample = shards.read(index)
    image = sample.normalised()
    found = predict_windows(network, torch.from_numpy(image), overlap=overlap, batch=batch, progress=progress)
    if dense:
        truth: Any = _class_indices(shards, index, sample)
        prediction: Any = found.argmax(0).to(torch.uint8).numpy()
        probabilities = np.empty(0, np.float32)
    else:
        truth, prediction, probabilities = int(shards.targets[index]), int(found.argmax()), found.numpy()
    return Seen(index, sample.source, sample.group, image, truth, prediction, probabilities, sample.spacing)


def _class_indices(shards: ShardSet, index: int, sample: Sample) -> NDArray[np.uint8]:
    """Those of sample `index`, which `sample` is: its label map is decoded already."""
    assert sample.labels is not None
    try:
        return ClassIndices(shards.label_classes)(sample.labels)
    except InputError as error:
        path, number = shards.place(index)
        raise InputError(f"{path}: label map of sample {number} ({sample.source}): {error}") from error


def check_fits(network: Network, shards: ShardSet) -> list[str]:
    """Refuse shards whose images or classes are not the network's; return what is worth knowing besides."""
    at = str(shards.paths[0])
    require(shards.ndim == network.ndim, f"{at} must be {network.ndim}D like the network's images, got {shards.ndim}D")
    require(
        shards.channels == network.in_channels,
        f"{at} must have {network.in_channels} channel(s) like the network's images, got {shards.channels}",
    )
    if network.task == "segmentation":
        found = shards.label_classes
        require(len(found) > 0, f"{at} must hold label maps to evaluate a segmentation, found none; see `shards build`")
        expected = list(zip(network.values, network.names, strict=True))
        require(
            [tuple(c) for c in found] == expected,
            f"{at} must have the network's classes, {_listed(expected)}, got {_listed(found)}",
        )
    else:
        names = tuple(shards.target_classes)
        require(
            len(names) > 0, f"{at} must say the class of its images to evaluate a classification; see `shards build`"
        )
        require(
            names == network.names,
            f"{at} must have the network's classes, {', '.join(network.names)}, got {', '.join(names)}",
        )
        require(bool((shards.targets >= 0).any()), f"{at} must have samples with a class in the split {shards.split!r}")
    if shards.preprocessing != network.preprocessing:
        return [
            f"{at} was preprocessed by {shards.preprocessing}, but what the network learned from by "
            f"{network.preprocessing}"
        ]
    return []


def _listed(classes: Sequence[Any]) -> str:
    return _some([f"{value} {name}" for value, name in classes])


def _some(texts: Sequence[str]) -> str:
    return ", ".join(texts[:12]) + (f" and {len(texts) - 12} more" if len(texts) > 12 else "")


def _segmented(network: Network, seen: Seen, tolerance: float) -> Case:
    scores = score_case(seen.prediction, seen.truth, len(network.names), seen.spacing, tolerance)
    figures = {}
    for name, values in scores.items():
        known = values[np.isfinite(values)]
        figures[name] = float(known.mean()) if known.size else math.nan
    classes = {
        name: {metric: float(values[place]) for metric, values in scores.items()}
        for place, name in enumerate(network.names[1:])
    }
    return Case(seen.index, seen.source, seen.group, figures["dsc"], figures, classes)


def _classified(network: Network, seen: Seen) -> Case:
    classes = {name: {"probability": float(p)} for name, p in zip(network.names, seen.probabilities, strict=True)}
    labels = network.names[seen.truth], network.names[seen.prediction]
    figures = {"accuracy": float(labels[0] == labels[1])}
    return Case(seen.index, seen.source, seen.group, classes[labels[0]]["probability"], figures, classes, labels)


def _over_cases(
    cases: Sequence[Case], groups: Sequence[str], seed: int
) -> tuple[dict[str, Interval], dict[str, dict[str, Interval]]]:
    def mean(values: list[float]) -> Interval:
        return bootstrap_mean(np.array(values), groups=groups, seed=seed)

    figures = {metric: mean([case.figures[metric] for case in cases]) for metric in SEGMENTATION_METRICS}
    classes = {
        name: {metric: mean([case.classes[name][metric] for case in cases]) for metric in SEGMENTATION_METRICS}
        for name in cases[0].classes
    }
    return figures, classes


def _over_targets(
    names: Sequence[str], cases: Sequence[Case], groups: Sequence[str], seed: int
) -> tuple[dict[str, Interval], dict[str, dict[str, Interval]]]:
    probabilities = np.array([[case.classes[name]["probability"] for name in names] for case in cases])
    targets = np.array([names.index(case.labels[0]) for case in cases if case.labels])
    accuracy = bootstrap_mean(np.array([case.figures["accuracy"] for case in cases]), groups=groups, seed=seed)
    classes = {
        name: {"auc": bootstrap_statistic(auc, probabilities[:, k], targets == k, groups=groups, seed=seed)}
        for k, name in enumerate(names)
    }
    overall = (
        classes[names[1]]["auc"]
        if len(names) == 2
        else bootstrap_statistic(auc_one_vs_rest, probabilities, targets, groups=groups, seed=seed)
    )
    return {"accuracy": accuracy, "auc": overall}, classes


def _plain(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
