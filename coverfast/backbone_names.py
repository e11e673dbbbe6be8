"""What a backbone is called by, without loading torch."""

from __future__ import annotations

#: Libraries whose networks have a name here, and the module that adapts them.
LIBRARIES = {"timm": "from_timm", "monai": "from_monai", "smp": "from_smp"}


def kind_of(name: str) -> str:
    """What makes the backbone of a name: "unet", a library, or "own" for the user's code."""
    kind = name.partition(":")[0]
    return "unet" if name == "unet" else kind if kind in LIBRARIES else "own"
