"""The settings of studies that train; they load neither torch nor h5py."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from coverfast.checks import check_choice, require
from coverfast.method_names import KNOWN, without_folder
from coverfast.training.settings import Ints, Strs, setting

#: Data that a study makes itself.
MADE = ("phantom", "atlas")


def label(method: str) -> str:
    """What a method is called in tables, pictures and file names: "gvsl", and "mine-Mine" for "nets/mine.py:Mine"."""
    return re.sub(r"\W+", "-", without_folder(method).replace(".py:", "-"), flags=re.ASCII)


@dataclass(frozen=True)
class StudySettings(ABC):
    """What every study that trains has."""

    #: What the study is called.
    name: ClassVar[str]
    #: Sizes and lengths by the preset of the runs.
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "small-2d": {},
        "small-3d": {"images": 32, "size": 64, "crop": (48,), "pretrain_iterations": 300, "iterations": 150},
        "paper-2d": {"size": 256, "crop": (192,), "pretrain_iterations": 5000, "iterations": 1000},
        "paper-3d": {"size": 96, "crop": (64,), "pretrain_iterations": 3000, "iterations": 600},
    }
    #: Tables of settings of the runs, and what in them the study sets itself.
    tables: ClassVar[tuple[str, ...]] = ("pretrain", "finetune")
    taken: ClassVar[tuple[str, ...]] = (
        *("data", "val", "split", "run", "preset", "task", "init", "scratch", "cases", "case_seed"),
        *("fraction", "train_modules", "seed", "iterations", "crop", "device"),
    )

    data: Strs = setting((), "labelled data: phantom, atlas (the MNI152 of nilearn), or shards; default phantom")
    unlabelled: Strs = setting((), "shards to pretrain on; default: made, or the training images of --data")
    images: int = setting(200, "unlabelled images to make; default 200, fewer in 3D", least=1)
    validation: int = setting(8, "labelled images to make for choosing the best weights; default 8", least=1)
    test: int = setting(32, "labelled images to make that nothing but the result is computed on; default 32", least=2)
    ndim: int = setting(0, "2 or 3; default: that of --data or of the preset, else 2", least=0, most=3)
    preset: str = setting(
        "", "of all runs: small-2d, small-3d, paper-2d, paper-3d; default: paper on a GPU, else small"
    )
    size: int = setting(128, "pixels an axis of the images that are made; default by preset", least=16)
    crop: Ints = setting((96,), "size of the views and crops, one int or one per axis; default by preset", least=1)
    pretrain_iterations: int = setting(600, "of pretraining; default by preset", least=1)
    iterations: int = setting(100, "of fine-tuning; default by preset", least=1)
    seed: int = setting(0, "key of the data that is made and of the first run's weights", least=0, most=2**32)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1 ...", free=True)

    @property
    def made(self) -> str:
        """The kind of data that the study makes; "" for shards."""
        return self.data[0] if self.data[0] in MADE else ""

    @property
    @abstractmethod
    def pool(self) -> int:
        """Labelled training images to make."""

    @property
    def pretrained(self) -> dict[str, str]:
        """What is pretrained by its name, and with which method, "" for that of the table pretrain."""
        return {"pretrained": ""}

    def check(self) -> None:
        """Raise `InputError` unless the values fit one another."""
        check_choice("preset", self.preset, tuple(self.presets))
        require(
            len(self.data) == 1 or not set(self.data) & set(MADE),
            f"data must be one of {', '.join(MADE)}, or shards, got {', '.join(self.data)}",
        )
        require(
            not (self.made and self.unlabelled),
            f"unlabelled must be left out where the study makes the data itself ({self.made}), got "
            f"{', '.join(self.unlabelled)}; name labelled shards with --data",
        )
        ndim = int(self.preset[-2])
        fits = not self.made or max(self.crop) <= self.size
        require(fits, f"crop must fit into images of size {self.size}, got {self.crop}; use a larger --size")
        require(self.made != "atlas" or self.ndim == 2, f"ndim must be 2 for the atlas, got {self.ndim}")
        require(
            self.ndim == ndim, f"preset must be one for {self.ndim}D images, got {self.preset!r}, which is for {ndim}D"
        )


@dataclass(frozen=True)
class TransferSettings(StudySettings):
    """Settings of `coverfast study transfer`."""

    name: ClassVar[str] = "transfer"
    tables: ClassVar[tuple[str, ...]] = ("pretrain", "finetune", "probe")
    taken: ClassVar[tuple[str, ...]] = (*StudySettings.taken, "method")

    methods: Strs = setting((), f"to pretrain with: {KNOWN}; may be repeated; default cover")
    checkpoint: str = setting("", "pretrained backbone.safetensors, or run that has one; default: pretrain first")
    cases: Ints = setting((4, 8, 16), "numbers of labelled training cases; default 4,8,16", least=1)
    seeds: int = setting(3, "times that each training is done: other cases, other weights; default 3", least=1)
    probe_iterations: int = setting(0, "of linear evaluation; 0: twice those of fine-tuning", least=0)

    def __post_init__(self) -> None:
        """Fill in the method, for studies begun before there were several too."""
        if not (self.methods or self.checkpoint):
            object.__setattr__(self, "methods", ("cover",))

    @property
    def pool(self) -> int:
        """See `StudySettings`."""
        return max(self.cases)

    @property
    def pretrained(self) -> dict[str, str]:
        """See `StudySettings`; the names are those of the methods where there are several."""
        if len(self.methods) < 2:
            return {"pretrained": "".join(self.methods)}
        return {label(method): method for method in self.methods}

    @property
    def inits(self) -> tuple[str, ...]:
        """Where weights come from, by the names of the arms."""
        return ("scratch", *self.pretrained)

    def check(self) -> None:
        """See `StudySettings`."""
        super().check()
        require(
            not (self.checkpoint and self.methods),
            f"methods must be left out with a checkpoint, which is pretrained already, got {', '.join(self.methods)}",
        )
        # Folders of two names that differ in case are one on some disks.
        require(
            len({label(method).casefold() for method in self.methods}) == len(self.methods),
            f"methods must be of different names, got {', '.join(map(label, self.methods))}",
        )
        require(len(set(self.cases)) == len(self.cases), f"cases must be different numbers, got {self.cases}")


@dataclass(frozen=True)
class RetestSettings(StudySettings):
    """Settings of `coverfast study retest`."""

    name: ClassVar[str] = "retest"

    labelled: int = setting(16, "labelled training images to make; default 16; those of shards are all used", least=1)

    @property
    def pool(self) -> int:
        """See `StudySettings`."""
        return self.labelled

    @property
    def two_seeds(self) -> tuple[int, int]:
        """Keys of weights, order of samples and views in the two runs."""
        return self.seed, self.seed + 1
