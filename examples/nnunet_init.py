"""A pretrained encoder and decoder in nnU-Net's own training.

    python examples/nnunet_init.py                     # a minute on two CPU cores
    python examples/nnunet_init.py --backbone runs/scans/backbone.safetensors

Data set folder, fingerprint, plans, preprocessing, augmentation, loss, optimiser and validation are nnU-Net's (v2, from
2.7 on). What comes from coverfast stands between "coverfast" and "end": a trainer whose network is a backbone. Phantoms
are written as a raw data set of nnU-Net, and the same network is trained on them twice: from weights drawn at random,
and from a backbone that was pretrained on other phantoms, without their labels. nnU-Net's pseudo Dice of both after
every epoch is printed, whichever is larger.

With a data set and paths of your own this file is the trainer; put it into a folder by itself:

    export nnUNet_extTrainer=folder COVERFAST_BACKBONE=backbone.safetensors
    nnUNetv2_train 1 2d 0 -tr CoverfastTrainer
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":  # nnU-Net reads its settings when it is imported
    temporary = tempfile.TemporaryDirectory()
    os.environ |= {f"nnUNet_{kind}": str(Path(temporary.name, kind)) for kind in ("raw", "preprocessed", "results")}
    os.environ |= {"nnUNet_def_n_proc": "1", "nnUNet_n_proc_DA": "1", "nnUNet_compile": "f"}
try:
    from nnunetv2.experiment_planning import plan_and_preprocess_api as nnunet
    from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
    from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerNoDeepSupervision import (
        nnUNetTrainerNoDeepSupervision,
    )
except ModuleNotFoundError as error:
    if error.name != "nnunetv2":
        raise
    print('this example needs nnU-Net, which is not installed: pip install "nnunetv2>=2.7"', file=sys.stderr)
    sys.exit(2)

import numpy as np
import torch
from PIL import Image
from torch import nn

import coverfast
from coverfast.backbones import build
from coverfast.ingest.phantoms import build_phantoms
from coverfast.phantom import CLASSES_2D, phantom
from coverfast.training.plan import plan

SEED, SIZE, CROP = 0, 128, 96  # pixels an axis
DATASET = "Dataset001_Phantom"


# coverfast
class Segmenter(nn.Module):
    """Logits of every pixel: the finest features, standardised, through a 1x1 convolution."""

    def __init__(self, backbone, classes):
        super().__init__()
        norm, conv = ((nn.InstanceNorm2d, nn.Conv2d), (nn.InstanceNorm3d, nn.Conv3d))[backbone.ndim - 2]
        width = backbone.feature_channels[-1]
        self.backbone, self.head = backbone, nn.Sequential(norm(width), conv(width, classes, 1))

    def forward(self, images):
        return self.head(self.backbone(images)[-1])  # the last of the maps is the finest


class CoverfastTrainer(nnUNetTrainerNoDeepSupervision):
    """nnU-Net's trainer with the backbone that COVERFAST_BACKBONE names."""

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=False
    ):
        return Segmenter(coverfast.load_backbone(os.environ["COVERFAST_BACKBONE"]), num_output_channels)

    def set_deep_supervision_enabled(self, enabled):
        pass  # the network has one output


# end


class ScratchTrainer(CoverfastTrainer):
    """The same network with weights drawn at random."""

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=False
    ):
        backbone = coverfast.load_backbone(os.environ["COVERFAST_BACKBONE"], tell=None)
        return Segmenter(build(backbone.description), num_output_channels)


def write(cases, held_out, normalization):
    """Phantoms as a raw data set of nnU-Net, the last ones to validate on."""
    folder = Path(nnUNet_raw, DATASET)
    names = [f"case_{index:03}" for index in range(cases + held_out)]
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for index, name in enumerate(names):
        subject = phantom(2, SIZE, seed=SEED, index=index)
        Image.fromarray((255 * subject.image).round().astype("uint8")).save(folder / f"imagesTr/{name}_0000.png")
        Image.fromarray(subject.labels).save(folder / f"labelsTr/{name}.png")
    about = {
        "channel_names": {"0": normalization},
        "labels": {name: value for value, name in enumerate(CLASSES_2D)},
        "numTraining": len(names),
        "file_ending": ".png",
    }
    (folder / "dataset.json").write_text(json.dumps(about))
    splits = [{"train": names[:cases], "val": names[cases:]}]
    (folder / "splits_final.json").write_text(json.dumps(splits))


def pretrain(folder, iterations):
    """A backbone pretrained on phantoms that the training does not see; `coverfast pretrain` does the same."""
    data = folder / "unlabelled.h5"
    build_phantoms(data, 2, SIZE, seed=SEED, indices=range(1000, 1064))
    settings = {"data": str(data), "run": str(folder / "pretraining"), "preset": "small-2d", "crop": CROP}
    return plan(settings | {"iterations": iterations, "report": False, "tensorboard": False}).start().backbone


def train(trainer_class, args):
    """Losses and pseudo Dice of all epochs."""
    folder = Path(nnUNet_preprocessed, DATASET)
    plans, about = (json.loads((folder / name).read_text()) for name in ("nnUNetPlans.json", "dataset.json"))
    np.random.seed(SEED)  # noqa: NPY002 - what nnU-Net draws from
    torch.manual_seed(SEED)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = trainer_class(plans | {"continue_training": False}, "2d", 0, about, device)
    trainer.num_epochs, trainer.num_iterations_per_epoch = args.epochs, args.iterations
    trainer.num_val_iterations_per_epoch = args.val_iterations
    trainer.run_training()
    keys = ("train_losses", "mean_fg_dice")
    return [[trainer.logger.get_value(key, epoch) for epoch in range(args.epochs)] for key in keys]


def main():
    """Plan and preprocess, train from random weights and from a backbone, and print both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", help="2D backbone.safetensors for 8-bit images; default: pretrain on phantoms")
    parser.add_argument("--pretrain-iterations", type=int, default=60, help="without --backbone")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=15, help="of an epoch")
    parser.add_argument("--val-iterations", type=int, default=4, help="of an epoch")
    parser.add_argument("--cases", type=int, default=8, help="labelled phantoms to learn from")
    parser.add_argument("--held-out", type=int, default=8, help="labelled phantoms to validate on")
    parser.add_argument(
        "--normalization",
        choices=("zscore", "rgb_to_0_1"),
        default="zscore",
        help="nnU-Net's own; or 8-bit images to [0, 1], as in pretraining",
    )
    args = parser.parse_args()
    start = time.perf_counter()
    path = args.backbone or pretrain(Path(temporary.name), args.pretrain_iterations)
    backbone = coverfast.load_backbone(path, tell=None)
    kind = (backbone.ndim, backbone.in_channels, backbone.strides[-1])
    if kind != (2, 1, 1):
        parser.error(
            "the backbone must be one for 2D images of 1 channel with finest features of stride 1, "
            "got one for {}D, {} and {}".format(*kind)
        )
    os.environ["COVERFAST_BACKBONE"] = str(path)
    write(args.cases, args.held_out, args.normalization)
    nnunet.extract_fingerprints([1], num_processes=1, show_progress_bar=False)
    nnunet.plan_experiments([1])
    nnunet.preprocess([1], configurations=("2d",), num_processes=(1,), show_progress_bar=False)
    os.environ.update(nnUNet_n_proc_DA="0")  # augment in this process; planning refuses 0
    results = {trainer.__name__: train(trainer, args) for trainer in (ScratchTrainer, CoverfastTrainer)}
    length = f"{args.epochs} epochs of {args.iterations} iterations"
    print(f"{args.cases} labelled phantoms, {length}, {args.held_out} held out")
    for name, (losses, dice) in results.items():
        print(f"{name:<18} loss", *(f"{x:7.3f}" for x in losses), " pseudo Dice", *(f"{x:.3f}" for x in dice))
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
