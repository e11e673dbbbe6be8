"""From a pretrained backbone to a result: heads, fine-tuning, linear evaluation, metrics, prediction (SPEC 8)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coverfast.downstream.evaluation import Evaluation as Evaluation
    from coverfast.downstream.evaluation import evaluate as evaluate
    from coverfast.downstream.network import Network as Network
    from coverfast.downstream.network import load_network as load_network
    from coverfast.downstream.windows import predict_windows as predict_windows

_HOME = {
    "Evaluation": "evaluation",
    "Network": "network",
    "evaluate": "evaluation",
    "load_network": "network",
    "predict_windows": "windows",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'coverfast.downstream' has no attribute {name!r}")
    value = getattr(import_module(f"coverfast.downstream.{_HOME[name]}"), name)
    globals()[name] = value
    return value
