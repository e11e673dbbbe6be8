"""Named chains of preprocessing: a dict in the shard says what was done, `preprocess` does it again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coverfast.checks import InputError, check_choice, require
from coverfast.ingest.readers.decoded import Unreadable
from coverfast.ingest.resample import resample_to, to_dtype
from coverfast.samples import Original, Sample

# A plane belongs to the foreground's box when more than this part of it is foreground.
_PLANE = 1e-3
# More pixels than this are a mistake in a header or a setting.
_LARGEST = 2**31


@dataclass(frozen=True)
class Parameter:
    """A setting of a preset. kind: int, float or str, of each number where the default is a tuple. A default of
    None stands for "not done". least, most: the range of numbers; choices: of a str.
    """

    kind: type[int] | type[float] | type[str]
    default: int | float | str | tuple[int | float, ...] | None
    help: str
    least: float = -math.inf
    most: float = math.inf
    choices: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many numbers a value has."""
        return len(self.default) if isinstance(self.default, tuple) else 1


PRESETS: dict[str, dict[str, Parameter]] = {
    "raw": {
        "size": Parameter(int, None, "2D: scale the short side to this many pixels, centre-crop.", 1, 16384),
    },
    "chest-xray": {
        "size": Parameter(int, 512, "Pixels of each side.", 1, 16384),
        "fit": Parameter(
            str,
            "squash",
            "Make other shapes square by squashing them (as the paper), cropping the centre or padding.",
            choices=("squash", "crop", "pad"),
        ),
    },
    "brain-mr": {
        "shape": Parameter(int, (160, 160, 128), "Voxels along z, y, x.", 1, 4096),
        "threshold": Parameter(
            float, 0.1, "Foreground is brighter than this part of the way from percentile 1 to 99.", 0, 1
        ),
        "enlarge": Parameter(float, 2.0, "Voxels become no smaller than the finest spacing divided by this.", 0.1, 100),
    },
    "ct": {
        "spacing": Parameter(float, 1.0, "Mm from voxel to voxel on every axis.", 0.01, 100),
        "clip": Parameter(float, (0.0, 2048.0), "Values that become 0 and 1; beyond them is clipped.", -1e9, 1e9),
    },
}


def preprocessing(preset: str = "raw", **given: Any) -> dict[str, Any]:
    """The settings of a preset as a JSON-able dict, complete: what is not given, or None, is the default.

    `InputError`: an unknown preset or parameter, a value of another type or out of range.
    """
    require(isinstance(preset, str), f"preset must be a string, got {preset!r}")
    check_choice("preset", preset, tuple(PRESETS))
    parameters = PRESETS[preset]
    for name in given:
        has = f"it has {', '.join(parameters)}"
        require(name in parameters, f"{name} must be a parameter of the preset {preset}, {has}")
    settings = {"preset": preset} | {
        name: _checked(name, parameter, given.get(name)) for name, parameter in parameters.items()
    }
    if preset == "ct":
        low, high = settings["clip"]
        require(low < high, f"clip must be two numbers, the lower one first, got {low:g} {high:g}")
    return settings


def _checked(name: str, parameter: Parameter, value: Any) -> Any:
    value = parameter.default if value is None else value
    if value is None:
        return None
    if parameter.kind is str:
        require(isinstance(value, str), f"{name} must be one of {', '.join(parameter.choices)}, got {value!r}")
        check_choice(name, value, parameter.choices)
        return value
    several = parameter.count > 1
    numbers = list(value) if several and isinstance(value, list | tuple) else [value]
    kinds = (int,) if parameter.kind is int else (int, float)
    ok = len(numbers) == parameter.count and all(
        isinstance(v, kinds) and not isinstance(v, bool) and parameter.least <= v <= parameter.most for v in numbers
    )
    one, many = ("an int", "ints") if parameter.kind is int else ("a number", "numbers")
    what = f"{parameter.count} {many}" if several else one
    require(ok, f"{name} must be {what} from {parameter.least:.16g} to {parameter.most:.16g}, got {value!r}")
    numbers = [parameter.kind(v) for v in numbers]
    return numbers if several else numbers[0]


def preprocess(sample: Sample, settings: dict[str, Any]) -> Sample:
    """Do to a sample as read what `settings`, of `preprocessing` or of a shard, say; the same again every time.

    The result keeps source, group, split and target; spacing and `original` say where its pixels lie. Labels go to the
    same grid, each pixel from the nearest one, 0 beyond the image. `raw` without a size returns the sample.
    `InputError`: settings that are none; as `Unreadable`, a sample of another dimension than the
    preset's, or one that has no pixels on the new grid or too many.
    """
    require(
        isinstance(settings, dict) and "preset" in settings and all(isinstance(key, str) for key in settings),
        f"preprocessing must be a dict with a preset, got {settings!r:.80}",
    )
    chosen = preprocessing(**settings)
    result = _CHAINS[chosen.pop("preset")](sample, **chosen)
    return result if sample.labels is None or result is sample else _with_labels(result, sample)


def _with_labels(result: Sample, sample: Sample) -> Sample:
    """`result` with the labels of the sample it was made of, by the way that its pixels went."""
    assert sample.labels is not None
    assert result.original is not None
    ndim = sample.labels.ndim
    before = np.eye(ndim + 1) if sample.original is None else sample.original.to_original
    to_old = np.linalg.solve(before, result.original.to_original)
    step, origin = to_old.diagonal()[:ndim], to_old[:ndim, ndim]
    size = result.pixels.shape[1:]
    labels = resample_to(sample.labels[None], size, step.tolist(), origin.tolist(), order=0, fill=lambda inside: 0)
    return replace(result, labels=labels[0])


def _raw(sample: Sample, size: int | None) -> Sample:
    if size is None:
        return sample
    shape = sample.pixels.shape
    if len(shape) != 3:
        raise Unreadable(f"size is for 2D images, {sample.source} is {len(shape) - 1}D, shape {shape}")
    return _square(sample, size, "crop")


def _chest_xray(sample: Sample, size: int, fit: str) -> Sample:
    _check_ndim(sample, "chest-xray", 2)
    return _square(sample, size, fit)


def _square(sample: Sample, size: int, fit: str) -> Sample:
    sides = sample.pixels.shape[1:]
    covered = sides if fit == "squash" else (max(sides) if fit == "pad" else min(sides),) * 2
    step = [side / size for side in covered]
    origin = [(old - new) / 2 + (s - 1) / 2 for old, new, s in zip(sides, covered, step, strict=True)]
    result = _on_grid(sample, (size, size), step, origin)
    eight_bit = sample.pixels.dtype == np.uint8 and (sample.slope, sample.intercept) == (1.0, 0.0)
    return result if eight_bit else _min_max(result)


def _brain_mr(sample: Sample, shape: Sequence[int], threshold: float, enlarge: float) -> Sample:
    _check_ndim(sample, "brain-mr", 3)
    box = _foreground(sample, threshold)
    sizes = [(stop - start) * mm for (start, stop), mm in zip(box, sample.spacing, strict=True)]
    voxel = max(*(mm / count for mm, count in zip(sizes, shape, strict=True)), min(sample.spacing) / enlarge)
    step = [voxel / mm for mm in sample.spacing]
    centre = [(start + stop - 1) / 2 for start, stop in box]
    origin = [c - s * (count - 1) / 2 for c, s, count in zip(centre, step, shape, strict=True)]
    return _min_max(_on_grid(sample, shape, step, origin))


def _foreground(sample: Sample, threshold: float) -> list[tuple[int, int]]:
    """Start and stop of the foreground's box along each axis; all of the image where nothing stands out."""
    try:
        from scipy.ndimage import uniform_filter
    except ImportError as error:
        raise InputError("the preset brain-mr needs the extra: pip install coverfast[io]") from error
    found: NDArray[Any] = np.zeros(sample.pixels.shape[1:], bool)
    for channel in sample.pixels:
        values = channel.astype(np.float32)
        if sample.slope < 0:
            np.negative(values, out=values)
        low = np.percentile(values, 1)
        above = values[values > low]
        if above.size:
            level = low + threshold * (np.percentile(above, 99) - low)
            # A voxel of noise stands alone: its surroundings must be bright too.
            found |= (values > level) & (uniform_filter(values, 3, mode="nearest") > level)
    box: list[tuple[int, int]] = []
    for axis, count in enumerate(found.shape):
        filled = found.sum(axis=tuple(a for a in range(3) if a != axis))
        planes = np.flatnonzero(filled > _PLANE * found.size / count)
        box.append((int(planes[0]), int(planes[-1]) + 1) if planes.size else (0, count))
    return box


def _ct(sample: Sample, spacing: float, clip: Sequence[float]) -> Sample:
    _check_ndim(sample, "ct", 3)
    step = [spacing / mm for mm in sample.spacing]
    size = [max(1, round(old / s)) for old, s in zip(sample.pixels.shape[1:], step, strict=True)]
    result = _on_grid(sample, size, step, [(s - 1) / 2 for s in step])
    low, high = clip
    # Fewer than 256 whole steps would show; then fractions are kept.
    whole = low.is_integer() and high.is_integer() and low >= -32768 and high <= 32767 and high - low >= 256
    pixels = np.empty(result.pixels.shape, np.int16 if whole else np.float32)
    for plane in np.ndindex(pixels.shape[:2]):  # a plane at a time: float64 of a whole CT would take gigabytes
        values = result.pixels[plane].astype(np.float64) * sample.slope + sample.intercept
        pixels[plane] = to_dtype(np.clip(values, low, high), pixels.dtype)
    return replace(result, pixels=pixels, slope=1.0, intercept=0.0, lo=low, hi=high)


def _check_ndim(sample: Sample, preset: str, ndim: int) -> None:
    if (found := sample.pixels.ndim - 1) != ndim:
        raise Unreadable(f"{sample.source} must be {ndim}D for the preset {preset}, got {found}D")


def _on_grid(sample: Sample, size: Sequence[int], step: Sequence[float], origin: Sequence[float]) -> Sample:
    """The sample on another grid, see `resample_to`, with its spacing and place; lo and hi are as they were."""
    channels, ndim = len(sample.pixels), len(size)
    if channels * math.prod(size) > _LARGEST:
        raise Unreadable(
            f"{sample.source} must have at most {_LARGEST:,} pixels after preprocessing, "
            f"got {'x'.join(map(str, (channels, *size)))} with spacing {sample.spacing} mm"
        )
    # Headers hold 1 mm as 0.9999999: less than a thousandth of a pixel in all moves nothing, so no pixel is touched.
    same = [abs(s - 1) * count < 1e-3 for s, count in zip(step, size, strict=True)]
    origin = [math.ceil(o - 0.5) if like else o for o, like in zip(origin, same, strict=True)]
    step = [1.0 if like else s for s, like in zip(step, same, strict=True)]
    darkest: Callable[[NDArray[Any]], Any] = np.max if sample.slope < 0 else np.min
    try:
        pixels = resample_to(sample.pixels, size, step, origin, fill=darkest)
    except InputError as error:
        if isinstance(error.__cause__, ImportError):
            raise
        # A strip thinner than a new pixel can lie between two of them.
        raise Unreadable(f"{sample.source}: {error}") from None
    to_old = np.diag([*step, 1.0])
    to_old[:ndim, ndim] = origin
    original = sample.original or Original(sample.pixels.shape[1:], np.eye(ndim + 1))
    return replace(
        sample,
        pixels=pixels,
        spacing=tuple(mm * s for mm, s in zip(sample.spacing, step, strict=True)),
        original=replace(original, to_original=original.to_original @ to_old),
    )


def _min_max(sample: Sample) -> Sample:
    ends = [float(v) * sample.slope + sample.intercept for v in (sample.pixels.min(), sample.pixels.max())]
    return replace(sample, lo=min(ends), hi=max(ends))


_CHAINS: dict[str, Callable[..., Sample]] = {
    "raw": _raw,
    "chest-xray": _chest_xray,
    "brain-mr": _brain_mr,
    "ct": _ct,
}
