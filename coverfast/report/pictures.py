"""What a report shows of one sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from coverfast.checks import require
from coverfast.report.colours import Array

_AXES = "zyx"


@dataclass(frozen=True)
class Plane:
    """A plane that is shown: all of an image (axis None), or a slice of a volume across an axis.

    index: of the slice. size: of the volume along the axis.
    """

    axis: int | None = None
    index: int = 0
    size: int = 1

    def cut(self, array: Array) -> Array:
        """`(C, rows, columns)` of `(C, *S)`; S may be that of any level."""
        if self.axis is None:
            return array
        return np.take(array, self.index * array.shape[1 + self.axis] // self.size, axis=1 + self.axis)

    def within(self, vectors: Array) -> Array:
        """The two components `(..., 2)` in the plane of vectors `(..., n)`."""
        return vectors if self.axis is None else np.delete(vectors, self.axis, axis=-1)

    def field(self, dvf: Array) -> Array:
        """The displacement in the plane, `(2, rows, columns)`, of a field `(n, *S)`."""
        cut = self.cut(dvf)
        return cut if self.axis is None else np.delete(cut, self.axis, axis=0)

    def shape(self, size: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of the plane in an image of `size`."""
        rows, columns = (s for axis, s in enumerate(size) if axis != self.axis)
        return rows, columns

    @property
    def name(self) -> str:
        return "" if self.axis is None else f"{_AXES[self.axis]} = {self.index}"


@dataclass(frozen=True)
class Pictures:
    """One sample, as numpy arrays without a batch axis; `S` is `(H, W)` or `(D, H, W)`, n its length.

    Lists have an entry for each of L levels, coarse to fine; `S_l` is `S` over the level's stride. Raises `InputError`
    if the shapes do not fit together.

    Attributes:
        x_a: view a, `(C, *S)`, in [0, 1].
        x_b: view b.
        dvf_true: `(n, *S)`, px, on the grid of b, pointing into a.
        mask: `(1, *S)`, True where the truth points inside a.
        dvf_levels: the predictions, `(n, *S_l)`, each in the pixels of its own level.
        warped: `x_a` warped by each level's prediction brought to full size, `(C, *S)`.
        features_a: maps of view a, `(C_l, *S_l)`.
        features_b: those of view b.
        centre: `(n,)`, pixel that the shown slices of a volume pass through.
        points: `(K, n)`, marked pixels of view b.
        similarity: weights of the window at the points, `(K, *window_l)`, in view a about where the level above points.
        vectors: `(K, n)`, the mean offsets under them, px of the level.
        vectors_true: `(K, n)`, what would have been right; NaN where nothing would.
        windows: `(K, n)`, where in view a these windows lie, px of the image.
        dvf_found: the finest prediction in pixels of the image, `(n, *S)`; None where it is that of the finest level.
    """

    x_a: Array
    x_b: Array
    dvf_true: Array
    mask: Array
    dvf_levels: Sequence[Array]
    warped: Sequence[Array]
    features_a: Sequence[Array]
    features_b: Sequence[Array]
    centre: Array
    points: Array
    similarity: Sequence[Array]
    vectors: Sequence[Array]
    vectors_true: Sequence[Array]
    windows: Sequence[Array]
    dvf_found: Array | None = None

    @classmethod
    def of(cls, seen: Mapping[str, Any]) -> Pictures:
        """From what `Cover.pictures` gives, tensors on any device."""

        def array(value: Any) -> Array:
            return np.asarray(value.cpu() if hasattr(value, "cpu") else value)

        found: dict[str, Any] = {f.name: seen[f.name] for f in fields(cls) if f.name in seen}
        for name, value in found.items():
            found[name] = [array(x) for x in value] if isinstance(value, list) else array(value)
        return cls(**found)

    def __post_init__(self) -> None:
        require(self.x_a.ndim in (3, 4), f"x_a must be (C, *S) with 2 or 3 spatial axes, got {self.x_a.shape}")
        require(len(self.dvf_levels) >= 1, "dvf_levels must hold at least one level, got none")
        size, n, levels = self.size, len(self.size), len(self.dvf_levels)
        count = len(self.points)
        expected: dict[str, tuple[Any, ...]] = {
            "x_b": self.x_a.shape,
            "dvf_true": (n, *size),
            "mask": (1, *size),
            "dvf_levels": (n, "level"),
            "warped": self.x_a.shape,
            "features_a": ("any", "level"),
            "features_b": ("any", "level"),
            "centre": (n,),
            "points": (count, n),
            "similarity": (count, *["any"] * n),
            "vectors": (count, n),
            "vectors_true": (count, n),
            "windows": (count, n),
        }
        if self.dvf_found is not None:
            expected["dvf_found"] = (n, *size)
        for name, shape in expected.items():
            value = getattr(self, name)
            listed = isinstance(value, list | tuple)
            if listed:
                require(len(value) == levels, f"{name} must have {levels} entries, one a level, got {len(value)}")
            for level, array in enumerate(value if listed else [value]):
                stride = self.stride(level)
                full = [d for s in shape for d in ([s // stride for s in size] if s == "level" else [s])]
                fits = array.ndim == len(full) and all(f in ("any", s) for f, s in zip(full, array.shape, strict=True))
                wanted = "(" + ", ".join(map(str, full)) + ")"
                require(fits, f"{name}{f'[{level}]' * listed} must have shape {wanted}, got {array.shape}")
        inside = (self.centre >= 0).all() and (self.centre < np.array(size)).all()
        inside = inside and (self.points >= 0).all() and (self.points < np.array(size)).all()
        require(bool(inside), f"centre and points must lie in an image of {size}")

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self.x_a.shape[1:])

    def stride(self, level: int) -> int:
        """Pixels of the image per pixel of a level."""
        finest = 1 if self.dvf_found is None else max(1, self.size[0] // self.dvf_levels[-1].shape[1])
        return int(finest * 2 ** (len(self.dvf_levels) - 1 - level))

    @property
    def prediction(self) -> Array:
        """The finest prediction at the size of the image, `(n, *S)`, px of the image."""
        return self.dvf_levels[-1] if self.dvf_found is None else self.dvf_found

    @property
    def planes(self) -> list[Plane]:
        """All of an image; three orthogonal slices of a volume."""
        if len(self.size) == 2:
            return [Plane()]
        return [Plane(axis, int(self.centre[axis]), self.size[axis]) for axis in range(3)]

    def plane_of(self, point: int) -> Plane:
        """The shown plane that a marked pixel lies on; otherwise a slice through it."""
        for plane in self.planes:
            if plane.axis is None or self.points[point][plane.axis] == plane.index:
                return plane
        return Plane(0, int(self.points[point][0]), self.size[0])

    def end_point(self) -> tuple[float, float]:
        """End-point error of the finest prediction inside the mask, px, and its ratio to that of no displacement.

        NaN where there is nothing inside.
        """
        inside = self.mask[0].astype(bool)

        def mean(dvf: Array) -> float:
            lengths = np.sqrt((dvf.astype(np.float64) ** 2).sum(axis=0))[inside]
            return float(lengths.mean()) if lengths.size else float("nan")

        still, error = mean(self.dvf_true), mean(self.prediction - self.dvf_true)
        return error, error / still if still > 0 else float("nan")

    def summary(self) -> str:
        """`end_point` in words."""
        error, ratio = self.end_point()
        return f"error {error:.2f} px, ratio {ratio:.2f}" if self.mask.any() else "no pixel in both views"
