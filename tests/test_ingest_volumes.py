"""NIfTI: orientation, spacing, scaling; folders, names and groups."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from coverfast.checks import InputError
from coverfast.ingest import Source, find_sources, read_source, scan

nibabel = pytest.importorskip("nibabel")

ZOOMS = (0.5, 2.0, 3.0)
DATA = Path(nibabel.__file__).parent / "tests" / "data"


def read(path, volume=None):
    return read_source(Source(Path(path), Path(path).name), volume=volume)


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


@given(
    st.permutations(range(3)),
    st.tuples(*[st.sampled_from([-1, 1])] * 3),
    arrays(np.float64, (3, 3), elements=st.floats(-0.3, 0.3)),
    st.tuples(*[st.integers(1, 5)] * 3),
    st.sampled_from([("mm", 1), ("micron", 1e-3), ("meter", 1e3)]),
)
def test_the_file_can_be_found_again_from_every_pixel(tmp_path_factory, order, signs, skew, shape, unit):
    path = tmp_path_factory.mktemp("any") / "v.nii"
    # File axis i runs along world axis order[i], turned and sheared by up to 0.3 of its length an axis.
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3)[:, order] * signs + skew) @ np.diag(ZOOMS)
    affine[:3, 3] = (-20, 30, 7)
    file = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    image = nibabel.Nifti1Image(file, affine)
    image.header.set_xyzt_units(unit[0])
    nibabel.save(image, path)
    sample = read(path)
    original = sample.original
    affine = nibabel.load(path).affine  # through float32
    assert (original.shape, original.orientation) == (shape, "".join(nibabel.aff2axcodes(affine)))
    np.testing.assert_allclose(original.affine, np.diag([unit[1]] * 3 + [1]) @ affine)
    for value in range(file.size):
        (stored,) = np.argwhere(sample.pixels[0] == value)
        np.testing.assert_array_equal(
            original.to_original @ [*stored, 1], [*np.argwhere(file == value)[0], 1], err_msg=str(value)
        )
    zyx = original.affine @ original.to_original
    assert (np.abs(zyx[:3, 2::-1]).argmax(0) == range(3)).all()
    assert (np.diag(zyx[:3, 2::-1]) > 0).all()  # to the right, to anterior, to superior
    np.testing.assert_allclose(sample.spacing, np.linalg.norm(zyx[:3, :3], axis=0))
    assert sorted(original.spacing) == pytest.approx(sorted(sample.spacing))


def test_a_sheared_header_goes_to_the_closest_axes(tmp_path):
    affine = np.diag([*ZOOMS, 1.0])
    affine[1, 2] = 1.2  # a tilted gantry: 22 degrees
    file = volume()[:, :, ::-1]
    affine[:, 2] *= -1
    nibabel.save(nibabel.Nifti1Image(file, affine), tmp_path / "v.nii")
    sample = read(tmp_path / "v.nii")
    np.testing.assert_array_equal(sample.pixels[0], volume().transpose(2, 1, 0))
    assert sample.spacing == pytest.approx((np.hypot(3, 1.2), 2, 0.5))


def test_one_of_several_volumes(tmp_path):
    several = np.stack([volume(), volume() + 1, volume() + 2], -1)
    nibabel.save(nibabel.Nifti1Image(several, np.eye(4)), tmp_path / "v.nii.gz")
    for number in range(3):
        sample = read(tmp_path / "v.nii.gz", number)
        np.testing.assert_array_equal(sample.pixels[0], volume().transpose(2, 1, 0) + number)
        assert sample.original.shape == (4, 5, 6)
    with pytest.raises(InputError, match=r"holds 3 volumes, shape \(4, 5, 6, 3\); choose one with --volume 0 to 2"):
        read(tmp_path / "v.nii.gz")
    with pytest.raises(InputError, match=r"holds 3 volumes, .*; --volume must be below, got 3"):
        read(tmp_path / "v.nii.gz", 3)
    nibabel.save(nibabel.Nifti1Image(volume()[..., None], np.eye(4)), tmp_path / "one.nii")
    assert read(tmp_path / "one.nii", 7).pixels.shape == (1, 6, 5, 4)
    for number in (-1, 1.0, True):
        with pytest.raises(InputError, match="volume must be an int of at least 0"):
            read(tmp_path / "one.nii", number)


@pytest.mark.parametrize("suffix", ["nii", "nii.gz", "nrrd", "mha", "npz"])
def test_too_many_open_files_make_no_file_unreadable(tmp_path, suffix):
    resource = pytest.importorskip("resource")
    path = tmp_path / f"v.{suffix}"
    if suffix.startswith("nii"):
        nibabel.save(nibabel.Nifti1Image(volume(), np.eye(4)), path)
    elif suffix == "npz":
        np.savez(path, volume())
    else:
        sitk = pytest.importorskip("SimpleITK")
        sitk.WriteImage(sitk.GetImageFromArray(volume()), str(path))
    read(path)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, limits[1]))
        with contextlib.suppress(OSError):
            for _ in range(129):
                stack.enter_context(path.open("rb"))
        with pytest.raises(InputError, match="must be read by a sound machine, found: Too many open files") as caught:
            read(path)
    assert type(caught.value) is InputError
    assert read(path).pixels.size == volume().size


@pytest.mark.parametrize("dtype", [np.int16, ">i2", np.float32])
@pytest.mark.parametrize("suffix", ["nii", "nii.gz", "hdr"])
def test_only_the_chosen_volume_is_read(tmp_path, suffix, dtype):
    several = np.random.default_rng(0).integers(0, 999, (30, 20, 10, 1, 40)).astype(dtype)[..., 0, :]
    image = (nibabel.Nifti1Pair if suffix == "hdr" else nibabel.Nifti1Image)(several, np.eye(4))
    nibabel.save(image, tmp_path / f"v.{suffix}")
    read(tmp_path / f"v.{suffix}", 0)  # imports
    tracemalloc.start()
    sample = read(tmp_path / f"v.{suffix}", 37)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(sample.pixels[0], several[..., 37].transpose(2, 1, 0))
    assert sample.pixels.dtype == several.dtype.newbyteorder("=")
    assert peak < several.nbytes / 2 or suffix == "nii"


def test_a_pair_of_header_and_image(tmp_path):
    nibabel.save(nibabel.Nifti1Pair(volume(), np.diag([-1, 1, 1, 1])), tmp_path / "v.img")
    (source,) = find_sources(tmp_path)
    assert [f.name for f in source.files] == ["v.hdr", "v.img"]
    np.testing.assert_array_equal(read_source(source).pixels[0], volume()[::-1].transpose(2, 1, 0))
    nibabel.save(nibabel.AnalyzeImage(volume(), np.eye(4)), tmp_path / "old.hdr")
    with pytest.raises(InputError, match=r"old.hdr cannot be read as NIfTI: it is no NIfTI"):
        read(tmp_path / "old.hdr")


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
        "vectors": (np.zeros((3, 3, 3, 1, 2), np.int16), eye, r"a volume \(x, y, z\), got shape \(3, 3, 3, 1, 2\)"),
        "flat": (np.zeros((3, 3), np.int16), eye, "must be a volume"),
        "complex": (np.zeros((3, 3, 3), np.complex64), eye, "real numbers, got complex64"),
        "colour": (np.zeros((3, 3, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")]), eye, "real numbers"),
        "nan": (np.full((2, 2, 2), np.nan, np.float32), eye, "pixels must be finite, got 8"),
        "singular": (np.zeros((2, 2, 2), np.int16), np.diag([1.0, 0, 1, 1]), "three independent axes"),
        "dependent": (np.zeros((2, 2, 2), np.int16), np.eye(4)[:, [0, 0, 2, 3]], "three independent axes"),
        "nowhere": (np.zeros((2, 2, 2), np.int16), np.diag([np.nan, 1, 1, 1]), "affine must be finite"),
    }
    for name, (array, affine, words) in save.items():
        image = nibabel.Nifti1Image(array, None if name in ("singular", "dependent", "nowhere") else affine)
        if name in ("singular", "dependent", "nowhere"):
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
    several = len(image.shape) > 3 and image.shape[3] > 1
    if several:
        with pytest.raises(InputError, match=f"it holds {image.shape[3]} volumes"):
            read(DATA / name)
    sample = read(DATA / name, 1)
    canonical = nibabel.as_closest_canonical(image)
    expected = canonical.get_fdata()[..., 1] if several else canonical.get_fdata().squeeze()
    np.testing.assert_allclose(sample.pixels[0] * sample.slope + sample.intercept, expected.transpose(2, 1, 0), 1e-6)
    assert sample.spacing == pytest.approx(canonical.header.get_zooms()[2::-1], rel=1e-4)


def test_a_real_brain(tmp_path):
    template = pytest.importorskip("nilearn.datasets").load_mni152_template(resolution=2)
    nibabel.save(template, tmp_path / "mni.nii.gz")
    sample = read(tmp_path / "mni.nii.gz")
    assert sample.pixels.shape == (1, *template.shape[::-1])
    assert sample.spacing == pytest.approx((2, 2, 2))
    brain = sample.normalised()[0] > 0.2
    # Superior is up: the vertex is narrower than the temporal lobes; left and right are alike.
    depth, _, width = brain.shape
    assert brain[depth * 4 // 5].sum() < brain[depth // 3].sum()
    assert brain[..., : width // 2].sum() == pytest.approx(brain[..., -(width // 2) :].sum(), rel=0.05)


# ---- folders, names and groups


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
        (top / "notes.txt", "must be DICOM or one of .png, .*, got .txt"),
        (_made(tmp_path / "bare" / "x").parent, "must hold images .* found none among 0 files"),
    ):
        with pytest.raises(InputError, match=words):
            find_sources([top, path])
    with pytest.raises(InputError, match="at least 1 file or folder"):
        find_sources([])


def _made(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_order_and_report_do_not_depend_on_the_file_system(tmp_path, monkeypatch):
    for name in ("b.npy", "a/z.npy", "a.npy", "c.npy"):
        npy(_made(tmp_path / "set" / name))
    (tmp_path / "set" / "a" / "notes.txt").write_text("no image")
    os.mkfifo(tmp_path / "set" / "pipe")
    found = scan(tmp_path / "set")
    assert [s.name for s in found.sources] == ["set/a.npy", "set/a/z.npy", "set/b.npy", "set/c.npy"]
    assert (found.ignored, found.refused) == (2, [])
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *a, **k: ((h, f, files[::-1]) for h, f, files in walk(*a, **k)))
    assert scan([tmp_path / "set" / "c.npy", tmp_path / "set"]).sources[0].name == "c.npy"
    assert scan([tmp_path / "set" / "b.npy", tmp_path / "set"]).sources[1:] == found.sources[:2] + found.sources[3:]
    assert scan(tmp_path / "set") == found


def test_groups(tmp_path):
    for name in ("sub-01/ses-1/anat/sub-01_T1w", "sub-01/ses-2/anat/sub-01_T1w", "sub-02_T1w", "sub", "mysub-03"):
        npy(tmp_path / "set" / f"{name}.npy")

    def groups(pattern=None):
        return {s.name[4:]: s.group for s in scan(tmp_path / "set", group=pattern).sources}

    assert groups() == {
        "sub-01/ses-1/anat/sub-01_T1w.npy": "sub-01",
        "sub-01/ses-2/anat/sub-01_T1w.npy": "sub-01",
        "sub-02_T1w.npy": "sub-02",
        "sub.npy": "",
        "mysub-03.npy": "",
    }
    assert set(groups("(sub)").values()) == {"sub"}
    assert set(groups("set/[a-z]+").values()) == {"set/sub", "set/mysub"}
    for pattern, words in (
        (r"sub-(\d+)", "group must match every name, got no match in set/sub.npy"),
        ("x*", "group must match something in every name"),
        ("(", "group must be a regular expression, got '\\('"),
    ):
        with pytest.raises(InputError, match=words):
            groups(pattern)
    sample = read_source(scan(tmp_path / "set").sources[1])
    assert (sample.source, sample.group) == ("set/sub-01/ses-1/anat/sub-01_T1w.npy", "sub-01")


def test_many_files_take_some_hundred_bytes_each(tmp_path):
    (tmp_path / "set").mkdir()
    for i in range(4000):
        (tmp_path / "set" / f"{i:05d}.npy").touch()
    scan(tmp_path)
    tracemalloc.start()
    found = scan(tmp_path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.sources) == 4000
    assert kept / 4000 < 700
    assert peak / 4000 < 1500


def test_a_colour_array_is_not_taken_for_a_volume(tmp_path: Path) -> None:
    np.save(tmp_path / "colour.npy", np.zeros((40, 50, 3), np.uint8))
    with pytest.raises(InputError, match=r"colour.npy .*\(40, 50, 3\) of uint8 looks like colour"):
        read_source(find_sources([tmp_path / "colour.npy"])[0])
