"""TorchScript files: a trace, and before it what refuses images of another size."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any, List  # noqa: UP035

import torch
from torch import Tensor, nn

from coverfast.export.graph import FACTS, Graph, Run, Sizes, plain, quiet, several


def _checked(image: Tensor, shape: List[int], multiple: int) -> Tensor:  # noqa: UP006
    """The image, if it has this many channels and these sizes, 0 for any multiple. TorchScript, not Python."""
    fits = image.dim() == len(shape) + 1
    if fits:
        for axis in range(len(shape)):
            size = image.size(axis + 1)
            if shape[axis] != 0:
                fits = fits and size == shape[axis]
            else:
                fits = fits and size > 0 and size % multiple == 0
    if not fits:
        raise ValueError(
            "image must be (B, channels, *size) = (B, {}), 0 for any multiple of {}, got {}".format(  # noqa: UP032
                shape, multiple, image.shape
            )
        )
    return image


class _Guarded(nn.Module):
    def __init__(self, graph: Graph, sizes: Sizes) -> None:
        super().__init__()
        self.network, self.multiple = graph.network, sizes.multiple
        self.check = torch.jit.script(_checked)
        self.shape = [graph.in_channels, *((0,) * graph.ndim if sizes.free else sizes.size)]

    def forward(self, image: Tensor) -> Any:
        return plain(self.network(self.check(image, self.shape, self.multiple)))


def traced(module: nn.Module, image: Tensor) -> torch.jit.ScriptModule:
    """What a module does with an image, step by step; sizes that Python looks at become constants."""
    with quiet(), torch.no_grad():
        found = torch.jit.trace(module, image, check_trace=False)
    assert isinstance(found, torch.jit.ScriptModule)
    return found


def torchscript_file(graph: Graph, sizes: Sizes, about: Mapping[str, str]) -> tuple[bytes, Run]:
    """The bytes of a TorchScript file, with facts in its extra file coverfast.json, and what runs them."""
    with quiet():
        module = traced(_Guarded(graph, sizes).eval(), sizes.trials[0].image)
        memory = io.BytesIO()
        torch.jit.save(module, memory, _extra_files={FACTS: json.dumps(about)})
        content = _without_sources(memory)
        loaded = torch.jit.load(io.BytesIO(content))
    return content, lambda image: several(loaded(image))


def _without_sources(memory: io.BytesIO) -> bytes:
    """A TorchScript file without the lines of Python it comes from: they hold paths of this machine."""
    out = io.BytesIO()
    with zipfile.ZipFile(memory) as before, zipfile.ZipFile(out, "w") as after:
        for entry in before.infolist():
            if not entry.filename.endswith(".debug_pkl"):
                after.writestr(entry.filename, before.read(entry))
    return out.getvalue()
