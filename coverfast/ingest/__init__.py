"""Files people have (PNG, JPEG, TIFF, NIfTI, DICOM, NRRD, MetaImage, npy) to shards.

The names are loaded on first use: the command line asks for the table of presets alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coverfast.ingest.atlas import build_atlas_subjects as build_atlas_subjects
    from coverfast.ingest.build import BuildReport as BuildReport
    from coverfast.ingest.build import build_shard as build_shard
    from coverfast.ingest.files import Scan as Scan
    from coverfast.ingest.files import Source as Source
    from coverfast.ingest.files import find_sources as find_sources
    from coverfast.ingest.files import scan as scan
    from coverfast.ingest.label_maps import read_map as read_map
    from coverfast.ingest.labels import find_maps as find_maps
    from coverfast.ingest.merge import MergeReport as MergeReport
    from coverfast.ingest.merge import merge_shards as merge_shards
    from coverfast.ingest.phantoms import build_phantoms as build_phantoms
    from coverfast.ingest.presets import PRESETS as PRESETS
    from coverfast.ingest.presets import preprocess as preprocess
    from coverfast.ingest.presets import preprocessing as preprocessing
    from coverfast.ingest.readers import Unreadable as Unreadable
    from coverfast.ingest.readers import read_source as read_source

_HOME = {
    "BuildReport": "build",
    "MergeReport": "merge",
    "PRESETS": "presets",
    "Scan": "files",
    "Source": "files",
    "Unreadable": "readers",
    "build_atlas_subjects": "atlas",
    "build_phantoms": "phantoms",
    "build_shard": "build",
    "find_maps": "labels",
    "find_sources": "files",
    "merge_shards": "merge",
    "preprocess": "presets",
    "preprocessing": "presets",
    "read_map": "label_maps",
    "read_source": "readers",
    "scan": "files",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'coverfast.ingest' has no attribute {name!r}")
    value = getattr(import_module(f"coverfast.ingest.{_HOME[name]}"), name)
    globals()[name] = value
    return value
