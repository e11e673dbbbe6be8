"""NIfTI: orientation, spacing, scaling; folders; whole builds."""

from __future__ import annotations

import gzip
import itertools
import os
import re
from pathlib import Path

import numpy as np
import pytest

from coverfast.checks import InputError
from coverfast.ingest import Source, build_shard, find_sources, read_source
from coverfast.shards import Shard, verify

nibabel = pytest.importorskip("nibabel")

ZOOMS = (0.5, 2.0, 3.0)
DATA = Path(nibabel.__file__).parent / "tests" / "data"


def read(path):
    return read_source(Source(Path(path), Path(path).name))


def volume():
    """x, y, z with values that tell every axis and direction."""
    x, y, z = np.meshgrid(np.arange(4), np.arange(5), np.arange(6), indexing="ij")
    return (x + 10 * y + 100 * z).astype(np.int16)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, 1), (-1, -1, 1), (1, -1, -1)])
def test_every_orientation_comes_out_the_same(tmp_path, order, signs):
    world = nibabel.Nifti1Image(volume(), np.diag([*ZOOMS, 1.0]))
    codes = "".join(("LR" if s > 0 else "RL", "PA" if s > 0 else "AP", "IS" if s > 0 else "SI")[a][1]
                    for a, s in zip(order, (signs[a] for a in order), strict=True))  # fmt: skip
    target = nibabel.orientations.axcodes2ornt(codes)
    turned = world.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(world.affine), target))
    assert "".join(nibabel.aff2axcodes(turned.affine)) == codes
    nibabel.save(turned, tmp_path / "v.nii.gz")
    sample = read(tmp_path / "v.nii.gz")
    np.testing.assert_array_equal(sample.pixels, volume().transpose(2, 1, 0)[None])
    assert sample.pixels.dtype == np.int16
    assert sample.spacing == pytest.approx(ZOOMS[::-1])
    assert (sample.lo, sample.hi) == (0, 543)


def test_oblique_axes_go_to_the_closest(tmp_path):
    angle = np.deg2rad(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-0.5, 2.0, 3.0])  # LAS, turned by 20 degrees
    nibabel.save(nibabel.Nifti1Image(volume()[::-1], affine), tmp_path / "v.nii")
    sample = read(tmp_path / "v.nii")
    np.testing.assert_array_equal(sample.pixels[0], volume().transpose(2, 1, 0))
    assert sample.spacing == pytest.approx(ZOOMS[::-1])


def test_stored_integers_keep_slope_and_intercept(tmp_path):
    stored = volume()
    image = nibabel.Nifti1Image(stored, np.eye(4))
    image.header.set_slope_inter(0.5, -1024)
    # nibabel rescales on saving; the raw bytes are put in place so that slope and integers are known.
    path = tmp_path / "v.nii"
    nibabel.save(nibabel.Nifti1Image(stored, np.eye(4)), path)
    content = bytearray(path.read_bytes())
    content[112:120] = np.array([0.5, -1024], "<f4").tobytes()
    path.write_bytes(content)
    sample = read(path)
    np.testing.assert_array_equal(sample.pixels[0], stored.transpose(2, 1, 0))
    assert (sample.slope, sample.intercept, sample.lo, sample.hi) == (0.5, -1024, -1024, 543 / 2 - 1024)
    np.testing.assert_allclose(
        sample.normalised()[0].transpose(2, 1, 0),
        (nibabel.load(path).get_fdata() + 1024) / (543 / 2),
        rtol=1e-6,
    )
    content[112:120] = np.array([-2, 0], "<f4").tobytes()  # a falling scale: lo belongs to the largest integer
    path.write_bytes(content)
    assert (read(path).lo, read(path).hi) == (-1086, 0)


@pytest.mark.parametrize(
    ("dtype", "stored", "ends"),
    [("uint8", "uint8", (0, 255)), ("uint16", "uint16", (0, 99)), ("float32", "float32", (0, 99)),
     ("float64", "float32", (0, 99)), ("int64", "int64", (0, 99))],
)  # fmt: skip
def test_types_units_and_single_volumes(tmp_path, dtype, stored, ends):
    values = np.linspace(0, 99, 60).round().reshape(3, 4, 5, 1).astype(dtype)
    image = nibabel.Nifti1Image(values, np.diag([1e-3, 2e-3, 3e-3, 1]), dtype=dtype)
    image.header.set_xyzt_units("meter")
    nibabel.save(image, tmp_path / "v.nii.gz")
    sample = read(tmp_path / "v.nii.gz")
    assert sample.pixels.dtype == stored
    assert sample.pixels.shape == (1, 5, 4, 3)
    assert sample.spacing == pytest.approx((3.0, 2.0, 1.0))
    assert (sample.lo, sample.hi) == ends


def test_niftis_that_are_refused(tmp_path):
    eye = np.eye(4)
    save = {
        "series": (np.zeros((3, 3, 3, 2), np.int16), eye, r"one volume \(x, y, z\), got shape \(3, 3, 3, 2\)"),
        "flat": (np.zeros((3, 3), np.int16), eye, "one volume"),
        "complex": (np.zeros((3, 3, 3), np.complex64), eye, "real numbers, got complex64"),
        "colour": (np.zeros((3, 3, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")]), eye, "real numbers"),
        "nan": (np.full((2, 2, 2), np.nan, np.float32), eye, "pixels must be finite, got 8"),
        "singular": (np.zeros((2, 2, 2), np.int16), np.diag([1.0, 0, 1, 1]), "three independent axes"),
        "nowhere": (np.zeros((2, 2, 2), np.int16), np.diag([np.nan, 1, 1, 1]), "affine must be finite"),
    }
    for name, (array, affine, words) in save.items():
        image = nibabel.Nifti1Image(array, None if name in ("singular", "nowhere") else affine)
        if name in ("singular", "nowhere"):
            image.header["sform_code"] = 1
            image.header["srow_x"], image.header["srow_y"], image.header["srow_z"] = affine[:3]
            content = bytearray(image.to_bytes())
            content[252:256] = np.array([0, 1], "<i2").tobytes()
            content[280:328] = affine[:3].astype("<f4").tobytes()
            (tmp_path / f"{name}.nii").write_bytes(content)
        else:
            nibabel.save(image, tmp_path / f"{name}.nii")
        with pytest.raises(InputError, match=words) as caught:
            read(tmp_path / f"{name}.nii")
        assert f"{name}.nii cannot be read as NIfTI" in str(caught.value)
    nibabel.save(nibabel.Nifti1Image(volume(), eye), tmp_path / "whole.nii")
    whole = (tmp_path / "whole.nii").read_bytes()
    (tmp_path / "cut.nii").write_bytes(whole[:-100])
    (tmp_path / "cut.nii.gz").write_bytes(gzip.compress(whole)[:-60])
    (tmp_path / "plain.nii.gz").write_bytes(whole)
    (tmp_path / "text.nii").write_text("hello " * 100)
    for name in ("cut.nii", "cut.nii.gz", "plain.nii.gz", "text.nii"):
        with pytest.raises(InputError, match=f"{name} cannot be read as NIfTI: .+") as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["anatomical.nii", "example_nifti2.nii.gz", "example4d.nii.gz", "functional.nii"])
def test_real_small_niftis(name):
    if not (DATA / name).exists():
        pytest.skip("this nibabel came without its sample files")
    image = nibabel.load(DATA / name)
    if len(image.shape) > 3 and np.prod(image.shape[3:]) > 1:
        with pytest.raises(InputError, match="one volume"):
            read(DATA / name)
        return
    sample = read(DATA / name)
    canonical = nibabel.as_closest_canonical(image)
    expected = canonical.get_fdata().squeeze().transpose(2, 1, 0)
    np.testing.assert_allclose(sample.pixels[0] * sample.slope + sample.intercept, expected, rtol=1e-6)
    assert sample.spacing == pytest.approx(canonical.header.get_zooms()[2::-1], rel=1e-4)


def test_a_real_brain(tmp_path):
    template = pytest.importorskip("nilearn.datasets").load_mni152_template(resolution=2)
    nibabel.save(template, tmp_path / "mni.nii.gz")
    report = build_shard(tmp_path / "mni.nii.gz", tmp_path / "mni.h5")
    assert verify(report.path) == []
    with Shard(report.path) as shard:
        assert shard.sizes.tolist() == [list(template.shape[::-1])]
        sample = shard.read(0)
    assert sample.spacing == pytest.approx((2, 2, 2))
    brain = sample.normalised()[0] > 0.2
    # Superior is up: the vertex is narrower than the temporal lobes; left and right are alike.
    depth, _, width = brain.shape
    assert brain[depth * 4 // 5].sum() < brain[depth // 3].sum()
    assert brain[..., : width // 2].sum() == pytest.approx(brain[..., -(width // 2) :].sum(), rel=0.05)


# ---- folders and builds


def npy(path, shape=(4, 5), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.random.default_rng(seed).integers(0, 255, shape).astype(np.uint8))
    return path


def test_find_sources(tmp_path):
    top = tmp_path / "set"
    for name in ("b.npy", "a/z.npy", "a/y.NPY", ".hidden/c.npy", "a/.c.npy", "e.npy"):
        npy(tmp_path / "x.npy").replace(_made(top / name))
    (top / "notes.txt").touch()
    (top / "a" / "loop").symlink_to(top)
    other = npy(tmp_path / "other.npy")
    found = find_sources([other, top, top / "e.npy", str(tmp_path / "set" / "..") + "/set/b.npy"])
    assert [s.name for s in found][:5] == ["other.npy", "set/a/y.NPY", "set/a/z.npy", "set/b.npy", "set/e.npy"]
    assert all(s.path.exists() and s.kind == "npy" for s in found)
    here = Path.cwd()
    os.chdir(top)
    try:
        assert [s.name for s in find_sources(".")] == [s.name for s in found[1:5]]
    finally:
        os.chdir(here)
    for path, words in (
        (tmp_path / "nowhere", "found nothing there"),
        (top / "notes.txt", "must be one of .png, .*, got .txt"),
        (_made(tmp_path / "bare" / "x").parent, "must hold images .* found none among 0 files"),
    ):
        with pytest.raises(InputError, match=words):
            find_sources([top, path])
    with pytest.raises(InputError, match="at least 1 file or folder"):
        find_sources([])


def _made(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_build_report_and_progress(tmp_path):
    for i in range(3):
        npy(tmp_path / "in" / f"{i}.npy", (4, 5 + i), i)
    (tmp_path / "in" / "readme.md").touch()
    calls = []
    report = build_shard(tmp_path / "in", tmp_path / "s.h5", progress=lambda *call: calls.append(call))
    assert (report.samples, report.ignored, report.skipped) == (3, 1, [])
    assert report.size_bytes == (tmp_path / "s.h5").stat().st_size
    assert calls == [("reading", i, 3) for i in range(4)] + [("checking", i, 3) for i in range(1, 4)]
    with Shard(report.path) as shard:
        assert shard.preprocessing == {"preset": "raw", "size": None}
        assert shard.sizes.tolist() == [[4, 5], [4, 6], [4, 7]]


def test_bad_files_stop_the_build_or_are_skipped(tmp_path):
    for i in range(3):
        npy(tmp_path / "in" / f"{i}.npy")
    (tmp_path / "in" / "1.npy").write_bytes(b"")
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}/in/1.npy cannot be read as npy: it is empty")):
        build_shard(tmp_path / "in", tmp_path / "s.h5")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    report = build_shard(tmp_path / "in", tmp_path / "s.h5", skip_bad=True)
    assert (report.samples, report.skipped) == (2, [f"{tmp_path}/in/1.npy cannot be read as npy: it is empty"])
    with pytest.raises(InputError, match="exists already"):
        build_shard(tmp_path / "in", tmp_path / "s.h5", skip_bad=True)
    with pytest.raises(InputError, match=r"got none of 1: .*1.npy cannot be read"):
        build_shard(tmp_path / "in" / "1.npy", tmp_path / "t.h5", skip_bad=True)
    npy(tmp_path / "in" / "3.npy", (3, 4, 5))
    with pytest.raises(InputError, match=r"in/3.npy must be 2D like in/0.npy, got 3D"):
        build_shard(tmp_path / "in", tmp_path / "t.h5", skip_bad=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "s.h5"]


def test_a_colour_array_is_not_taken_for_a_volume(tmp_path: Path) -> None:
    np.save(tmp_path / "colour.npy", np.zeros((40, 50, 3), np.uint8))
    with pytest.raises(InputError, match=r"colour.npy .*\(40, 50, 3\) of uint8 looks like colour"):
        read_source(find_sources([tmp_path / "colour.npy"])[0])
