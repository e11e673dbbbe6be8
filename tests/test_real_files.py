"""Real images from a folder to a verified shard and a picture, as the README tells it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from coverfast.ingest import build_shard, preprocessing
from coverfast.report.contact_sheet import contact_sheet
from coverfast.shards import Shard, verify

RADIOGRAPHS = Path(__file__).parents[2] / "shared/data/chestxray"


def build_verify_preview(tmp_path, source, preset="raw", **options):
    report = build_shard(source, tmp_path / "out.h5", preprocessing=preprocessing(preset), workers=0, **options)
    assert verify(report.paths[0]) == []
    assert contact_sheet(report.paths, tmp_path / "sheet.png") == min(48, report.samples)
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
    return report


@pytest.mark.skipif(not RADIOGRAPHS.is_dir(), reason="the radiographs are not here")
def test_radiographs(tmp_path):
    report = build_verify_preview(tmp_path, RADIOGRAPHS, "chest-xray", group=r"/(\d+)_", val_fraction=0.3)
    with Shard(report.paths[0]) as shard:
        assert shard.sizes.tolist() == [[512, 512]] * 6
        found = {(shard.info(i).group, shard.info(i).split) for i in range(6)}
    assert len(found) == 3
    assert {split for _, split in found} == {"train", "val"}


def test_a_brain_keeps_all_of_itself(tmp_path):
    load = pytest.importorskip("nilearn.datasets").load_mni152_template
    image = load(resolution=1)
    image.to_filename(tmp_path / "mni.nii.gz")
    report = build_verify_preview(tmp_path, tmp_path / "mni.nii.gz", "brain-mr")
    with Shard(report.paths[0]) as shard:
        sample = shard.read(0)
    assert sample.pixels.shape == (1, 160, 160, 128)
    volume = float(np.prod(sample.spacing)) * (sample.normalised() > 0.1).sum()
    whole = np.asarray(image.dataobj)
    assert volume == pytest.approx((whole > 0.1 * whole.max()).sum(), rel=0.02)
    # A voxel of the brain is found in the file at the place that the shard tells.
    at = np.array([80, 60, 40, 1.0])
    i, j, k = (sample.original.to_original @ at)[:3]
    expected = whole[round(i), round(j), round(k)]
    assert sample.pixels[0, 80, 60, 40] * sample.slope + sample.intercept == pytest.approx(expected, abs=0.1)


def test_pydicom_samples(tmp_path):
    data = pytest.importorskip("pydicom.data")
    folder = Path(data.__file__).parent / "test_files"
    report = build_verify_preview(tmp_path, folder, ndim=2, skip_bad=True)
    assert report.samples > 40
    assert report.unwanted == 1
    assert all("cannot be read as DICOM" in reason for reason in report.skipped)


def test_nibabel_samples(tmp_path):
    tests = pytest.importorskip("nibabel.tests")
    folder = Path(tests.__file__).parent / "data"
    if not (folder / "anatomical.nii").exists():
        pytest.skip("this nibabel came without its sample files")
    report = build_verify_preview(tmp_path, folder, ndim=3, skip_bad=True, volume=0)
    assert report.samples == 6
