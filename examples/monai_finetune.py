"""A pretrained encoder and decoder in MONAI's own training code.

    python examples/monai_finetune.py                     # 2D, a minute on two CPU cores
    python examples/monai_finetune.py --ndim 3
    python examples/monai_finetune.py --backbone runs/scans/backbone.safetensors      # of your own, for 8-bit images

Transforms, data set, loader, loss, inference in windows and metric are MONAI's, the loop is that of its tutorials. What
comes from coverfast stands between "coverfast" and "end". Phantoms are written as the files that people have, PNG in 2D
and NIfTI in 3D, with label maps, and the same network is trained on them twice: from weights drawn at random, and from
a backbone that was pretrained on other phantoms, without their labels. The Dice of both on held-out phantoms is
printed, whichever is larger.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

try:
    from monai.data import CacheDataset, DataLoader, decollate_batch
    from monai.inferers import sliding_window_inference
    from monai.losses import DiceCELoss
    from monai.metrics import DiceMetric
    from monai.networks.layers import Conv, Norm
    from monai.transforms import (
        AsDiscrete,
        Compose,
        EnsureChannelFirstd,
        LoadImaged,
        Orientationd,
        RandGaussianNoised,
        RandScaleIntensityd,
        RandSpatialCropd,
        ScaleIntensityRanged,
        Transposed,
    )
    from monai.utils import set_determinism
except ModuleNotFoundError as error:
    if error.name != "monai":
        raise
    print("this example needs MONAI, which is not installed: pip install monai", file=sys.stderr)
    sys.exit(2)

import nibabel
import numpy as np
import torch
from PIL import Image
from torch import nn

import coverfast
from coverfast.backbones import build
from coverfast.ingest.phantoms import build_phantoms
from coverfast.phantom import CLASSES_2D, phantom
from coverfast.training.plan import plan
from coverfast.training.settings import preset_settings

SEED, CLASSES, BATCH = 0, len(CLASSES_2D), 4  # as many classes in 3D
SIZE, CROP = {2: 128, 3: 48}, {2: 96, 3: 32}  # pixels an axis
BOTH = ["image", "label"]


# coverfast
class Segmenter(nn.Module):
    """Logits of every pixel: the finest features, standardised, through a 1x1 convolution."""

    def __init__(self, backbone, classes):
        super().__init__()
        ndim, width = backbone.ndim, backbone.feature_channels[-1]
        norm, conv = Norm["instance", ndim], Conv["conv", ndim]
        self.backbone, self.head = backbone, nn.Sequential(norm(width), conv(width, classes, 1))

    def forward(self, images):
        return self.head(self.backbone(images)[-1])  # the last of the maps is the finest


# end


def transforms(ndim, crop=None):
    """Files to tensors; with a crop, augmented ones to learn from."""
    chain = [LoadImaged(BOTH), EnsureChannelFirstd(BOTH)]
    chain += [Orientationd(BOTH, axcodes="RAS", labels=None)] if ndim == 3 else []
    chain += [
        # coverfast
        ScaleIntensityRanged("image", 0, 255, 0, 1, clip=True),  # [0, 1], as in pretraining
        Transposed(BOTH, (0, *range(ndim, 0, -1))),  # MONAI reads (x, y, z), pretraining (z, y, x)
        # end
    ]
    if crop:
        chain += [
            RandSpatialCropd(BOTH, crop, random_size=False),
            RandScaleIntensityd("image", factors=0.25, prob=0.5),
            RandGaussianNoised("image", std=0.02, prob=0.5),
        ]
    return Compose(chain)


def write(folder, ndim, indices):
    """Phantoms of those indices as files: a list of dictionaries, as MONAI's data sets take them."""
    folder.mkdir()
    files = []
    for index in indices:
        subject = phantom(ndim, SIZE[ndim], seed=SEED, index=index)
        pixels = (255 * subject.image).round().astype(np.uint8)
        names = {key: str(folder / f"{index}-{key}{'.png' if ndim == 2 else '.nii.gz'}") for key in BOTH}
        for name, array in zip(names.values(), (pixels, subject.labels), strict=True):
            if ndim == 2:
                Image.fromarray(array).save(name)
            else:
                nibabel.save(nibabel.Nifti1Image(array.transpose(), np.eye(4)), name)
        files.append(names)
    return files


def pretrain(folder, ndim, iterations):
    """A backbone pretrained on phantoms that the training does not see; `coverfast pretrain` does the same."""
    data = folder / "unlabelled.h5"
    build_phantoms(data, ndim, SIZE[ndim], seed=SEED, indices=range(1000, 1064))
    settings = {"data": str(data), "run": str(folder / "pretraining"), "preset": f"small-{ndim}d", "crop": CROP[ndim]}
    return plan(settings | {"iterations": iterations, "report": False, "tensorboard": False}).start().backbone


def train(name, backbone, files, args):
    """Train on the first files as MONAI's tutorials do; loss of every iteration, and the mean Dice on the others."""
    crop, device = (CROP[backbone.ndim],) * backbone.ndim, "cuda" if torch.cuda.is_available() else "cpu"
    set_determinism(SEED)
    network = Segmenter(backbone, CLASSES).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    loss_function = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    data = CacheDataset(files[: args.cases], transforms(backbone.ndim, crop), progress=False)
    loader = DataLoader(data, batch_size=min(BATCH, len(data)), shuffle=True)
    losses = []
    network.train()
    while len(losses) < args.iterations:
        for batch in loader:
            optimizer.zero_grad()
            loss = loss_function(network(batch["image"].to(device)), batch["label"].to(device))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            print(f"\r{name}: iteration {len(losses)} of {args.iterations}, loss {losses[-1]:.3f} ", end="", flush=True)
            if len(losses) == args.iterations:
                break
    print()

    discrete, labels = AsDiscrete(argmax=True, to_onehot=CLASSES), AsDiscrete(to_onehot=CLASSES)
    metric = DiceMetric(include_background=False)
    network.eval()
    with torch.no_grad():
        for batch in DataLoader(CacheDataset(files[args.cases :], transforms(backbone.ndim), progress=False)):
            logits = sliding_window_inference(batch["image"].to(device), crop, 4, network)
            found, truth = decollate_batch(logits), decollate_batch(batch["label"].to(device))
            metric([discrete(x) for x in found], [labels(x) for x in truth])
    return losses, metric.aggregate().item()


def main():
    """Train from random weights and from a backbone, and print both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--backbone", help="backbone.safetensors; default: pretrain one on phantoms")
    source.add_argument("--scratch", action="store_true", help="train from random weights only")
    parser.add_argument("--ndim", type=int, choices=(2, 3), default=2)
    parser.add_argument("--iterations", type=int, default=60, help="of each training")
    parser.add_argument("--pretrain-iterations", type=int, default=60, help="without --backbone")
    parser.add_argument("--cases", type=int, default=8, help="labelled phantoms to learn from")
    parser.add_argument("--held-out", type=int, default=8, help="labelled phantoms to measure the Dice on")
    args = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = write(folder / "labelled", args.ndim, range(args.cases + args.held_out))
        if args.scratch:
            channels = preset_settings(f"small-{args.ndim}d").unet_channels()
            networks = {"scratch": coverfast.UNet(args.ndim, 1, channels)}
        else:
            path = args.backbone or pretrain(folder, args.ndim, args.pretrain_iterations)
            # coverfast
            backbone = coverfast.load_backbone(path)
            # end
            kind = (backbone.ndim, backbone.in_channels, backbone.strides[-1])
            if kind != (args.ndim, 1, 1):
                parser.error(
                    f"the backbone must be one for {args.ndim}D images of 1 channel with finest features of stride 1, "
                    "got one for {}D, {} and {}".format(*kind)
                )
            torch.manual_seed(SEED)
            networks = {"scratch": build(backbone.description), "pretrained": backbone}
        results = {name: train(name, network, files, args) for name, network in networks.items()}
    print(f"{args.ndim}D, {args.cases} labelled phantoms, {args.iterations} iterations, {args.held_out} held out")
    for name, (losses, dice) in results.items():
        first, last = statistics.mean(losses[:5]), statistics.mean(losses[-5:])
        print(f"{name:<12} loss {first:.3f} at first, {last:.3f} at last (means of five), Dice {dice:.3f}")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
