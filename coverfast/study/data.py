"""The images of a study: made from its seed, or those of shards."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coverfast.checks import InputError, require
from coverfast.shard_set import ShardSet
from coverfast.study.folder import Study
from coverfast.study.settings import StudySettings
from coverfast.training.data import overlaps
from coverfast.training.runs import Run


@dataclass(frozen=True)
class Data:
    """Where the images lie.

    unlabelled: shards to pretrain on. labelled: to train on, their training split. val: to choose the best weights on;
    empty for the val split of `labelled`. test: what results are computed on and nothing else.
    """

    unlabelled: list[Path]
    labelled: list[Path]
    val: list[Path]
    test: ShardSet

    @property
    def classes(self) -> list[str]:
        """Names of the classes, the background first."""
        return [c.name for c in self.test.label_classes]

    def flags(self) -> dict[str, Any]:
        """Settings of a fine-tuning."""
        return {"data": list(map(str, self.labelled)), "val": list(map(str, self.val))}


@contextmanager
def begun(study: Study) -> Iterator[None]:
    """While entered, the study is this process's alone; a new one that is refused before it trains leaves nothing."""
    old = study.keep()
    try:
        with Run(study.folder).locked():
            yield
    except InputError:
        if not old and not (study.folder / "runs").exists():
            shutil.rmtree(study.folder)
        raise


def gather(study: Study, *, pretrains: bool, tell: Callable[[str], None] = lambda text: None) -> Data:
    """The images of a study; those that it makes and are not there yet are made.

    pretrains: whether unlabelled ones are needed. tell: is told what is made, and of patients with images both to
    learn from and to test on.

    Raises:
        InputError: for shards that lack label maps, a split or classes, or do not belong together.
    """
    return _made(study, pretrains, tell) if study.settings.made else _given(study.settings, tell)


def _made(study: Study, pretrains: bool, tell: Callable[[str], None]) -> Data:
    """Different images of one population: unlabelled ones first, then those to train, choose and test on."""
    s, folder = study.settings, study.folder / "data"
    parts = {"unlabelled": s.images, "train": s.pool, "val": s.validation, "test": s.test}
    first, paths = 0, {}
    for name, count in parts.items():
        paths[name] = folder / f"{name}.h5"
        if not paths[name].exists() and (pretrains or name != "unlabelled"):
            tell(f"{paths[name]}: making {count} images")
            _make(s, paths[name], first, count)
        first += count
    test = ShardSet(paths["test"], "all")
    return Data([paths["unlabelled"]], [paths["train"]], [paths["val"]], test)


def _make(s: StudySettings, path: Path, first: int, count: int) -> None:
    if s.made == "phantom":
        from coverfast.ingest.phantoms import build_phantoms

        build_phantoms(path, s.ndim, s.size, seed=s.seed, indices=range(first, first + count))
    else:
        from coverfast.ingest.atlas import build_atlas_subjects

        build_atlas_subjects(path, count=count, seed=s.seed, size=s.size, first=first)


def _given(s: StudySettings, tell: Callable[[str], None]) -> Data:
    whole = ShardSet(s.data, "all")
    first = whole.paths[0]
    require(
        len(whole.label_classes) > 0,
        f"data must hold label maps, but {first} has none; build it with `shards build IMAGES --labels LABELS`",
    )
    for split in ("train", "val", "test"):
        require(
            whole.split_counts[split] > 0,
            f"data must have images in the splits train, val and test, but {first} has none in {split}; see "
            "`shards build --split`",
        )
    unlabelled = [Path(p) for p in s.unlabelled or s.data]
    learned = ShardSet(unlabelled, "train")
    require(
        (learned.ndim, learned.channels) == (whole.ndim, whole.channels),
        f"unlabelled must be {whole.ndim}D images of {whole.channels} channel(s) like {first}, but {unlabelled[0]} is "
        f"{learned.ndim}D of {learned.channels} channel(s)",
    )
    test = ShardSet(s.data, "test")
    _check_apart(learned, test)
    for note in dict.fromkeys(n for seen in (learned, ShardSet(s.data, "train")) for n in overlaps(seen, test)):
        tell(note)
    return Data(unlabelled, list(whole.paths), [], test)


def _check_apart(learned: ShardSet, test: ShardSet) -> None:
    """Refuse test images that pretraining would see."""
    known = {learned.identity(i)[0] for i in range(len(learned))}
    for index in range(len(test)):
        if test.identity(index)[0] in known:
            raise InputError(
                f"test images must not be among those to pretrain on, but {test.source(index)} of "
                f"{test.place(index)[0]} is"
            )
