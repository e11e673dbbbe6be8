"""A backbone with a head for a task, and its file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coverfast.backbones import Backbone, build, load_state
from coverfast.backbones.files import Tell, described, read_tensors, to_bytes
from coverfast.backbones.unet import CONV
from coverfast.checks import check_choice, per_axis, require
from coverfast.downstream.settings import TASKS
from coverfast.geometry import Size

_FORMAT = "coverfast-network"


class Standard(nn.Module):
    """`(x - mean) / deviation` of every channel, fixed numbers: with the linear layer behind it, a linear layer.

    Pretrained features share a large common part (their cosines are near 1), in which what tells pixels apart is
    small: without this a head by itself takes thousands of steps to find it.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("deviation", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, ...)` as it came, standardised."""
        shape = (-1, *[1] * (x.ndim - 2))
        return (x - self.mean.view(shape)) / self.deviation.view(shape)

    @torch.no_grad()
    def fit(self, features: Iterable[Tensor]) -> None:
        """Take mean and deviation from features `(B, C, ...)`; a channel that never changes keeps its scale."""
        total, squares, count = torch.zeros_like(self.mean).double(), torch.zeros_like(self.mean).double(), 0
        for x in features:
            flat = x.double().movedim(1, 0).flatten(1)
            total, squares, count = total + flat.sum(1), squares + flat.square().sum(1), count + flat.shape[1]
        mean = total / max(1, count)
        deviation = (squares / max(1, count) - mean.square()).clamp(min=0).sqrt()
        self.mean.copy_(mean)
        self.deviation.copy_(torch.where(deviation > 1e-6 * mean.abs().clamp(min=1e-6), deviation, 1.0))


class Network(nn.Module):
    """A backbone with a head (SPEC 8, COVER Sec. C.2.2).

    Segmentation: the finest features and a 1x1 convolution, whose logits are up-sampled linearly where the features are
    coarser than the image. Classification: the coarsest features, of the U-Net's encoder alone, their mean over all
    pixels and a linear layer. Both see the features through `Standard`.

    Args:
        backbone: the network that makes the features.
        task: "segmentation" or "classification".
        names: of the classes; the first one of a segmentation is the background.
        values: what stands for each class in a label map; default 0, 1, 2, ...
        crop: size of the images it was trained on; that of the windows in which larger ones pass.
        preprocessing: how the images it was trained on were made, as shards say it.
    """

    def __init__(
        self,
        backbone: Backbone,
        task: str,
        names: Sequence[str],
        values: Sequence[int] | None = None,
        *,
        crop: Size,
        preprocessing: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_choice("task", task, TASKS)
        require(len(names) >= 2, f"names must be those of at least 2 classes, got {tuple(names)}")
        values = tuple(range(len(names)) if values is None else values)
        require(
            len(values) == len(names), f"values must be one for each of {len(names)} classes, got {len(values)} of them"
        )
        whole = all(isinstance(v, int) and v >= 0 for v in values) and len(set(values)) == len(values)
        require(whole, f"values must be different integers of at least 0, got {values}")
        require(all(isinstance(n, str) for n in names), f"names must be strings, got {tuple(names)}")
        self.backbone, self.task = backbone, task
        self._frozen = [p for p in backbone.parameters() if not p.requires_grad]  # by whoever made it
        self.names, self.values = tuple(names), values
        self.crop = per_axis("crop", crop, backbone.ndim)
        self.preprocessing = dict(preprocessing or {})
        if task == "segmentation":
            channels = backbone.feature_channels[-1]
            self.head: nn.Module = CONV[backbone.ndim](channels, len(names), 1)
        else:
            channels = backbone.feature_channels[0]
            self.head = nn.Linear(channels, len(names))
        self.standard = Standard(channels)

    @property
    def ndim(self) -> int:
        """Spatial axes of its images."""
        return self.backbone.ndim

    @property
    def in_channels(self) -> int:
        """Channels of its images."""
        return self.backbone.in_channels

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images `(B, C, *S)` in [0, 1], float32: `(B, K, *S)` of every pixel, or `(B, K)` of each image."""
        logits = self.head(self.standard(self.features(images))).float()
        if self.task == "segmentation" and self.backbone.strides[-1] > 1:
            mode = {2: "bilinear", 3: "trilinear"}[self.ndim]
            logits = F.interpolate(
                logits, scale_factor=float(self.backbone.strides[-1]), mode=mode, align_corners=False
            )
        return logits

    def features(self, images: Tensor) -> Tensor:
        """What the head sees, before it is standardised: `(B, C_f, *S)`, or `(B, C_f)` of whole images."""
        if self.task == "segmentation":
            return self.backbone(images)[-1]
        return self.backbone.encode(images)[-1].flatten(2).mean(-1)

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode; a backbone that does not learn stays as it is, batch norms and dropout too."""
        super().train(mode)
        if not any(p.requires_grad for p in self.backbone.parameters()):
            self.backbone.eval()
        return self

    def train_last(self, count: int) -> None:
        """Let the head and the last `count` stages of the backbone that the task uses learn; -1 for all of them.

        Raises:
            InputError: for more stages than there are.
        """
        stages = self.backbone.modules_in_order
        if self.task == "classification":
            stages = stages[: self.backbone.levels]
        require(
            -1 <= count <= len(stages),
            f"train_modules must be -1 (all) or 0 to {len(stages)}, the modules of the backbone that {self.task} uses, "
            f"got {count}",
        )
        self.backbone.requires_grad_(False)
        for stage in stages if count < 0 else stages[len(stages) - count :]:
            stage.requires_grad_(True)
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self.train(self.training)


def network_bytes(network: Network, about: Mapping[str, Any]) -> bytes:
    """The network as the bytes of a safetensors file that `load_network` reads; `about` is JSON-able and for people."""
    facts = {
        "backbone": network.backbone.description,
        "task": network.task,
        "names": network.names,
        "values": network.values,
        "crop": network.crop,
        "preprocessing": network.preprocessing,
    }
    return to_bytes(network.state_dict(), _FORMAT, facts | {"about": dict(about)})


def load_network(path: str | Path, *, own: str | None = None, tell: Tell | None = print) -> Network:
    """The network of a `network.safetensors` or of the run folder that holds one, on the CPU, in evaluation mode.

    Args:
        path: file or folder.
        own: the code that makes the backbone where that is one of the user's, see `coverfast.load_backbone`.
        tell: takes one line, which tensors were matched; None for silence.

    Raises:
        InputError: when the file is missing, damaged, no coverfast network, or does not hold exactly the tensors of
            the network its metadata describe.
    """
    path = network_file(path)
    state, metadata = read_tensors(path, _FORMAT, "network")
    with described(path):
        facts = {name: json.loads(text) for name, text in metadata.items() if name not in ("format", "version")}
        with torch.random.fork_rng(devices=[]):
            network = Network(
                build(facts["backbone"], own=own),
                facts["task"],
                facts["names"],
                facts["values"],
                crop=facts["crop"],
                preprocessing=facts["preprocessing"],
            )
    report = load_state(network, state, str(path))
    if tell:
        tell(f"{path}: {report}")
    return network.eval()


def network_file(path: str | Path) -> Path:
    """The `network.safetensors` itself, also of a run folder."""
    path = Path(path)
    return path / "network.safetensors" if path.is_dir() else path


def network_about(path: str | Path) -> dict[str, Any]:
    """What `network_bytes` was told of a network: the run's settings, iteration and score."""
    _, metadata = read_tensors(network_file(path), _FORMAT, "network")
    with described(path):
        about: dict[str, Any] = json.loads(metadata["about"])
    return about
