"""Files people have to samples: values, orientation, spacing, refusals."""

from __future__ import annotations

import errno
import os
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from coverfast.checks import InputError
from coverfast.ingest import Source, Unreadable, find_sources, read_source

Image = pytest.importorskip("PIL.Image")

RADIOGRAPHS = Path(__file__).resolve().parents[2] / "shared" / "data" / "chestxray"


def read(path):
    return read_source(Source(Path(path), Path(path).name))


def ramp(shape=(12, 20), high=255, dtype=np.uint8):
    return np.linspace(0, high, int(np.prod(shape))).reshape(shape).astype(dtype)


def save(path, array, mode=None, **options):
    image = Image.fromarray(array) if mode is None else Image.fromarray(array).convert(mode)
    image.save(path, **options)
    return path


# ---- images


@pytest.mark.parametrize("suffix", ["png", "tif", "TIFF"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_images_keep_their_integers(tmp_path, suffix, dtype):
    pixels = ramp(high=np.iinfo(dtype).max, dtype=dtype)
    sample = read(save(tmp_path / f"a.{suffix}", pixels))
    np.testing.assert_array_equal(sample.pixels, pixels[None])
    assert sample.pixels.dtype == dtype
    assert (sample.slope, sample.intercept, sample.spacing, sample.source) == (1, 0, (1, 1), f"a.{suffix}")
    assert (sample.lo, sample.hi) == ((0, 255) if dtype == np.uint8 else (0, 65535))


def test_lo_and_hi(tmp_path):
    narrow = np.array([[5, 9], [7, 6]], np.uint16)
    assert [getattr(read(save(tmp_path / "a.png", narrow)), k) for k in ("lo", "hi")] == [5, 9]
    assert [getattr(read(save(tmp_path / "b.png", narrow.astype(np.uint8))), k) for k in ("lo", "hi")] == [0, 255]


def test_tiff_numbers_of_all_kinds(tmp_path):
    for number, dtype in enumerate([np.int32, np.float32]):
        pixels = (ramp() * 100.0 - 3000).astype(dtype)
        sample = read(save(tmp_path / f"{number}.tif", pixels))
        assert sample.pixels.dtype == dtype
        np.testing.assert_array_equal(sample.pixels[0], pixels)
        assert (sample.lo, sample.hi) == (pixels.min(), pixels.max())
    # Sample format and bits as tags: Pillow has no mode of its own for these and widens or wraps them.
    big = np.array([[0, 2**31], [2**32 - 1, 7]], np.uint32)
    content = save(tmp_path / "u.tif", big.view(np.int32)).read_bytes()
    signed, unsigned = (struct.pack("<HHIHH", 339, 3, 1, kind, 0) for kind in (2, 1))
    assert signed in content
    (tmp_path / "u.tif").write_bytes(content.replace(signed, unsigned))
    np.testing.assert_array_equal(read(tmp_path / "u.tif").pixels[0], big)
    content = save(tmp_path / "s.tif", np.array([[0, 40000]], np.uint16)).read_bytes()
    planar = struct.pack("<HHIHH", 284, 3, 1, 1, 0)  # the last tag, and without meaning for one channel
    assert planar in content
    (tmp_path / "s.tif").write_bytes(content.replace(planar, signed))
    assert read(tmp_path / "s.tif").pixels.tolist() == [[[0, 40000 - 65536]]]
    assert read(tmp_path / "s.tif").pixels.dtype == np.int16


def test_big_endian_tiff(tmp_path):
    pixels = ramp(high=60000, dtype=np.uint16)
    Image.fromarray(pixels.astype(">u2")).save(tmp_path / "b.tif")
    sample = read(tmp_path / "b.tif")
    np.testing.assert_array_equal(sample.pixels[0], pixels)
    assert sample.pixels.dtype.isnative


def test_colour_becomes_luma_and_alpha_is_dropped(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)
    luma = rgb @ np.array([0.299, 0.587, 0.114])
    alpha = np.concatenate([rgb, np.zeros((9, 7, 1), np.uint8)], -1)
    for name, array in (("a.png", rgb), ("b.png", alpha), ("c.tif", rgb)):
        sample = read(save(tmp_path / name, array))
        assert np.abs(sample.pixels[0] - luma).max() <= 0.51
    grey = ramp()
    save(tmp_path / "la.png", grey, "LA")
    save(tmp_path / "p.png", grey, "P")
    palette = Image.fromarray(grey).convert("P")
    palette.save(tmp_path / "pt.png", transparency=bytes(range(256)))
    for name in ("la.png", "p.png", "pt.png"):
        np.testing.assert_array_equal(read(tmp_path / name).pixels[0], grey)
    save(tmp_path / "1.png", (grey > 99), None)
    np.testing.assert_array_equal(read(tmp_path / "1.png").pixels[0], np.where(grey > 99, 255, 0))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg(tmp_path, mode):
    grey = ramp((64, 64))
    save(tmp_path / "a.jpg", grey, mode, quality=95)
    assert np.abs(read(tmp_path / "a.jpg").pixels[0].astype(int) - grey).mean() < 4


def test_the_first_of_several_jpegs_in_one_file(tmp_path):
    first, second = (Image.fromarray(np.full((16, 16), value, np.uint8)) for value in (50, 150))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    assert abs(int(read(tmp_path / "a.jpg").pixels[0, 8, 8]) - 50) < 3


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_exif_orientation_is_applied(tmp_path, suffix):
    grey = np.zeros((32, 48), np.uint8)
    grey[:16, :24] = 200  # top left
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to show
    save(tmp_path / f"a.{suffix}", grey, exif=exif)
    pixels = read(tmp_path / f"a.{suffix}").pixels[0]
    assert pixels.shape == (48, 32)
    assert read(tmp_path / f"a.{suffix}").original.shape == (48, 32)
    assert pixels[4:20, 20:28].min() > 190
    assert pixels[28:, :].max() < 10


def test_images_that_are_refused(tmp_path, monkeypatch):
    grey = ramp((40, 40))
    pages = [Image.fromarray(grey)] * 3
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    whole = save(tmp_path / "whole.png", np.random.default_rng(0).integers(0, 255, (90, 90), np.uint8)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.jpg").write_bytes(save(tmp_path / "whole.jpg", grey).read_bytes()[:-30])
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    save(tmp_path / "deep.png", grey)
    header = bytearray((tmp_path / "whole.png").read_bytes())
    header[24:26] = bytes([16, 2])  # 16-bit colour
    import zlib

    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    (tmp_path / "deep.png").write_bytes(header)
    save(tmp_path / "white.tif", grey.astype(np.uint16), tiffinfo={262: 0})
    save(tmp_path / "lab.tif", np.stack([grey] * 3, -1), "RGB")
    Image.merge("LAB", [Image.fromarray(grey)] * 3).save(tmp_path / "lab.tif")
    nan = ramp().astype(np.float32)
    nan[3] = np.nan
    save(tmp_path / "nan.tif", nan)
    cases = {
        "pages.tif": "3 pages or frames, expected 1",
        "empty.png": "it is empty",
        "text.png": "cannot identify image file it",
        "cut.png": "truncated",
        "cut.jpg": "truncated",
        "folder.png": "no regular file",
        "dangling.png": "No such file",
        "deep.png": "channels of 16 bits, which Pillow would cut to 8",
        "white.tif": "white as 0",
        "lab.tif": "colour mode LAB is not supported",
        "nan.tif": "pixels must be finite, got 20 NaN",
    }
    for name, words in cases.items():
        with pytest.raises(InputError, match=re.escape(words)) as caught:
            read(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name} cannot be read as ")
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with pytest.raises(InputError, match=r"whole.jpg cannot be read as JPEG: .*decompression bomb"):
        read(tmp_path / "whole.jpg")


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    save(tmp_path / "a.png", ramp())
    np.save(tmp_path / "b.npy", ramp())
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    words = re.escape("reading PNG needs the extra: pip install coverfast[io]")
    with pytest.raises(InputError, match=words) as caught:
        read(tmp_path / "a.png")
    assert not isinstance(caught.value, Unreadable)  # not a bad file, to be skipped
    assert read(tmp_path / "b.npy").pixels.shape == (1, 12, 20)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM, errno.EACCES, None])
def test_a_machine_that_fails_is_not_a_broken_file(tmp_path, monkeypatch, number):
    """Only what is wrong with the file may be skipped; a decoder may wrap what the system said."""
    np.save(tmp_path / "a.npy", ramp())

    def fail(*args, **kwargs):
        try:
            raise OSError(number, "") if number else MemoryError
        except (OSError, MemoryError) as error:
            raise ValueError("no image") from error

    monkeypatch.setattr(np, "load", fail)
    with pytest.raises((InputError, MemoryError)) as caught:
        read(tmp_path / "a.npy")
    assert type(caught.value) is {None: MemoryError, errno.EACCES: Unreadable}.get(number, InputError)
    if type(caught.value) is InputError:
        assert str(caught.value).startswith(f"{tmp_path / 'a.npy'} must be read by a sound machine, found: ")
        assert str(caught.value).endswith(os.strerror(number))


# ---- npy


@pytest.mark.parametrize(
    ("array", "shape", "dtype", "ends"),
    [
        (ramp((4, 5)), (1, 4, 5), np.uint8, (0, 255)),
        (np.array([[True, True]]), (1, 1, 2), np.uint8, (0, 1)),
        (ramp((3, 4, 5)).astype(">i2"), (1, 3, 4, 5), np.int16, (0, 255)),
        (np.asfortranarray(ramp((2, 3, 4, 5)).astype(np.uint64)), (2, 3, 4, 5), np.uint64, (0, 255)),
        (ramp((4, 5)) / 3.0, (1, 4, 5), np.float32, (0, 85)),
        (1000 + ramp((4, 5)) / 255.0, (1, 4, 5), np.float32, (1000, 1001)),
        (np.full((4, 5), 1e9), (1, 4, 5), np.float32, (1e9, 1e9)),
        (ramp((4, 5)).astype(np.float16), (1, 4, 5), np.float32, (0, 255)),
    ],
)
def test_npy(tmp_path, array, shape, dtype, ends):
    np.save(tmp_path / "a.npy", array)
    sample = read(tmp_path / "a.npy")
    assert (sample.pixels.shape, sample.pixels.dtype) == (shape, dtype)
    np.testing.assert_allclose(sample.pixels.reshape(array.shape), array, rtol=1e-6)
    assert (sample.lo, sample.hi) == ends
    assert sample.spacing == (1.0,) * (len(shape) - 1)


def test_npy_that_is_refused(tmp_path):
    cases = {
        "complex": (np.zeros((2, 2), complex), "must hold real numbers, got complex128"),
        "text": (np.array([["a"]]), "must hold real numbers"),
        "object": (np.array([[{}]]), "[Pp]ython objects"),
        "line": (np.zeros(3), r"got shape \(3,\)"),
        "five": (np.zeros((1,) * 5), "got shape"),
        "none": (np.zeros((3, 0)), "cannot be read as npy"),
        "huge": (np.full((2, 2), 1e300), "pixels must be finite, got 4"),
        "far": (1e9 + ramp((4, 5)) / 255.0, "apart enough for float32, got 1000000000.0 to 1000000001.0; subtract"),
    }
    for name, (array, words) in cases.items():
        np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
        with pytest.raises(InputError, match=words) as caught:
            read(tmp_path / f"{name}.npy")
        assert f"{name}.npy cannot be read as npy" in str(caught.value)
    whole = (tmp_path / "huge.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-3])
    (tmp_path / "bomb.npy").write_bytes(whole.replace(b"(2, 2)", b"(99999999, 99999999)"))
    for name in ("cut", "bomb"):
        with pytest.raises(InputError, match=f"{name}.npy cannot be read"):
            read(tmp_path / f"{name}.npy")


def test_npz(tmp_path):
    pixels = ramp((3, 4, 5)).astype(">i2")
    np.savez_compressed(tmp_path / "a.npz", image=pixels)
    sample = read(tmp_path / "a.npz")
    np.testing.assert_array_equal(sample.pixels[0], pixels)
    assert sample.pixels.dtype == np.int16
    assert sample.pixels.dtype.isnative
    np.savez(tmp_path / "several.npz", image=pixels, label=pixels)
    np.savez(tmp_path / "none.npz")
    np.savez(tmp_path / "object.npz", a=np.array([{}]))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "several.npz").read_bytes()[:-40])
    cases = {
        "several": r"it must hold 1 array, got 2 \(image, label\); save the image alone",
        "none": "it must hold 1 array, got 0",
        "object": "allow_pickle",
        "cut": "zip",
    }
    for name, words in cases.items():
        with pytest.raises(Unreadable, match=f"{name}.npz cannot be read as npz: .*{words}"):
            read(tmp_path / f"{name}.npz")


@pytest.mark.skipif(not RADIOGRAPHS.is_dir(), reason="the shared radiographs are not here")
def test_real_radiographs():
    sources = find_sources(RADIOGRAPHS)
    files = sorted(RADIOGRAPHS.glob("*.png"))
    assert [s.name for s in sources] == [f"chestxray/{f.name}" for f in files]
    for source, file in zip(sources, files, strict=True):
        with Image.open(file) as image:
            np.testing.assert_array_equal(read_source(source).pixels[0], np.asarray(image.convert("L")))
