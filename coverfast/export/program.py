"""torch.export: a network as a graph of operators, with what it asks of the sizes of its images."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.export import Dim, ExportedProgram

from coverfast.export.graph import FACTS, Graph, Run, Sizes, quiet, several

#: Names of the axes of an image.
AXES = ("z", "y", "x")


def program(graph: Graph, sizes: Sizes) -> ExportedProgram:
    """The graph for any batch and, where they are free, any multiples of the coarsest stride as sizes."""
    axes = AXES[-graph.ndim :] if sizes.free else ()
    dynamic: dict[int, Any] = {0: Dim("batch")}
    dynamic |= {2 + i: graph.multiple * Dim(axis) for i, axis in enumerate(axes)}
    # torch.export takes a size of 1, here in the coarsest pixels, for one that never changes.
    size = [max(s, 2 * graph.multiple) for s in sizes.size] if sizes.free else sizes.size
    with quiet(), torch.no_grad():
        example = torch.zeros(2, graph.in_channels, *size)
        found = torch.export.export(graph, (example,), dynamic_shapes={"image": dynamic})
    for module in found.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # paths of this machine
    found.example_inputs = None
    return found


def program_file(graph: Graph, sizes: Sizes, about: Mapping[str, str]) -> tuple[bytes, Run]:
    """The bytes of a .pt2 file, with facts in its extra file coverfast.json, and what runs them."""
    found = program(graph, sizes)
    memory = io.BytesIO()
    with quiet():
        torch.export.save(found, memory, extra_files={FACTS: json.dumps(about)})
        content = memory.getvalue()
        module = torch.export.load(io.BytesIO(content)).module()
    return content, lambda image: several(module(image))
