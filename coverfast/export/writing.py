"""From a trained network to a file in one of the formats, tried before it is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from coverfast.backbones import load_backbone
from coverfast.backbones.files import Tell
from coverfast.checks import InputError, check_choice, require
from coverfast.disk import atomic_path, write_atomically
from coverfast.downstream.network import Network, load_network
from coverfast.export import graph as graphs
from coverfast.export.graph import BOUND, Differs, Graph, Run, Sizes, difference, first_line
from coverfast.export.onnx import need_onnx, onnx_file, runtime
from coverfast.export.program import program_file
from coverfast.export.sources import Source, open_source
from coverfast.export.torchscript import torchscript_file, traced
from coverfast.geometry import Size

#: Formats with the suffix of their files.
FORMATS = {"safetensors": ".safetensors", "torchscript": ".ts", "onnx": ".onnx", "torch-export": ".pt2"}

_Make = Callable[[Graph, Sizes, Mapping[str, str]], tuple[bytes, Run | None]]
_MAKERS: dict[str, _Make] = {"torchscript": torchscript_file, "onnx": onnx_file, "torch-export": program_file}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        source: the network in it.
        lines: what there is to say of it, for people: how it was checked, what it takes and gives.
        free: whether it takes images of any size.
        difference: largest one between its outputs and the network's, as a part of the largest value of their map;
            None where nothing could run it.
    """

    path: Path
    source: Source
    lines: tuple[str, ...]
    free: bool
    difference: float | None


def export(
    checkpoint: str | Path,
    to: str,
    out: str | Path | None = None,
    *,
    size: Size | None = None,
    own: str | None = None,
    tell: Tell | None = print,
    progress: Callable[[str], object] = lambda text: None,
) -> Exported:
    """Write a trained network as a file of another format, whole or not at all, after its outputs have been compared.

    Args:
        checkpoint: what `coverfast.export.sources.open_source` reads.
        to: one of `FORMATS`.
        out: a file that is not there yet; default beside the one that was read.
        size: of the images it is made with, and of the only ones it takes where a network cannot follow others.
            Default: a small size, and for those the one of its training.
        own: the code that makes the network where that is one of the user's, see `coverfast.load_backbone`.
        tell: takes a line, which tensors were matched.
        progress: takes what is being done.

    Raises:
        InputError: for a network that cannot be read or exported, or whose file would give other numbers than it.
    """
    check_choice("to", to, tuple(FORMATS))
    if to == "onnx":
        need_onnx()
    if out is not None:
        _check_new(Path(out))
    progress("reading")
    source = open_source(checkpoint, own=own, tell=tell)
    path = source.file.with_suffix(FORMATS[to]) if out is None else Path(out)
    if out is None and path == source.file:  # a run's own file stays, and what goes to others has another name
        path = path.with_name(f"{path.stem}-export{path.suffix}")
    _check_new(path)
    if to == "safetensors":
        require(size is None, "size must not be given for safetensors, which hold weights alone")
        return _tensors(source, path, own)
    with torch.no_grad():
        return _graph(source, to, path, size, progress)


def _check_new(path: Path) -> None:
    require(not path.exists(), f"out must be a new file, but {path} exists; see --out")
    require(path.parent.is_dir(), f"out must lie in a folder that is there, but there is no {path.parent}")


def _tensors(source: Source, path: Path, own: str | None) -> Exported:
    load = load_network if isinstance(source.network, Network) else load_backbone
    with atomic_path(path) as temporary:
        temporary.write_bytes(source.tensors())
        again, before = load(temporary, own=own, tell=None).state_dict(), source.network.state_dict()
        same = again.keys() == before.keys() and all(torch.equal(again[n], before[n]) for n in before)
        require(same, f"{path} must hold the weights of {source.file}, but read again they are others")
    function = "coverfast.downstream.load_network" if load is load_network else "coverfast.load_backbone"
    lines = [f"checked: {function} reads {len(again)} tensors, the same bits", *_use(source, None)]
    return Exported(path, source, tuple(lines), True, 0.0)


def _graph(source: Source, to: str, path: Path, size: Size | None, progress: Callable[[str], object]) -> Exported:
    graph = Graph(source).eval()
    wanted = None if size is None else graphs.check_size(graph, size)
    progress("looking which sizes the network takes")
    sizes = _sizes(graph, wanted, source.image_size, least=2 if to == "torch-export" else 1)
    while True:
        progress(f"making and trying {to}")
        try:
            content, run = _MAKERS[to](graph, sizes, _about(source, sizes))
            worst = difference(graph, run, sizes.trials) if run else None
            break
        except Differs as error:
            raise InputError(f"{path} is not written, since it would be wrong: {error}") from None
        except InputError:
            raise
        except Exception as error:  # exporters fail in many ways
            cause = f"{to} cannot leave it open ({first_line(error)})"
            if not sizes.free:
                raise InputError(f"to must be a format that the network can have, but {cause}") from error
            sizes = graphs.fixed(graph, wanted or source.image_size, cause)
    progress("writing")
    write_atomically(path, content)
    lines = [_checked(to, sizes, worst), *_use(source, sizes)]
    if run and sizes.free and not _refuses(graph, run, sizes):
        lines.append(f"note: sizes that are no multiples of {sizes.multiple} must not be used, and are not refused")
    return Exported(path, source, tuple(lines), sizes.free, worst)


def _sizes(graph: Graph, wanted: Sequence[int] | None, known: Sequence[int] | None, least: int) -> Sizes:
    """Any size for a network that follows them when it is traced too; otherwise the wanted or known one alone."""
    found = graphs.free(graph, wanted, least)
    if found is None:
        return graphs.fixed(graph, wanted or known, f"the network does not take every multiple of {graph.multiple}")
    try:
        trace = traced(graph, found.trials[0].image)
    except Exception:  # nothing is known then; torch.export may still do it
        return found
    try:
        difference(graph, lambda image: graphs.several(trace(image)), found.trials)
    except Exception:
        return graphs.fixed(graph, wanted or known, "what the network does depends on the size of its images")
    return found


def _about(source: Source, sizes: Sizes) -> dict[str, str]:
    """What a file says of itself."""
    shape = "image (B, C, *S), float32 in [0, 1]"
    facts = {"format": "coverfast-export", "version": "1", "image": shape}
    facts["sizes"] = f"{sizes.words}; of others nothing is promised"
    return facts | {name: json.dumps(value) for name, value in source.facts.items()}


def _checked(to: str, sizes: Sizes, worst: float | None) -> str:
    if worst is None:
        return "not checked: that needs onnxruntime, pip install coverfast[export]"
    how = {"torchscript": "torch.jit.load", "torch-export": "torch.export.load"}.get(to) or runtime()
    tried = ", ".join(trial.name for trial in sizes.trials)
    return f"checked with {how} on {tried}: largest difference {worst:.1e} of a map's largest value (bound {BOUND:.0e})"


def _use(source: Source, sizes: Sizes | None) -> list[str]:
    """What a file takes and gives."""
    backbone, network = source.backbone, source.network
    axes = ", ".join(("z", "y", "x")[-backbone.ndim :])
    size = sizes.words if sizes else f"multiples of {backbone.strides[0]}"
    strides = ", ".join(map(str, backbone.strides))
    gives = f"{backbone.levels} maps, strides {strides}, channels {', '.join(map(str, backbone.feature_channels))}"
    if isinstance(network, Network):
        shape = f"(B, {len(network.names)}, {axes})" if network.task == "segmentation" else f"(B, {len(network.names)})"
        gives = f"logits {shape} of {', '.join(network.names)}"
    made = ", ".join(f"{key} = {value}" for key, value in source.preprocessing.items())
    return [
        f"takes (B, {backbone.in_channels}, {axes}), float32 in [0, 1]; {axes}: {size}",
        f"gives {gives}",
        f"images made as it learned from: {made or 'not known'}",
    ]


def _refuses(graph: Graph, run: Run, sizes: Sizes) -> bool:
    """Whether a size between two multiples is refused."""
    size = [s + sizes.multiple // 2 for s in sizes.size]
    try:
        run(torch.zeros(1, graph.in_channels, *size))
    except Exception:
        return True
    return False
