"""What a report shows of one sample of any method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from coverfast.checks import InputError, require
from coverfast.report.colours import Array
from coverfast.report.pictures import Pictures, Plane

if TYPE_CHECKING:
    from coverfast.methods import Shown


@dataclass(frozen=True)
class Gallery:
    """A `coverfast.methods.Shown` in numpy arrays, float32. Raises `InputError` if its shapes do not fit together.

    Attributes:
        images: by their titles, `(C, *S)` in [0, 1]; C may differ from image to image.
        overlays: by their titles, two images `(C, *S)` each.
        fields: by their titles, displacements `(n, *S)` in pixels; n the length of `S`.
        text: a sentence on what they say of the sample, may be empty.
        help: how to look at them, may be empty.
    """

    images: Mapping[str, Array]
    overlays: Mapping[str, tuple[Array, Array]]
    fields: Mapping[str, Array]
    text: str = ""
    help: str = ""

    @classmethod
    def of(cls, shown: Shown) -> Gallery:
        """From tensors on any device, of any type."""
        images = {title: _array(image) for title, image in shown.images.items()}
        fields = {title: _array(field) for title, field in shown.fields.items()}
        overlays = {}
        for title, pair in shown.overlays.items():
            two = isinstance(pair, tuple | list) and len(pair) == 2
            require(
                two, f"overlay {title!r} must be two images, got {len(pair) if hasattr(pair, '__len__') else pair!r}"
            )
            overlays[title] = (_array(pair[0]), _array(pair[1]))
        return cls(images, overlays, fields, shown.text, shown.help)

    def __post_init__(self) -> None:
        images = [(f"image {title!r}", image) for title, image in self.images.items()]
        images += [(f"overlay {title!r}", image) for title, pair in self.overlays.items() for image in pair]
        fields = [(f"field {title!r}", field) for title, field in self.fields.items()]
        require(len(images) + len(fields) > 0, "pictures must hold at least one image, overlay or field, got none")
        for title in (*self.images, *self.overlays, *self.fields):
            named = isinstance(title, str) and bool(title.strip())
            require(named, f"a picture must have a title, got {title!r}")
        for what, array in (*images, *fields):
            good = array.ndim in (3, 4) and array.size > 0
            require(good, f"{what} must be (C, *S) with 2 or 3 spatial axes, got shape {array.shape}")
            same = array.shape[1:] == self.size
            require(
                same, f"{what} must be on the grid of {(*images, *fields)[0][0]}, {self.size}, got {array.shape[1:]}"
            )
        for what, field in fields:
            n = len(self.size)
            require(len(field) == n, f"{what} must have {n} components, one a spatial axis, got {len(field)}")

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(next(iter(self._pictures)).shape[1:])

    @property
    def _pictures(self) -> list[Array]:
        overlaid = [image for pair in self.overlays.values() for image in pair]
        return [*self.images.values(), *overlaid, *self.fields.values()]

    @property
    def planes(self) -> list[Plane]:
        """All of an image; of a volume three orthogonal slices through the middle of the first one's edges."""
        if len(self.size) == 2:
            return [Plane()]
        edges = _centre(self._pictures[0])
        return [Plane(axis, edges[axis], self.size[axis]) for axis in range(3)]

    def summary(self) -> str:
        """The method's own sentence, or else how much there is to see."""
        count = len(self.images) + len(self.overlays) + len(self.fields)
        return self.text or f"{count} picture{'s' * (count != 1)}"


def on_host(seen: Any) -> Pictures | Gallery | None:
    """What a method's `pictures` gave, checked and in numpy: of COVER `Pictures`, of any other a `Gallery`.

    `InputError` where it is nothing that a report can show.
    """
    from coverfast.methods import Shown

    if seen is None or isinstance(seen, Pictures | Gallery):
        return seen
    if isinstance(seen, Shown):
        return Gallery.of(seen)
    if isinstance(seen, Mapping) and "dvf_true" in seen:
        return Pictures.of(seen)
    raise InputError(f"pictures of a method must be a coverfast.methods.Shown or None, got {type(seen).__name__}")


def _array(value: Any) -> Array:
    if hasattr(value, "detach"):
        value = value.detach().float().cpu()
    return np.asarray(value, dtype=np.float32)


def _centre(image: Array) -> list[int]:
    """Mean place of the edges of a volume `(C, *S)`, by axis; the middle where it has none."""
    grey = np.nan_to_num(image).mean(axis=0, dtype=np.float64)
    squares = np.zeros_like(grey)
    for axis, size in enumerate(grey.shape):
        if size > 1:
            squares += np.gradient(grey, axis=axis) ** 2
    edges = np.sqrt(squares)
    middle = []
    for axis, size in enumerate(grey.shape):
        profile = edges.sum(axis=tuple(a for a in range(grey.ndim) if a != axis))
        total = profile.sum()
        middle.append(int(np.rint(profile @ np.arange(size) / total)) if total > 0 else size // 2)
    return middle
