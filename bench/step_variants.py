"""What a training step is measured on, and the ways to do it: as coverfast does, and as published code does.

Batches come from the memory of the host as stored integers; reading them is not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.profiler import record_function

from coverfast.bench import published_step
from coverfast.bench.problems import IMAGES
from coverfast.bench.published_step import Published, Seen
from coverfast.checks import InputError, require
from coverfast.geometry import level_size
from coverfast.image_stream import Images, ImageStream
from coverfast.loader import _ahead
from coverfast.methods import Method
from coverfast.methods.cover import Cover
from coverfast.shard_reader import Allocate
from coverfast.training.assembly import build_method, crop_of
from coverfast.training.data import batches
from coverfast.training.engine import Engine
from coverfast.training.settings import Settings, checked, preset_ndim, preset_settings, resolve

OURS = "coverfast"
#: What the words behind `OURS` change.
WORDS: dict[str, dict[str, Any]] = {
    "eager": {"compile": False, "cuda_graphs": False},
    "compiled": {"compile": True},
    "graphs": {"compile": True, "cuda_graphs": True},
    "float32": {"precision": "float32"},
    "bfloat16": {"precision": "bfloat16"},
    "contiguous": {"layout": "contiguous"},
    "channels_last": {"layout": "channels_last"},
    "recompute": {"recompute": True},
}
#: Ours without anything that changes a number.
PLAIN = f"{OURS} eager float32"
#: The baselines by name: which matching, and whether the views are made in every step.
PUBLISHED = {f"published {way}{rest}": (way, not rest) for rest in ("", ", views ready") for way in "AB"}
DEFAULT = (OURS, PLAIN, "published A", "published B")

#: Iterations whose batches there are.
_BATCHES = 4


def check_variant(name: str, settings: Sequence[Settings] = ()) -> None:
    """Refuse a name that is none, or one of published code where there are settings of another method than cover."""
    first, *words = name.split() or [""]
    if name not in PUBLISHED and (first != OURS or any(word not in WORDS for word in words)):
        raise InputError(
            f"against must be one of {', '.join(PUBLISHED)}, or {OURS} and any of the words {', '.join(WORDS)}, got "
            f"{name!r}"
        )
    others = [s for s in settings if s.method != "cover" and name in PUBLISHED]
    if others:
        raise InputError(
            f"against must be {OURS} with or without words for {others[0].preset}, since the published code is that of "
            f"the method cover, got {name!r}"
        )


def default_variants(s: Settings) -> tuple[str, ...]:
    """Those that are measured where nobody asks for others."""
    return tuple(name for name in DEFAULT if name not in PUBLISHED or s.method == "cover")


def levels_of(s: Settings) -> int:
    """Levels of the U-Net."""
    return len(s.unet_channels()) // 2 + 1


def problems(
    presets: Sequence[str],
    crops: Sequence[tuple[int, ...]] = (),
    *,
    batch: int | None = None,
    precision: str | None = None,
    only_fitting: bool = False,
) -> list[Settings]:
    """The settings of every preset with every crop of as many axes, or of a single int for all of them.

    precision: of the variants that name none. only_fitting: presets that no crop fits are left out. `InputError`: a
    crop that fits no preset, and a preset without one.
    """
    require(precision in (None, "float32", "bfloat16"), f"dtype must be float32 or bfloat16, got {precision!r}")
    values = {name: value for name, value in {"batch": batch, "precision": precision}.items() if value is not None}
    found: list[Settings] = []
    unused = list(dict.fromkeys(crops))
    for preset in dict.fromkeys(presets):
        ndim = preset_ndim(preset_settings(preset).preset)
        fits = [crop for crop in dict.fromkeys(crops) if len(crop) in (1, ndim)]
        unused = [crop for crop in unused if crop not in fits]
        missing = bool(crops) and not fits and not only_fitting
        require(not missing, f"sizes must have a crop of {ndim} axes, or a single int, for {preset}, got {list(crops)}")
        layers = [values | {"crop": crop} for crop in fits] if crops else [values]
        found += [resolve(preset, layer) for layer in layers]
    require(not unused, f"sizes must be crops for one of {', '.join(presets)}, got {unused[:1]}")
    for s in found:
        level_size(crop_of(s, preset_ndim(s.preset)), levels_of(s))
    return found


def settings_of(s: Settings, variant: str) -> Settings:
    """The settings of a variant of ours: those given, as its words change them."""
    for word in variant.split()[1:]:
        s = replace(s, **WORDS[word])
    return checked(s)


class Problem:
    """Stored images in memory, larger than the crop as those of the preset are, the same for all variants.

    It takes the place of a `ShardSet`.
    """

    def __init__(self, s: Settings) -> None:
        self.settings, self.ndim = s, preset_ndim(s.preset)
        self.crop = crop_of(s, self.ndim)
        grown = zip(self.crop, IMAGES[s.preset], crop_of(preset_settings(s.preset), self.ndim), strict=True)
        size, count = tuple(-(-c * image // whole) for c, image, whole in grown), 2 * s.batch
        kind, largest = (np.uint8, 255) if self.ndim == 2 else (np.uint16, 4095)
        self.images: NDArray[Any] = np.random.default_rng(1).integers(0, largest + 1, (count, 1, *size), kind)
        self.range = 0.0, float(largest)
        self.sizes, self.scaling = np.tile(size, (count, 1)), np.tile([1.0, 0.0, *self.range], (count, 1))

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, index: int, regions: Sequence[Any], allocate: Allocate) -> list[NDArray[Any]]:
        """As `ShardSet.pixels`."""
        parts = []
        for number, region in enumerate(regions):
            found = self.images[(index, slice(None), *region)]
            parts.append(allocate(number, found.shape, found.dtype))
            parts[-1][tuple(map(slice, found.shape))] = found
        return parts

    def targets_if_alike(self) -> NDArray[np.int64]:
        """As `ShardSet.targets_if_alike`: the images are of no class."""
        return np.full(len(self), -1, np.int64)

    def loaded(self, method: Method, iteration: int) -> Images:
        """What the loader gives: the parts of the images, or pairs, that the method asks for."""
        data: Any = self
        of: dict[str, Any] = {"regions": method.regions, "pairs": method.pairs}
        return ImageStream(data, batch=self.settings.batch, seed=self.settings.seed, **of).load(iteration)

    def published_views(self, method: Method, iteration: int, device: torch.device) -> Callable[[], Seen]:
        """What makes views of the same images as published code does."""
        images = self.images[self.loaded(method, iteration).indices.numpy()]
        ranges, views = [self.range] * len(images), self.settings.views()
        of: dict[str, Any] = {"seed": self.settings.seed, "iteration": iteration, "device": device}
        return partial(published_step.make_views, images, ranges, self.crop, views, **of)


class Runner(NamedTuple):
    """A variant that is set up: `step` trains once. dtype: of the convolutions. engine: of ours."""

    step: Callable[[], object]
    dtype: torch.dtype
    facts: dict[str, Any]
    engine: Engine | None = None


def set_up(problem: Problem, variant: str, device: torch.device) -> Runner:
    """A variant ready to step."""
    method = build_method(problem.settings, problem.ndim, 1)
    if variant in PUBLISHED:
        assert isinstance(method, Cover)
        return _published(problem, method, variant, device)
    engine = Engine(method, settings_of(problem.settings, variant), device)
    engine.method.train()
    loaded = [problem.loaded(method, i) for i in range(1, _BATCHES + 1)]
    if device.type == "cuda":
        loaded = [found._replace(images=found.images.pin_memory()) for found in loaded]
    ahead = batches(_ahead(cycle(loaded), device), problem.settings.seed, print)

    def step() -> object:
        with record_function("data"):
            batch = next(ahead)
        return engine.step(batch)

    facts = {
        "precision": engine.choices.precision,
        "layout": engine.choices.layout,
        "compiled": engine.settings.compile,
    }
    low = engine.choices.precision == "bfloat16"
    return Runner(step, torch.bfloat16 if low else torch.float32, facts, engine)


def _published(problem: Problem, method: Cover, variant: str, device: torch.device) -> Runner:
    matching, views = PUBLISHED[variant]
    makers = cycle([problem.published_views(method, i, device) for i in range(1, _BATCHES + 1)])
    loop = Published(method, problem.settings, device, matching)
    ready = None if views else next(makers)()

    def step() -> object:
        if ready is not None:
            return loop.step(ready)
        with record_function("views"):
            seen = next(makers)()
        return loop.step(seen)

    return Runner(step, torch.float32, {"precision": "float32", "layout": "contiguous", "compiled": False})
