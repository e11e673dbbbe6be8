"""NRRD and MetaImage: world coordinates as SimpleITK has them, colour, several volumes, refusals."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coverfast.checks import InputError
from coverfast.ingest import Source, find_sources, read_source
from coverfast.ingest.pieces import Recipe
from coverfast.ingest.presets import preprocessing

sitk = pytest.importorskip("SimpleITK")
Rotation = pytest.importorskip("scipy.spatial.transform").Rotation

SUFFIXES = ["nrrd", "nhdr", "mha", "mhd"]


def read(path, volume=None):
    return read_source(Source(Path(path), Path(path).name), volume=volume)


def save(path, array, *, vector=False, compress=False):
    image = sitk.GetImageFromArray(array, isVector=vector)
    sitk.WriteImage(image, str(path), compress)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(
    quaternion=st.tuples(*[st.integers(-9, 9)] * 4).filter(any),
    mirror=st.booleans(),
    size=st.tuples(*[st.integers(1, 4)] * 3),
    compress=st.booleans(),
)
def test_world_coordinates_are_those_of_itk(tmp_path_factory, suffix, quaternion, mirror, size, compress):
    path = tmp_path_factory.mktemp("itk") / f"v.{suffix}"
    image = sitk.GetImageFromArray(np.arange(np.prod(size), dtype=np.int16).reshape(size))
    turn = Rotation.from_quat(quaternion).as_matrix() * ([-1, 1, 1] if mirror else 1)
    image.SetDirection(turn.ravel().tolist())
    image.SetSpacing((0.5, 2, 3))
    image.SetOrigin((-20, 30, 7))
    sitk.WriteImage(image, str(path), compress)
    image = sitk.ReadImage(str(path))
    sample = read(path)
    original = sample.original
    assert original.shape == image.GetSize()
    np.testing.assert_allclose(original.spacing, (0.5, 2, 3))
    for stored, value in np.ndenumerate(sample.pixels[0]):
        index = original.to_original @ [*stored, 1]
        ijk = tuple(int(v) for v in index[:3])
        assert image.GetPixel(ijk) == value
        lps = image.TransformIndexToPhysicalPoint(ijk)
        np.testing.assert_allclose((original.affine @ index)[:3], np.array([-1, -1, 1]) * lps, atol=1e-5)
    directions = (original.affine @ original.to_original)[:3, :3]
    np.testing.assert_allclose(sample.spacing, np.linalg.norm(directions, axis=0))
    # z, y, x lead to superior, anterior, right: no other assignment of the axes has a greater sum of cosines.
    cosines = directions[:, ::-1] / sample.spacing[::-1]
    assert np.trace(cosines) >= 1 - 1e-6


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_usual_volume_is_flipped_from_lps(tmp_path, suffix):
    array = np.random.default_rng(0).integers(-1000, 1000, (4, 5, 6)).astype(np.int16)
    sample = read(save(tmp_path / f"v.{suffix}", array, compress=True))
    np.testing.assert_array_equal(sample.pixels[0], array[:, ::-1, ::-1])
    assert (sample.original.orientation, sample.lo, sample.hi) == ("LPS", array.min(), array.max())
    (source,) = find_sources(tmp_path)
    assert len(source.files) == (2 if suffix in ("nhdr", "mhd") else 1)


NRRD = "NRRD0004\ntype: uint8\ndimension: 2\nsizes: 4 3\nencoding: raw\n"
META = "ObjectType = Image\nNDims = 2\nDimSize = 4 3\nElementType = MET_UCHAR\n"


@pytest.mark.parametrize(
    ("header", "text", "expected"),
    [
        ("v.mhd", META + "ElementDataFile = vN.bin\n", {"vN.bin"}),
        ("v.mha", META + "ElementDataFile = vN.bin\r\n", {"vN.bin"}),
        ("v.MHD", META + "ElementDataFile = my data.x\n", {"my data.x"}),
        ("v.mhd", META + "ElementDataFile = s%02d.raw 1 3 1\n", {"s01.raw", "s02.raw"}),
        ("v.mhd", META + "ElementDataFile = LIST 2\ns02.raw\nvN.bin\n", {"s02.raw", "vN.bin"}),
        ("v.mha", META + "ElementDataFile = LOCAL\n" + "x" * 12, set()),
        ("v.nhdr", NRRD + "data file: vN.bin\n", {"vN.bin"}),
        ("v.nrrd", NRRD + "datafile: ./deep/vN.bin\n\n", {"deep/vN.bin"}),
        ("v.nhdr", NRRD + "data file: s%02d.raw 1 2 1 1\n", {"s01.raw", "s02.raw"}),
        ("v.nhdr", NRRD + "data file: LIST\ns01.raw\ns02.raw\n", {"s01.raw", "s02.raw"}),
        ("v.nrrd", NRRD + "\n" + "data file: vN.bin\n", set()),
        # Where the text does not say it: all that is there.
        ("v.mhd", META + "ElementDataFile = gone.raw\n", {"vN.bin", "my data.x", "s01.raw", "s02.raw"}),
        ("v.mhd", META, {"vN.bin", "my data.x", "s01.raw", "s02.raw"}),
        ("v.nhdr", NRRD + "data file: \n", {"vN.bin", "my data.x", "s01.raw", "s02.raw"}),
    ],
)
def test_files_of_a_header_make_pieces_stale(tmp_path, header, text, expected):
    for name in ("vN.bin", "my data.x", "s01.raw", "s02.raw", "deep/vN.bin"):
        (tmp_path / "deep").mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * 12)
    (tmp_path / header).write_bytes(text.encode())
    source = Source(tmp_path / header, header)
    assert {f.relative_to(tmp_path).as_posix() for f in source.files} == {header, *expected}
    assert (source.files[0], len(source.files)) == (tmp_path / header, 1 + len(expected))
    recipe = Recipe(preprocessing("raw"), None, "none")
    for name in expected:
        key = recipe.key(source)
        (tmp_path / name).write_bytes(b"y" * 13)
        assert recipe.key(source) != key


def test_a_piece_goes_stale_with_the_file_that_is_decoded(tmp_path):
    (tmp_path / "vN.bin").write_bytes(bytes(range(12)))
    (tmp_path / "v.mhd").write_text(META + "ElementDataFile = vN.bin\n")
    (source,) = find_sources(tmp_path)
    recipe = Recipe(preprocessing("raw"), None, "none")
    before, key = read_source(source).pixels, recipe.key(source)
    (tmp_path / "vN.bin").write_bytes(bytes(range(1, 13)))
    os.utime(tmp_path / "vN.bin", ns=(0, 0))  # of the same size
    np.testing.assert_array_equal(read_source(source).pixels, before + 1)
    assert recipe.key(source) != key


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_images_colour_and_types(tmp_path, suffix):
    grey = np.random.default_rng(0).integers(0, 255, (4, 6), np.uint8)
    image = sitk.GetImageFromArray(grey)
    image.SetSpacing((0.5, 2))
    sitk.WriteImage(image, str(tmp_path / f"g.{suffix}"))
    sample = read(tmp_path / f"g.{suffix}")
    np.testing.assert_array_equal(sample.pixels[0], grey)
    assert (sample.spacing, sample.original.shape, sample.original.affine) == ((2, 0.5), (4, 6), None)
    rgb = np.random.default_rng(0).integers(0, 255, (4, 6, 3), np.uint8)
    sample = read(save(tmp_path / f"c.{suffix}", rgb, vector=True))
    assert np.abs(sample.pixels[0] - rgb @ np.array([0.299, 0.587, 0.114])).max() <= 0.51
    for dtype in (np.uint8, np.uint16, np.int32, np.float32, np.float64):
        sample = read(save(tmp_path / f"t.{suffix}", np.full((2, 3, 4), 7, dtype)))
        assert sample.pixels.dtype == (np.float32 if np.dtype(dtype).kind == "f" else dtype)
        assert (sample.pixels == 7).all()


def test_one_of_several_volumes(tmp_path):
    several = np.random.default_rng(0).integers(0, 99, (3, 4, 5, 6)).astype(np.int16)
    image = sitk.GetImageFromArray(several, isVector=False)
    image.SetSpacing((1, 2, 3, 9))
    sitk.WriteImage(image, str(tmp_path / "v.nrrd"))
    sample = read(tmp_path / "v.nrrd", 2)
    np.testing.assert_array_equal(sample.pixels[0], several[2, :, ::-1, ::-1])
    assert sample.spacing == (3, 2, 1)
    with pytest.raises(InputError, match=r"v.nrrd cannot be read as NRRD: it holds 3 volumes, .*--volume 0 to 2"):
        read(tmp_path / "v.nrrd")


def test_what_is_refused(tmp_path):
    save(tmp_path / "vector.nrrd", np.zeros((2, 3, 4, 3), np.float32), vector=True)
    save(tmp_path / "complex.mha", np.zeros((2, 3, 4), np.complex64))
    whole = save(tmp_path / "whole.nrrd", np.zeros((9, 9, 9), np.int16)).read_bytes()
    (tmp_path / "cut.nrrd").write_bytes(whole[:-100])
    (tmp_path / "other.mha").write_bytes(whole)
    (tmp_path / "text.nrrd").write_text("hello")
    save(tmp_path / "nan.mha", np.full((2, 2, 2), np.nan, np.float32))
    save(tmp_path / "alone.mhd", np.zeros((2, 2, 2), np.int16))
    (tmp_path / "alone.raw").unlink()
    cases = {
        "vector.nrrd": "one value a pixel or RGB of uint8, got 3 of float32",
        "complex.mha": "one value a pixel or RGB of uint8, got 2 of float32",
        "cut.nrrd": ".+",
        "other.mha": ".+",
        "text.nrrd": ".+",
        "nan.mha": "pixels must be finite, got 8",
        "alone.mhd": ".+",
    }
    for name, words in cases.items():
        with pytest.raises(InputError, match=f"{name} cannot be read as (NRRD|MetaImage): .*{words}") as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert "0x" not in str(caught.value)
