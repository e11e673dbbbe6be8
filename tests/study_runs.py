"""Small studies for the tests of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coverfast.downstream.finetuning import Finetuning
from coverfast.study.folder import Study
from coverfast.study.progress import Watch
from coverfast.study.retest import retest
from coverfast.study.retest import works as retest_works
from coverfast.study.settings import StudySettings, TransferSettings
from coverfast.study.transfer import transfer
from coverfast.study.transfer import works as transfer_works
from coverfast.training.pretrain import Pretraining

TINY = {"images": 3, "validation": 1, "test": 3, "size": 64, "crop": 32, "preset": "small-2d"}
SHORT = {**TINY, "cases": [2], "seeds": 1, "pretrain_iterations": 4, "iterations": 4, "probe_iterations": 4}
#: The table pretrain comes first and the network's size in it, what is COVER's alone last.
PRETRAIN = """
[pretrain]
channels = [8, 8, 8, 8, 8]
threads = 1
batch = 2
checkpoint_every = 2
tensorboard = false
"""
COVER = "groups = [1, 1, 1, 1, 1]\nwindow = 3\n"
FINETUNE = "[finetune]\nthreads = 1\nbatch = 2\nval_every = 2\ncheckpoint_every = 2\n"
PROBE = "[probe]\nthreads = 1\nbatch = 2\nval_every = 2\ncheckpoint_every = 2\n"
TABLES = PRETRAIN + COVER + FINETUNE


def without_pictures(patch: pytest.MonkeyPatch) -> None:
    """Pictures of every run take longer than a tiny run."""
    for kind in (Finetuning, Pretraining):
        patch.setattr(kind, "_draw", lambda self, iteration: None)


def settings(kind: type[StudySettings], **flags: Any) -> Any:
    """Of a small study."""
    return Study.open(kind, Path("nowhere"), {**TINY, **flags}).settings


def go(kind: type[StudySettings], out: Path, config: Path | None = None, **flags: Any) -> dict[str, Any]:
    """A study from start to end, in this process."""
    study = Study.open(kind, out, flags, config)
    works, library = (transfer_works, transfer) if kind is TransferSettings else (retest_works, retest)
    return library(study, Watch(works(study), note=lambda text: None))


class Reached(Exception):
    """Of a test: pretraining would start now."""


def short_of_training(patch: pytest.MonkeyPatch) -> None:
    """Raise `Reached` where pretraining would start."""

    def start(*more: object, **options: object) -> None:
        raise Reached

    patch.setattr(Pretraining, "start", start)
