"""How a shard's arrays and texts become HDF5: chunks, filters, attributes, and room on the disk beforehand."""

from __future__ import annotations

import errno
import math
import os
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from coverfast.samples import Sample, encoded

# By measurement, bench/results/data-*.json: large enough to spare HDF5 its time a chunk, small enough for a crop.
_EDGE = {2: 256, 3: 32}


def chunk_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Chunks of an image `(C, *S)`: one channel, as even along each axis as sides of at most `_EDGE` allow."""
    edge = _EDGE[len(shape) - 1]
    return (1, *(-(-s // -(-s // edge)) for s in shape[1:]))


def most_stored(shape: tuple[int, ...], chunks: tuple[int, ...], itemsize: int) -> int:
    """The most bytes that an array takes in chunks, whatever their filters."""
    count = math.prod(-(-s // c) for s, c in zip(shape, chunks, strict=True))
    # Deflate may add a few bytes to a chunk that does not compress; the index takes some more.
    return count * (math.prod(chunks) * itemsize * 1001 // 1000 + 256)


def create(group: h5py.Group, name: str, stored: NDArray[Any], chunks: tuple[int, ...], *, gzip: bool) -> h5py.Dataset:
    """A dataset in checksummed chunks."""
    squeeze = {"compression": "gzip", "compression_opts": 1, "shuffle": stored.itemsize > 1} if gzip else {}
    # All attributes in the object header: eight is where HDF5 would move them to a heap.
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_attr_phase_change(16, 12)
    return group.create_dataset(name, data=stored, chunks=chunks, fletcher32=True, dcpl=properties, **squeeze)


def create_table(file: h5py.File, name: str, table: NDArray[Any]) -> h5py.Dataset:
    """A table with a row for each sample."""
    rows = (min(len(table), 65536), *table.shape[1:])
    return file.create_dataset(
        name, data=table, chunks=rows, compression="gzip", compression_opts=1, shuffle=True, fletcher32=True
    )


def put_text(node: h5py.HLObject, key: str, text: bytes) -> None:
    """A string attribute of fixed length: those of variable length live in a heap without checksums."""
    node.attrs.create(key, text, dtype=h5py.string_dtype("utf-8", max(1, len(text))))


def put_metadata(dataset: h5py.Dataset, sample: Sample, sha256: str) -> None:
    """The attributes of a sample."""
    dataset.attrs.create("spacing", sample.spacing, dtype="<f8")
    for key in ("source", "group"):
        put_text(dataset, key, encoded(getattr(sample, key)))
    put_text(dataset, "sha256", sha256.encode())
    if (original := sample.original) is not None:
        dataset.attrs.create("to_original", original.to_original, dtype="<f8")
        dataset.attrs.create("original_shape", original.shape, dtype="<i8")
        if original.affine is not None:
            dataset.attrs.create("original_affine", original.affine, dtype="<f8")
            dataset.attrs.create("original_spacing", original.spacing, dtype="<f8")
            put_text(dataset, "original_orientation", original.orientation.encode())


def little_endian(array: NDArray[Any]) -> NDArray[Any]:
    """The array in C order and little-endian."""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<"))


def allocate(descriptor: int, start: int, count: int) -> None:
    """Claim room on the disk; `OSError` if there is too little."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, start, count)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    os.lseek(descriptor, start, os.SEEK_SET)
    while count > 0:
        count -= os.write(descriptor, bytes(min(count, 1 << 20)))
