"""What a method of pretraining is called by, without loading torch."""

from __future__ import annotations

#: Methods of the library: module below `coverfast.methods`, class.
METHODS = {"cover": ("cover", "Cover"), "gvsl": ("gvsl", "GVSL")}
#: What a setting of that name can be, for people.
KNOWN = f"{', '.join(METHODS)}, or code of your own: package.module:Class or file.py:Class"


def is_own(name: str) -> bool:
    """Whether it is the user's code."""
    return name not in METHODS


def without_folder(name: str) -> str:
    """The name as it may leave the machine: of a file its name alone."""
    return name.replace("\\", "/").rpartition("/")[2]
