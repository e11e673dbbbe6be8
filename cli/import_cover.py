"""`coverfast import-cover`: checkpoints of the COVER authors' training script as backbones of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coverfast.checks import printable, require


def import_cover(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint (.pth) of the authors' released training script.")],
    out: Annotated[Path, typer.Option(help="File to write, such as backbone.safetensors.")],
    head_dim: Annotated[int, typer.Option(min=1, help="Channels of a group, which no tensor tells.")] = 8,
) -> None:
    """Turn a checkpoint of the COVER authors' training script into a backbone.safetensors with its pyramid.

    Dimension, channels and levels come from its tensors. It is written when every one of them found its place.
    """
    from coverfast.backbones.files import backbone_bytes
    from coverfast.backbones.import_cover import import_cover as read
    from coverfast.disk import write_atomically

    require(not out.exists(), f"out must be a new file, but {out} exists")
    require(out.parent.is_dir(), f"out must lie in a folder that is there, but there is no {out.parent}")
    found = read(checkpoint, head_dim=head_dim)
    print(printable(f"{checkpoint}: {found.report}"))
    for note in found.notes:
        print(printable(note))
    about = {"source": "import-cover", "checkpoint_sha256": found.sha256}
    write_atomically(out, backbone_bytes(found.backbone, config=about, preprocessing={}, pyramid=found.pyramid))
    net, pyramid = found.backbone, found.pyramid
    stages, groups = "-".join(map(str, net.channels)), ", ".join(map(str, pyramid.groups))
    print(
        f"{printable(str(out))}: {net.ndim}D U-Net for {net.in_channels} channel(s), {stages}; groups {groups} of "
        f"{pyramid.head_dim} channels"
    )
