"""Every setting of a training run, once: presets, TOML, command-line flags and the resume check read these tables."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, ClassVar, Self, TypeVar, overload

from coverfast.backbone_names import kind_of
from coverfast.checks import InputError, check_choice, require
from coverfast.method_names import KNOWN, METHODS, is_own, without_folder
from coverfast.ops.dispatch import IMPLEMENTATIONS
from coverfast.samples import ON_BAD_SAMPLE, SPLITS
from coverfast.view_settings import ViewSettings

Ints = tuple[int, ...]
Strs = tuple[str, ...]


def setting(default: Any, text: str, **traits: Any) -> Any:
    """A field with its help; `free` may change on resume, `least` and `most` bound a number, `also` names its flag.

    `first`: it stands at the head of the flags, after the preset.
    """
    return field(default=default, metadata={"help": text, **traits})


@dataclass(frozen=True)
class TrainingSettings:
    """What every kind of training has; the defaults are those of the paper in 2D. Help is in the fields' metadata."""

    #: What is trained, for people and files.
    kind: ClassVar[str] = "training"
    #: Values by the name of a preset, which ends in the number of spatial axes.
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    #: Settings that are one of a few words.
    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "impl": IMPLEMENTATIONS,
        "split": (*SPLITS, "all"),
        "on_bad_sample": ON_BAD_SAMPLE,
        "optimizer": ("adam", "adamw"),
        "schedule": ("constant", "cosine"),
        "precision": ("auto", "bfloat16", "float32"),
        "layout": ("auto", "contiguous", "channels_last"),
    }

    preset: str = setting("paper-2d", "paper-2d, paper-3d, small-2d or small-3d; default: from shard and device")
    data: Strs = setting((), "shard, folder or glob of shards to learn from; may be repeated", free=True)
    split: str = setting("train", f"samples to learn from: {', '.join(SPLITS)} or all")
    val: Strs = setting((), "held-out shards, their val split or else all; default: the val split of data", free=True)
    # torchrun takes --run for an ambiguous --run-path of its own.
    run: str = setting("", "run folder; default runs/<date>-<time>-<preset>", free=True, also=("run_folder",))
    init: str = setting("", "backbone.safetensors to start from")
    partial: bool = setting(False, "load what fits of --init and say what does not, instead of refusing it", free=True)
    adapt_input: bool = setting(False, "let --init of one channel start a network for several", free=True)
    backbone: str = setting(
        "unet", "unet, timm:NAME, monai:CLASS, smp:CLASS, or code of your own: package.module:factory, file.py:factory"
    )
    backbone_args: Strs = setting((), "argument of such a backbone, KEY=VALUE; may be repeated")
    iterations: int = setting(200_000, "iterations in total", least=1, free=True)
    batch: int = setting(24, "images an iteration (of gvsl pairs), over all processes", least=1)
    crop: Ints = setting((384,), "size of the views, or of the crops of gvsl, one int or one per axis", least=1)
    pad: bool = setting(False, "zero-pad images smaller than the crop and mask the padding")
    foreground: float = setting(0.0, "share of the crops that are placed on the foreground", least=0, most=1)
    channels: Ints = setting((32, 64, 128, 256, 512), "U-Net channels, encoder only or encoder and decoder", least=8)
    strength: float = setting(1.0, "factor on every range of the spatial transform; 1 is the paper's", least=0)
    rotation: float = setting(ViewSettings.rotation, "largest rotation about an axis, radians", least=0)
    shear: float = setting(ViewSettings.shear, "largest shear angle, radians", least=0)
    scale: float = setting(ViewSettings.scale, "largest deviation of a scale from 1", least=0)
    translation: float = setting(ViewSettings.translation, "largest shift, fraction of the size", least=0)
    elastic: float = setting(0.0, "standard deviation of a smooth elastic part, pixels", least=0)
    elastic_spacing: float = setting(32.0, "distance of its control points, pixels", least=1)
    probability: float = setting(0.9, "probability of each appearance transform", least=0)
    noise: float = setting(0.02, "largest standard deviation of the noise", least=0)
    blur: float = setting(0.05, "largest standard deviation of the blur, pixels", least=0)
    contrast: float = setting(0.5, "largest deviation of the contrast factor from 1", least=0)
    brightness: float = setting(0.1, "largest standard deviation of the brightness shift", least=0)
    boxes: int = setting(10, "most boxes to in-paint", least=0)
    optimizer: str = setting("adam", "adam, or adamw for a decoupled weight decay")
    weight_decay: float = setting(0.0, "weight decay", least=0)
    lr: float = setting(1e-4, "learning rate", least=1e-30)
    schedule: str = setting("constant", "of the learning rate after the warm-up: constant, or cosine down to 0")
    warmup: int = setting(0, "iterations over which the learning rate rises from 0", least=0)
    schedule_iterations: int = setting(0, "length of the cosine schedule; 0: the iterations at the start", least=0)
    clip: float = setting(1.0, "largest gradient norm", least=1e-30)
    ema: float = setting(0.0, "decay of a moving average of the weights, which is then the result; 0: none", least=0)
    skip_limit: int = setting(
        10, "steps among any 100 that may be skipped since loss or gradient are not finite", least=0, free=True
    )
    seed: int = setting(0, "key of the weights, the order of the samples and the views", least=0, most=2**64 - 1)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1 ...", free=True)
    threads: int = setting(0, "CPU threads of torch; 0 leaves the choice to torch", least=0, most=1024)
    impl: str = setting("auto", f"implementation of the ops: {', '.join(IMPLEMENTATIONS)}")
    precision: str = setting("auto", "of the network: bfloat16, float32 or auto, bfloat16 on a GPU that has it")
    compile: bool = setting(True, "compile the step with torch.compile: minutes once, then faster", free=True)
    cuda_graphs: bool = setting(False, "replay the compiled step as CUDA graphs: for short steps", free=True)
    layout: str = setting("auto", "of feature maps in memory: contiguous, channels_last or auto", free=True)
    accumulate: int = setting(1, "parts of a batch that pass one after the other, to save memory", least=1, free=True)
    recompute: bool = setting(False, "recompute activations in the backward pass, to save memory", free=True)
    deterministic: bool = setting(False, "the same bits on a GPU every time, at some cost", free=True)
    fsdp: bool = setting(False, "shard weights and optimiser over the processes (FSDP2) instead of DDP", free=True)
    timeout: int = setting(600, "seconds that processes wait for one another", least=1, free=True)
    crops: int = setting(1, "views of a sample at each visit, from one reading", least=1)
    workers: int = setting(
        -1, "reading processes; -1: the cores but one, at most 8, on a GPU, and 0 on a CPU", least=-1, free=True
    )
    on_bad_sample: str = setting("stop", "a sample that cannot be read: stop, or skip to the next one", free=True)
    checkpoint_every: int = setting(1000, "iterations between checkpoints", least=1, free=True)
    keep_checkpoints: int = setting(3, "newest checkpoints kept", least=1, free=True)
    keep_every: int = setting(0, "checkpoints of every so many iterations are kept too; 0: none", least=0, free=True)
    log_every: int = setting(10, "iterations between copies of the figures to the host", least=1, free=True)
    monitor_every: int = setting(50, "iterations between looks at levels and dispersion", least=1, free=True)
    report: bool = setting(True, "make pictures, at the end and every so often", free=True)
    report_every: int = setting(10_000, "iterations between pictures; there are some at the end", least=1, free=True)
    tensorboard: bool = setting(True, "write TensorBoard events where tensorboard is installed", free=True)
    val_every: int = setting(1000, "iterations between validations", least=1, free=True)
    val_samples: int = setting(32, "most samples of the held-out shard that a validation uses", least=1, free=True)

    @property
    def own(self) -> str | None:
        """The user's code that makes the backbone, if that is what makes it."""
        return self.backbone if kind_of(self.backbone) == "own" else None

    def views(self) -> ViewSettings:
        """The ranges of the view transforms."""
        return ViewSettings(**{f.name: getattr(self, f.name) for f in fields(ViewSettings)})

    @classmethod
    def fitting(cls, preset: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Values that a preset has where others are `given`."""
        return {}

    @classmethod
    def preset_for(cls, name: str, ndim: int, *, small: bool, method: str) -> str:
        """The preset of a name, or of none, for images of `ndim` axes; one whose name lacks these gets them."""
        if not name:
            return f"{'small' if small else 'paper'}-{ndim}d"
        return f"{name}-{ndim}d" if f"{name}-{ndim}d" in cls.presets else name

    @property
    def smaller(self) -> str:
        """What else saves memory, for people."""
        return "more --accumulate, "

    @property
    def told(self) -> list[Field[Any]]:
        """The settings that count, for files that people read."""
        return list(fields(self))

    @property
    def label(self) -> str:
        """What the folder of a run is called by default, after its date."""
        return self.preset

    def check(self) -> None:
        """Raise `InputError` unless the values fit one another."""
        self.views()
        self._check_backbone()
        for name, choices in self.choices.items():
            check_choice(name, getattr(self, name), choices)
        require(self.ema < 1, f"ema must be below 1, got {self.ema}")
        require(self.compile or not self.cuda_graphs, "cuda_graphs need compile, got --no-compile")
        require(
            self.accumulate == 1 or not self.cuda_graphs,
            f"cuda_graphs replay whole batches, got accumulate {self.accumulate}",
        )
        length = self.schedule_iterations or self.iterations
        require(
            self.warmup < length, f"warmup must be below the {length} iterations of the schedule, got {self.warmup}"
        )
        require(
            self.schedule != "cosine" or self.iterations <= length,
            f"iterations must be at most {length}, where the cosine schedule ends at a learning rate of 0, got "
            f"{self.iterations}; start another run with --init to go on",
        )

    def _check_backbone(self) -> None:
        if self.backbone == "unet":
            require(
                not self.backbone_args, f"backbone_args need a backbone other than the U-Net, got {self.backbone_args}"
            )
            return
        usual = preset_settings(self.preset, type(self)).channels
        require(
            self.channels == usual,
            f"channels are those of the U-Net, but the backbone is {self.backbone}; leave them out",
        )
        require(not self.recompute, f"recompute is for the U-Net alone, but the backbone is {self.backbone}")
        require(not self.fsdp, f"fsdp shards the U-Net alone, but the backbone is {self.backbone}")

    def pinned(self) -> Self:
        """With the length of the schedule: a run that goes on for longer later must not have had another one so far."""
        if self.schedule == "cosine" and not self.schedule_iterations:
            return replace(self, schedule_iterations=self.iterations)
        return self


#: What a run of minutes on a CPU has other than a long one.
SMALL: dict[str, Any] = {
    "checkpoint_every": 100,
    "val_every": 50,
    "val_samples": 8,
    "compile": False,
    "log_every": 1,
    "monitor_every": 10,
    "report_every": 100,
}


_SMALL_2D = {"batch": 4, "crop": (128,), "channels": (16, 32, 64, 128, 256), **SMALL}
_SMALL_3D = {"batch": 1, "crop": (64,), "channels": (8, 16, 32, 64, 128), **SMALL}
#: Settings that the method cover alone looks at.
OF_COVER = (*(f.name for f in fields(ViewSettings)), "groups", "head_dim", "window")


@dataclass(frozen=True)
class Settings(TrainingSettings):
    """Settings of `coverfast pretrain`."""

    kind: ClassVar[str] = "pretraining"

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper-2d": {},
        "paper-3d": {"batch": 2, "crop": (128,), "window": (5,)},
        "small-2d": {"iterations": 300, **_SMALL_2D},
        "small-3d": {"iterations": 100, **_SMALL_3D, "window": (5,)},
        "gvsl-2d": {"method": "gvsl"},
        "gvsl-3d": {"method": "gvsl", "batch": 2, "crop": (128,)},
        "small-gvsl-2d": {"method": "gvsl", "iterations": 300, **_SMALL_2D},
        "small-gvsl-3d": {"method": "gvsl", "iterations": 100, **_SMALL_3D},
    }

    preset: str = setting(
        "paper-2d",
        "paper-2d, small-2d, gvsl-2d, small-gvsl-2d; -3d for -2d, or neither: by shard; default: by shard and device",
    )
    method: str = setting("cover", KNOWN, first=True)
    method_args: Strs = setting(
        (),
        "argument of a method other than cover, KEY=VALUE, may be repeated; of gvsl: window, smooth, restore, bezier, "
        "shuffle, inpaint",
        first=True,
    )
    groups: Ints = setting((4, 4, 4, 1, 1), "COVER: groups of each pyramid level, coarse to fine", least=1)
    head_dim: int = setting(8, "COVER: channels of a group", least=1)
    window: Ints = setting((7,), "COVER: odd matching window: one int, one per axis or one per level", least=1)

    @classmethod
    def preset_for(cls, name: str, ndim: int, *, small: bool, method: str) -> str:
        """See `TrainingSettings`."""
        usual = super().preset_for(name, ndim, small=small, method=method)
        if not name and method == "gvsl":
            return f"small-gvsl-{ndim}d" if small else f"gvsl-{ndim}d"
        return usual

    @property
    def label(self) -> str:
        """See `TrainingSettings`; with the method where the preset does not say it."""
        if self.method == preset_settings(self.preset).method:
            return self.preset
        return f"{without_folder(self.method).rpartition(':')[2].lower()}-{self.preset}"

    @property
    def told(self) -> list[Field[Any]]:
        """See `TrainingSettings`."""
        return [f for f in fields(self) if self.method == "cover" or f.name not in OF_COVER]

    @property
    def own_method(self) -> str | None:
        """The user's code that is the method, if that is what it is."""
        return self.method if is_own(self.method) else None

    def check(self) -> None:
        """See `TrainingSettings.check`."""
        super().check()
        close = difflib.get_close_matches(self.method, METHODS, 1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        require(not is_own(self.method) or ":" in self.method, f"method must be {KNOWN}, got {self.method!r}{meant}")
        if self.method == "cover":
            require(not self.method_args, f"method_args are for other methods than cover, got {self.method_args}")
        else:
            usual = preset_settings(self.preset)
            for name in OF_COVER:
                require(
                    getattr(self, name) == getattr(usual, name),
                    f"{name} is a setting of the method cover, but the method is {self.method}; leave it out (what "
                    f"{self.method} has is given by --method-args)",
                )
        if self.backbone == "unet":
            self.unet_channels()

    def fitted(self, levels: int) -> Settings:
        """With groups for so many levels where they were left to the preset: those of its coarsest and finest ones."""
        usual = preset_settings(self.preset).groups
        if len(self.groups) == levels:
            return self
        require(
            self.groups == usual, f"groups must be {levels}, one for each level of {self.backbone}, got {self.groups}"
        )
        coarse = max(0, levels - 2)
        return replace(self, groups=usual[:1] * coarse + usual[-2:][-levels:])

    def unet_channels(self) -> Ints:
        """Channels of all stages; an encoder given alone is mirrored."""
        levels = len(self.groups)
        if len(self.channels) == levels:
            return mirrored(self.channels)
        if self.method != "cover":  # no groups to tell how many levels there are
            whole = len(self.channels) % 2 == 1 and self.channels == self.channels[::-1]
            return self.channels if whole else mirrored(self.channels)
        require(
            len(self.channels) == 2 * levels - 1,
            f"channels must be {levels} (encoder) or {2 * levels - 1} ints (encoder and decoder) for the {levels} "
            f"levels of groups, got {len(self.channels)}",
        )
        return self.channels


def mirrored(encoder: Ints) -> Ints:
    """Channels of encoder and decoder, given those of the encoder."""
    return encoder + encoder[-2::-1]


S = TypeVar("S", bound=TrainingSettings)


def preset_ndim(preset: str) -> int:
    """Spatial axes of the images a preset is for."""
    return int(preset[-2])


@overload
def preset_settings(preset: str) -> Settings: ...
@overload
def preset_settings(preset: str, kind: type[S]) -> S: ...
def preset_settings(preset: str, kind: Any = Settings) -> Any:
    """The settings of a preset, of pretraining unless another kind is asked for."""
    check_choice("preset", preset, tuple(kind.presets))
    return replace(kind(), preset=preset, **kind.presets[preset])


@overload
def resolve(preset: str, *layers: Mapping[str, Any]) -> Settings: ...
@overload
def resolve(preset: str, *layers: Mapping[str, Any], kind: type[S]) -> S: ...
def resolve(preset: str, *layers: Mapping[str, Any], kind: Any = Settings) -> Any:
    """A preset with layers over it, the last one winning; every value checked."""
    values: dict[str, Any] = {}
    for layer in layers:
        values |= check_values(layer, kind)
    settings = replace(preset_settings(preset, kind), **{k: v for k, v in values.items() if k != "preset"})
    return checked(settings)


def checked(settings: S) -> S:
    """The settings themselves, once what one value says of another is known to fit."""
    settings.check()
    return settings


def check_values(values: Mapping[str, Any], kind: type[TrainingSettings] = Settings) -> dict[str, Any]:
    """Settings by name, checked for name, type and least value."""
    table = {f.name: f for f in fields(kind)}
    checked = {}
    for name, value in values.items():
        if name not in table:
            close = difflib.get_close_matches(name, table, 1)
            raise InputError(f"there is no setting {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        checked[name] = _check_value(table[name], value)
    return checked


def _check_value(setting: Field[Any], value: Any) -> Any:
    default: Any = setting.default
    name, kind = setting.name, type(default)
    if default == ():
        value = tuple(v for v in ((value,) if isinstance(value, str) else value) if v != "")
        require(
            all(isinstance(v, str) and v.isprintable() for v in value), f"{name} must be printable text, got {value!r}"
        )
        return value
    if kind is tuple and isinstance(value, (int, float, list, tuple)) and not isinstance(value, bool):
        element = type(default[0])
        value = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if element is float:
            value = tuple(float(v) if type(v) is int else v for v in value)
        numbers, fits = value, bool(value) and all(type(v) is element for v in value)
    else:
        value = float(value) if kind is float and type(value) is int else value
        numbers, fits = (value,), type(value) is kind
    several = "numbers" if kind is tuple and type(default[0]) is float else "ints"
    expected = {
        tuple: f"{'a number' if several == 'numbers' else 'an int'} or a list of {several}",
        int: "an int",
        float: "a number",
        bool: "true or false",
    }
    require(fits, f"{name} must be {expected.get(kind, 'a string')}, got {value!r}")
    least, most = setting.metadata.get("least"), setting.metadata.get("most", sys.float_info.max)
    if least is not None:
        require(all(v >= least for v in numbers), f"{name} must be at least {least}, got {value!r}")
        require(all(v <= most for v in numbers), f"{name} must be at most {most:g}, got {value!r}")
    if kind is str:
        require(value.isprintable(), f"{name} must be printable text, got {value!r}")
    return value
