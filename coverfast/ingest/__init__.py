"""Files people have (PNG, JPEG, TIFF, NIfTI, npy) to shards."""

from coverfast.ingest.build import BuildReport, build_shard
from coverfast.ingest.files import Source, find_sources
from coverfast.ingest.readers import read_source

__all__ = ["BuildReport", "Source", "build_shard", "find_sources", "read_source"]
