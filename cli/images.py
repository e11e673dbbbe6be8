"""What commands that take image files share: names for their results, and the preprocessing of a network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coverfast.ingest import Source


def result_names(sources: Sequence[Source]) -> list[str]:
    """A name for what is made of each, after its file, or after the folder of a series of files; no two the same."""
    taken: set[str] = set()
    names = []
    for source in sources:
        series = source.kind == "DICOM" and len(source.files) > 1
        stem = source.path.absolute().parent.name if series else _stem(source.path.name)
        stem = re.sub(r"[^\w.-]+", "-", stem).strip(".-") or "image"
        name, number = stem, 1
        while name.lower() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.lower())
        names.append(name)
    return names


def _stem(name: str) -> str:
    """A file's name without the suffix of its kind, `.nii.gz` in one."""
    from coverfast.ingest.files import KINDS

    suffix = max((k for k in KINDS if name.lower().endswith(k)), key=len, default="")
    return name[: len(name) - len(suffix)]


def learned_preprocessing(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """How to make images as those of the shard that a network learned from, which was preprocessed by `settings`.

    And what there is to say about it: where no preset made them, images are taken as they are.
    """
    from coverfast.ingest import PRESETS

    preset = settings.get("preset")
    if preset in PRESETS:
        return dict(settings), []
    note = f"the network learned from images that no preset made ({preset!r}): these are taken as they are"
    return {"preset": "raw"}, [note]
