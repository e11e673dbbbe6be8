"""Networks of other libraries, and of users, as backbones."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm

from coverfast.backbones.base import Backbone, check_levels, title
from coverfast.checks import InputError, per_axis, shape_of
from coverfast.own_code import refusing

#: Maps of a network, coarse to fine.
Run = Callable[[Any, Tensor], Sequence[Tensor]]


class Adapted(Backbone):
    """A network that is not ours, as a backbone; channels and strides are those of what it returns.

    Args:
        model: the network. Its weights travel under its own names, see `core`.
        run: gives the feature maps of a batch of images, coarse to fine.
        description: see `Backbone`.
        size: the only size of image that it takes, one for all axes or one an axis; None where any will do that its
            coarsest stride divides. Its maps are measured on such an image, of 128 an axis where any will do.

    Attributes:
        image_size: the only size of image that it takes, one an axis, or None.

    Raises:
        InputError: when the network does not take such an image, or what it returns is no pyramid.
    """

    def __init__(
        self, model: nn.Module, run: Run, description: Mapping[str, Any], *, size: int | Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.model, self.run, self._description = model, run, dict(description)
        self.ndim, self.in_channels = int(description["ndim"]), int(description["in_channels"])
        self.image_size = None if size is None else per_axis("the size of its images", size, self.ndim)
        self.feature_channels, self.strides = self._measured(self.image_size or (128,) * self.ndim)
        if self._description["kind"] == "own":  # other libraries have attributes of these names that say something else
            for own in ("feature_channels", "strides"):
                measured = getattr(self, own)
                said = tuple(getattr(model, own, measured))
                if said != measured:
                    raise InputError(
                        f"{own} of {title(self._description)} must be those of its maps, {measured}, got {said}"
                    )

    @property
    def core(self) -> nn.Module:
        """See `Backbone`."""
        return self.model

    @property
    def description(self) -> dict[str, Any]:
        """See `Backbone`."""
        return dict(self._description)

    @property
    def mixes_samples(self) -> bool:
        """Whether it has batch norms: its features then depend on what else is in a batch while it learns."""
        return any(isinstance(m, _BatchNorm) for m in self.modules())

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features of images `(B, in_channels, *S)`, coarse to fine; `S` divisible by the coarsest stride."""
        self.check_image(x)
        self.check_size("image", x.shape[2:])
        return list(self.run(self.model, x))

    def check_size(self, name: str, size: Sequence[int]) -> None:
        """See `Backbone`."""
        if self.image_size is not None and tuple(size) != self.image_size:
            raise InputError(
                f"{name} must have the one size that {title(self._description)} takes, {self.image_size}, which an "
                f"argument of the network may set, got {tuple(int(s) for s in size)}"
            )
        super().check_size(name, size)

    def check_maps(self, size: Sequence[int]) -> None:
        """Refuse a network whose maps do not follow the size of the image."""
        found = self._measured(tuple(size))
        if found != (self.feature_channels, self.strides):
            raise InputError(
                f"{title(self._description)} must return maps of strides {self.strides} for images of any size, but "
                f"for {'x'.join(map(str, size))} they are {found[1]}"
            )

    def _measured(self, size: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        name, shown = title(self._description), "x".join(map(str, size))
        images = f"images of {self.in_channels} channel(s) and {self.ndim} axes, {shown} for one"
        if self.image_size is None and self._description["kind"] == "own":
            images += " (a network for one size alone has the attribute image_size)"
        lazy = any(isinstance(p, nn.parameter.UninitializedParameter) for p in self.model.parameters())
        if lazy:
            raise InputError(
                f"{name} must have weights of known shapes, but some are lazy; pass an image through it first"
            )
        with refusing(f"{name} must take {images}"), torch.no_grad():
            try:
                found = without_values(self.model, self.run, (1, self.in_channels, *size))[1]
            except Exception:
                if self._description["kind"] != "own":
                    raise
                # Some look at values or leave torch: these see a real image, of zeros.
                size = self.image_size or (64,) * self.ndim
                found = self.run(copy.deepcopy(self.model).eval(), torch.zeros(1, self.in_channels, *size))
        maps = list(found) if isinstance(found, (list, tuple)) else []
        whole = bool(maps) and all(isinstance(f, Tensor) and f.ndim == self.ndim + 2 for f in maps)
        if not whole:
            raise InputError(
                f"{name} must return a list of feature maps (B, C, *S), coarse to fine, got {_told(found)}"
            )
        strides = [{a / b for a, b in zip(size, f.shape[2:], strict=True)} for f in maps]
        if not all(len(s) == 1 and min(s) == int(min(s)) for s in strides):
            raise InputError(
                f"{name} must return maps whose size divides that of the image by one number on all axes, got "
                f"{[shape_of(f)[2:] for f in maps]} for {shown}"
            )
        channels, found_strides = tuple(int(f.shape[1]) for f in maps), tuple(int(min(s)) for s in strides)
        check_levels(name, channels, found_strides)
        return channels, found_strides


def without_values(model: nn.Module, run: Run, shape: tuple[int, ...]) -> tuple[nn.Module, Any]:
    """A copy of a network without values, evaluating, and the maps without values that it makes of such images.

    The network itself stays as it is: some keep what they computed, for the next image.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(mode):
        twin = copy.deepcopy(model).eval()
    log = logging.getLogger("torch._subclasses.fake_tensor")  # tells of every failure, beside raising it
    was, log.disabled = log.disabled, True
    try:
        with mode:
            return twin, run(twin, torch.empty(shape))
    finally:
        log.disabled = was


class Nothing(nn.Module):
    """In the place of a part of a network that the maps do not need."""

    def forward(self, x: Any, *_: Any) -> Any:
        """The same."""
        return x


def stripped(backbone: Adapted) -> Adapted:
    """The backbone without those parts of its network that its maps do not need, such as heads.

    Parts are modules all of whose weights get no gradient from any map.
    """
    model, run = backbone.model, backbone.run
    with torch.enable_grad():
        shape = (1, backbone.in_channels, *(backbone.image_size or (128,) * backbone.ndim))
        twin, maps = without_values(model, run, shape)
    needed, nodes, todo = set(), set(), [f.grad_fn for f in maps]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            needed.add(id(getattr(node, "variable", None)))
            todo += [before for before, _ in node.next_functions]
    out: tuple[str, ...] = ()
    for name, module in twin.named_modules(remove_duplicate=False):
        weights = {id(p) for p in module.parameters()}
        if weights and not weights & needed and not name.startswith(out):
            model.set_submodule(name, Nothing())
            out += (f"{name}.",)
    return Adapted(model, run, backbone.description, size=backbone.image_size)  # which shows that nothing is missed


def _told(found: object) -> str:
    if isinstance(found, Tensor):
        return f"a tensor of shape {shape_of(found)}"
    if isinstance(found, (list, tuple)):
        return str([shape_of(f) if isinstance(f, Tensor) else type(f).__name__ for f in found])
    return type(found).__name__
