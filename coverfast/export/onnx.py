"""ONNX files, by way of torch.export; needs the extra `export`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from coverfast.checks import InputError, require
from coverfast.export.graph import Graph, Run, Sizes, quiet
from coverfast.export.norms import stepwise
from coverfast.export.program import AXES, program

_EXTRA = "pip install coverfast[export]"
#: Of a protocol buffer, and room for all that is no weight.
_LARGEST = 2**31 - 2**24


def need_onnx() -> None:
    """Raise `InputError` unless what writes ONNX files is installed."""
    try:
        import_module("onnx")
        import_module("onnxscript")
    except ImportError as error:
        raise InputError(f"an ONNX file needs the extra: {_EXTRA}") from error


def onnx_file(graph: Graph, sizes: Sizes, about: Mapping[str, str]) -> tuple[bytes, Run | None]:
    """The bytes of an ONNX file, with facts as its metadata, and what runs them: None without onnxruntime."""
    size = sum(t.numel() * t.element_size() for t in graph.state_dict().values())
    require(size < _LARGEST, f"weights of an ONNX file must take less than 2 GiB, got {size / 2**30:.1f} GiB")
    found = program(stepwise(graph), sizes)
    with quiet():
        made = torch.onnx.export(found, dynamo=True, input_names=["image"], output_names=graph.outputs, verbose=False)
    assert made is not None
    proto = made.model_proto
    _name_axes(proto, graph.ndim)
    for node in proto.graph.node:
        node.ClearField("metadata_props")  # two thirds of a small file, and paths of this machine
    for key, value in about.items():
        proto.metadata_props.add(key=key, value=value)
    content = proto.SerializeToString()
    return content, _runner(content)


def runtime() -> str:
    """The name of onnxruntime with its version, or "" where it is not installed."""
    try:
        onnxruntime = import_module("onnxruntime")
    except ImportError:
        return ""
    return f"onnxruntime {onnxruntime.__version__}"


def _runner(content: bytes) -> Run | None:
    if not runtime():
        return None
    onnxruntime = import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(image: torch.Tensor) -> list[torch.Tensor]:
        return [torch.from_numpy(map_) for map_ in session.run(None, {"image": image.numpy()})]

    return run


def _name_axes(proto: Any, ndim: int) -> None:
    """Say `batch` and `16*y` where the exporter has numbered its symbols."""
    axes = ("batch", "", *AXES[-ndim:])
    names: dict[str, str] = {}
    for axis, dim in zip(axes, proto.graph.input[0].type.tensor_type.shape.dim, strict=True):
        names |= dict.fromkeys(re.findall(r"[A-Za-z_]\w*", dim.dim_param), axis)
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), dim.dim_param)
