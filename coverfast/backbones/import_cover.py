"""Checkpoints of the COVER authors' training script, as backbone and pyramid of ours.

Built from the layout of their keys. Theirs interleave the groups of a projection: channel `c` is feature `c // J` of
group `c % J`, where ours are contiguous.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coverfast.backbones.reports import LoadReport
from coverfast.backbones.unet import UNet
from coverfast.checks import InputError, require, shape_of
from coverfast.disk import explained
from coverfast.pyramid import DEFAULT_WINDOW, VectorPyramid

#: The offsets of the window, which ours makes from its size.
_GRID = "mov.grid"
#: Sizes of a tensor, None where nothing tells them.
Sizes = tuple[int | None, ...]


@dataclass(frozen=True)
class Imported:
    """A checkpoint as networks of ours, on the CPU, in evaluation mode.

    Attributes:
        backbone: the U-Net.
        pyramid: the projections of the vector pyramid, their channels permuted to contiguous groups.
        report: what became of the checkpoint's tensors, in its own names.
        notes: sentences on what was left out, converted or assumed.
        sha256: of the file.
    """

    backbone: UNet
    pyramid: VectorPyramid
    report: LoadReport
    notes: list[str]
    sha256: str


def import_cover(path: str | Path, *, head_dim: int = 8) -> Imported:
    """Read a checkpoint of the authors' training script; nothing in it is executed.

    Args:
        path: of the checkpoint: a state dict, or a dict with one under "state_dict".
        head_dim: channels of a group, which no tensor tells; 8 is the paper's.

    Raises:
        InputError: when it cannot be read, holds other things than tensors and plain values, or its tensors are not
            all of those of one network.
    """
    path = Path(path)
    require(head_dim >= 1, f"head_dim must be at least 1, got {head_dim}")
    loaded, sha256 = _read(path)
    state, notes = _state_of(loaded, path)
    grid = state.pop(_GRID, None)
    layout = _Layout(state)
    report = layout.report
    require(report.whole, f"{path} does not have the authors' layout: {report}")
    notes += _conversions(state, path)
    backbone, pyramid, note = _networks(layout, grid, head_dim, path)
    return Imported(backbone.eval(), pyramid.eval(), report, [*notes, note], sha256)


def _networks(layout: _Layout, grid: Tensor | None, head_dim: int, path: Path) -> tuple[UNet, VectorPyramid, str]:
    """The networks with the weights of a checkpoint that fits, and a sentence on the window."""
    state, ndim, out = layout.state, layout.ndim, [c for c in layout.projected if c]
    assert ndim is not None
    require(
        all(c % head_dim == 0 for c in out),
        f"{path} must have projections of whole groups of {head_dim} channels (--head-dim), got {out} channels",
    )
    window, note = _window(grid, ndim)
    with torch.random.fork_rng(devices=[]):
        backbone = UNet(ndim, state[f"{layout.stages[0]}0.weight"].shape[1], [c for c in layout.out if c])
        pyramid = VectorPyramid(ndim, backbone.feature_channels, [c // head_dim for c in out], head_dim, window)
    backbone.load_state_dict({ours: state[theirs] for ours, theirs in layout.names()})
    permuted = {
        f"projections.{level}.{ours}.{kind}": state[f"proj.{level}.{theirs}.{kind}"][_contiguous(groups, head_dim)]
        for level, groups in enumerate(pyramid.groups)
        for ours, theirs in (("conv", "proj"), ("norm", "norm"))
        for kind in ("weight", "bias")
    }
    pyramid.load_state_dict(permuted)
    return backbone, pyramid, note


def _contiguous(groups: int, head_dim: int) -> Tensor:
    """For every channel of contiguous groups, `(j d)`, the one that holds it in interleaved ones, `(d j)`."""
    return torch.arange(groups * head_dim).view(head_dim, groups).T.flatten()


# --- the file ------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[Any, str]:
    """What the file holds, and its SHA-256."""
    require(path.is_file(), f"checkpoint must be a file, but there is no {path}")
    with explained(path, "read"), path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        if zipfile.is_zipfile(path):  # torch itself does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                require(archive.testzip() is None, f"{path} must be a checkpoint, but its checksum is wrong")
        return torch.load(path, map_location="cpu", weights_only=True), sha256
    except InputError:
        raise
    except Exception as error:  # what is no checkpoint fails in many ways
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise InputError(
                f"{path} must hold tensors and plain values alone, for nothing in it is executed, but it asks for "
                f"{found[1]}; where it was made, save its state_dict by itself"
            ) from None
        raise InputError(
            f"{path} must be a checkpoint that torch.save wrote, but it is damaged or another file"
        ) from None


def _state_of(loaded: Any, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by name without the prefix of a wrapper, and what is left out."""
    notes = []
    state = loaded
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        state = loaded["state_dict"]
        beside = sorted(str(key) for key in loaded if key != "state_dict")
        if beside:
            notes.append(f"ignored beside state_dict: {', '.join(beside)}")
    require(
        isinstance(state, Mapping) and len(state) > 0 and all(isinstance(name, str) for name in state),
        f'{path} must hold a state dict, or one under "state_dict", got {_told(state)}',
    )
    plain = {}
    for name, value in state.items():
        strided = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
        require(strided, f"{path} must hold a plain tensor for {name}, got {_told(value)}")
        plain[name] = value
    if all(name.startswith("module.") for name in plain):
        plain = {name.removeprefix("module."): value for name, value in plain.items()}
    return plain, notes


def _told(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of layout {value.layout} and type {value.dtype}"
    if isinstance(value, Mapping):
        keys = [str(key) for key in value]
        return f"a dict of {', '.join(keys[:3]) or 'nothing'}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
    return type(value).__name__


def _conversions(state: Mapping[str, Tensor], path: Path) -> list[str]:
    """Refuse values that are no weights; say which were no float32."""
    for name, value in state.items():
        require(value.is_floating_point(), f"{path} must hold real numbers for {name}, got {value.dtype}")
        require(bool(value.isfinite().all()), f"{path} must hold finite numbers, but {name} has others")
    kinds = Counter(str(value.dtype).removeprefix("torch.") for value in state.values())
    return [f"{count} tensors converted from {kind} to float32" for kind, count in kinds.items() if kind != "float32"]


def _window(grid: Tensor | None, ndim: int) -> tuple[int, str]:
    """The window that so many offsets fill, ours by default where they fill none, and a sentence on it."""
    default = DEFAULT_WINDOW[ndim]
    if grid is None:
        return default, f"window {default}, the default here: there is no {_GRID} to tell it"
    count = grid.numel() // ndim
    window = round(count ** (1 / ndim))
    if window >= 3 and window % 2 == 1 and grid.numel() == ndim * window**ndim:
        return window, f"dropped {_GRID}, the {count} offsets of a window of {window}, which is made from its size here"
    return default, f"window {default}, the default here: dropped {_GRID}, whose shape {shape_of(grid)} tells none"


# --- the layout ----------------------------------------------------------------------------------------------------


class _Layout:
    """The network that a checkpoint's keys and shapes tell, and how the checkpoint compares with it.

    What a tensor does not tell, being missing or misshapen, its neighbours do: the report names what is wrong alone.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state
        steps = [int(found[1]) for name in state if (found := re.match(r"backbone\.(?:down|up)([1-9]\d?)\.", name))]
        self.steps = max(steps, default=1)
        down = [f"down{i}.maxpool_conv.1" for i in range(1, self.steps + 1)]
        up = [f"up{i}.conv" for i in range(1, self.steps + 1)]
        self.stages = [f"backbone.{stage}.double_conv." for stage in ("inc", *down, *up)]
        #: Output channels of the stages and of the projections, None where nothing tells them.
        self.out = [self._out(stage) for stage in self.stages]
        self.projected = [self._out(f"proj.{level}.") for level in range(self.steps + 1)]
        self.ndim = _commonest(
            value.ndim - 2
            for name, value in state.items()
            if name.startswith("backbone.") and name.endswith(("0.weight", "3.weight")) and value.ndim in (4, 5)
        )

    def _out(self, prefix: str) -> int | None:
        return _commonest(v.shape[0] for name, v in self.state.items() if name.startswith(prefix) and v.ndim)

    @property
    def expected(self) -> dict[str, Sizes]:
        """Sizes of every tensor by name."""
        encoder, decoder = self.out[: self.steps + 1], self.out[self.steps + 1 :]
        below = [encoder[-1], *decoder]  # what each stage going up gets from below, and the features of all levels
        into = [None, *encoder[:-1]]
        into += [_sum(b, s) for b, s in zip(below, encoder[-2::-1], strict=False)]
        found: dict[str, Sizes] = {}
        for stage, first, out in zip(self.stages, into, self.out, strict=True):
            for layer, channels in ((0, first), (3, out)):
                found |= self._conv(f"{stage}{layer}", out, channels, 3)
                found |= dict.fromkeys((f"{stage}{layer + 1}.weight", f"{stage}{layer + 1}.bias"), (out,))
        for level, (channels, out) in enumerate(zip(below, self.projected, strict=True)):
            found |= self._conv(f"proj.{level}.proj", out, channels, 1)
            found |= dict.fromkeys((f"proj.{level}.norm.weight", f"proj.{level}.norm.bias"), (out,))
        return found

    def _conv(self, name: str, out: int | None, channels: int | None, size: int) -> dict[str, Sizes]:
        return {f"{name}.weight": (out, channels, *[size] * (self.ndim or 2)), f"{name}.bias": (out,)}

    @property
    def report(self) -> LoadReport:
        """What the checkpoint has of the network, in its own names."""
        expected = self.expected
        there = {name: shape_of(self.state[name]) for name in expected if name in self.state}
        wrong = {name for name, shape in there.items() if not _fits(shape, expected[name])}
        return LoadReport(
            matched=[name for name in there if name not in wrong],
            missing=[name for name in expected if name not in there],
            unexpected=[name for name in self.state if name not in expected],
            reshaped=[f"{name} {there[name]} for {_shown(expected[name])}" for name in there if name in wrong],
        )

    def names(self) -> Iterator[tuple[str, str]]:
        """Of every tensor of the U-Net, our name and that in the checkpoint, coarse to fine."""
        ours = ["stem", *(f"{way}.{i}" for way in ("down", "up") for i in range(self.steps))]
        for mine, theirs in zip(ours, self.stages, strict=True):
            for layer in (0, 1, 3, 4):
                for kind in ("weight", "bias"):
                    yield f"{mine}.{layer}.{kind}", f"{theirs}{layer}.{kind}"


def _commonest(values: Iterable[int]) -> int | None:
    """The commonest of them, None of none."""
    found = Counter(values).most_common(1)
    return found[0][0] if found else None


def _sum(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b


def _fits(shape: Sequence[int], sizes: Sizes) -> bool:
    return len(shape) == len(sizes) and all(s in (None, found) for s, found in zip(sizes, shape, strict=True))


def _shown(sizes: Sizes) -> str:
    return f"({', '.join('?' if s is None else str(s) for s in sizes)}{',' if len(sizes) == 1 else ''})"
