"""Settings of fine-tuning and linear evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from coverfast.checks import require
from coverfast.training.settings import SMALL, Ints, TrainingSettings, mirrored, setting

TASKS = ("segmentation", "classification")
Floats = tuple[float, ...]

_SMALL: dict[str, Any] = SMALL | {"lr": 1e-3, "val_samples": 16}


@dataclass(frozen=True)
class FinetuneSettings(TrainingSettings):
    """Settings of `coverfast finetune` and `coverfast probe`; the defaults are those of the paper in 2D (SPEC 8)."""

    kind: ClassVar[str] = "fine-tuning"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper-2d": {},
        "paper-3d": {"batch": 2, "crop": (128,)},
        "small-2d": {"iterations": 300, "batch": 4, "crop": (128,), "channels": (16, 32, 64, 128, 256), **_SMALL},
        "small-3d": {"iterations": 100, "batch": 1, "crop": (64,), "channels": (8, 16, 32, 64, 128), **_SMALL},
    }
    choices: ClassVar[dict[str, tuple[str, ...]]] = TrainingSettings.choices | {"task": ("", *TASKS)}

    iterations: int = setting(40_000, "iterations in total", least=1, free=True)
    channels: Ints = setting((32, 64, 128, 256, 512), "channels of the encoder of a network from scratch", least=8)
    init: str = setting("", "pretrained backbone: backbone.safetensors, the run that has one, or a checkpoint")
    crop: Ints = setting((384,), "size of the crops that are learned from, one int or one per axis", least=1)
    val_every: int = setting(200, "iterations between validations, of which the best is kept", least=1, free=True)
    val_samples: int = setting(64, "most held-out samples that a validation uses", least=1, free=True)
    # The augmentation is milder than what makes two views: it must not leave the images behind.
    strength: float = setting(0.5, "factor on every range of the spatial augmentation; 0: none", least=0)
    contrast: float = setting(0.25, "largest deviation of the contrast factor from 1", least=0)
    boxes: int = setting(0, "most boxes to in-paint", least=0)

    task: str = setting("", f"{' or '.join(TASKS)}; default: segmentation where the shard has label maps")
    scratch: bool = setting(False, "start from weights drawn at random, for comparison")
    fraction: float = setting(1.0, "share of the training cases (patients) that is used", least=0, most=1)
    cases: int = setting(0, "number of training cases that are used, instead of a fraction; 0: see fraction", least=0)
    case_seed: int = setting(0, "another one chooses other cases; more cases hold those of fewer", least=0)
    train_modules: int = setting(-1, "last modules of the U-Net that learn; -1: all, 0: the head alone", least=-1)
    class_weights: Floats = setting((0.0,), "weight of each class in the cross-entropy; 0: all alike", least=0)

    @classmethod
    def fitting(cls, preset: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """See `TrainingSettings`: in few iterations a head by itself needs larger steps."""
        return {"lr": 0.1} if given.get("train_modules") == 0 and preset.startswith("small") else {}

    @property
    def smaller(self) -> str:
        """See `TrainingSettings`."""
        return "" if self.task == "segmentation" else super().smaller

    @property
    def label(self) -> str:
        """See `TrainingSettings`."""
        return f"{'probe' if self.train_modules == 0 else 'finetune'}-{self.preset}"

    def check(self) -> None:
        """See `TrainingSettings.check`."""
        super().check()
        require(self.scratch or bool(self.init), "init must name a pretrained backbone, got none; or use --scratch")
        require(
            not (self.init and self.scratch), f"init and scratch exclude each other, got init {self.init} and --scratch"
        )
        require(
            self.accumulate == 1 or self.task != "segmentation",
            f"accumulate must be 1 for a segmentation, whose Dice sums run over the whole batch, got "
            f"{self.accumulate}; --recompute saves memory too",
        )
        require(self.cases == 0 or self.fraction == 1, f"give cases or a fraction of them, got {self.cases} and both")
        require(self.fraction > 0, f"fraction must be above 0, got {self.fraction}")

    def unet_channels(self) -> Ints:
        """Channels of all stages: those of the pretrained backbone, or the encoder's, mirrored.

        A list that rises and falls alike is both already.
        """
        both = len(set(self.channels)) > 1 and self.channels == self.channels[::-1]
        return self.channels if self.init or both else mirrored(self.channels)
