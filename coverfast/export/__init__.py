"""Trained networks as files for others: plain tensors, TorchScript, ONNX, torch.export."""

from coverfast.export.writing import FORMATS, Exported, export

__all__ = ["FORMATS", "Exported", "export"]
