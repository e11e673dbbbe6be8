"""Other people's libraries in the tests, skipped where they are absent."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

#: Beside a build of torch that it was not made for, torchvision does not import, since operators that it declares are
#: missing; timm needs only its picture transforms. Also for processes that tests start.
DECLARE = """
import importlib, torch
try:
    import torchvision
except ImportError:
    pass
except RuntimeError:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch._declared_for_torchvision = library  # declared as long as it lives
"""


def library(name: str) -> ModuleType:
    """A library, or a skipped test."""
    if not hasattr(torch, "_declared_for_torchvision"):
        exec(DECLARE, {})
    return pytest.importorskip(name)
