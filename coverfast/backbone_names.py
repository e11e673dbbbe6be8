"""What a backbone is called by, without loading torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

#: Libraries whose networks have a name here, and the module that adapts them.
LIBRARIES = {"timm": "from_timm", "monai": "from_monai", "smp": "from_smp"}


def kind_of(name: str) -> str:
    """What makes the backbone of a name: "unet", a library, or "own" for the user's code."""
    kind = name.partition(":")[0]
    return "unet" if name == "unet" else kind if kind in LIBRARIES else "own"


def absolute_code(name: str) -> str:
    """The name with the whole path of the user's file, where it names one."""
    place, _, factory = name.rpartition(":")
    return f"{Path(place).absolute()}:{factory}" if kind_of(name) == "own" and place.endswith(".py") else name


def code_sha256(name: str) -> str:
    """SHA-256 of the user's file, "" where the name is of none."""
    place = Path(name.rpartition(":")[0])
    own = kind_of(name) == "own" and place.suffix == ".py" and place.is_file()
    return hashlib.sha256(place.read_bytes()).hexdigest() if own else ""
