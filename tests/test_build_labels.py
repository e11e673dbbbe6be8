"""Label maps and classes of a build: matched by name, on the image's grid, carried by nearest pixel, or refused."""

from __future__ import annotations

import struct
import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

import coverfast.cli
from coverfast.checks import InputError
from coverfast.ingest import build_shard, preprocess, preprocessing
from coverfast.ingest.files import Source, scan
from coverfast.ingest.label_maps import read_map
from coverfast.ingest.readers import read_source
from coverfast.samples import LabelClass, Original, Sample
from coverfast.shards import Shard, verify

nibabel = pytest.importorskip("nibabel")


@pytest.fixture
def coverfast_shards(monkeypatch, capsys):
    """Run `coverfast shards` in this process; returns what it printed, or the one sentence of a refusal."""

    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["coverfast", "shards", *map(str, arguments)])
        try:
            coverfast.cli.main()
            ended: object = 0
        except SystemExit as end:
            ended = end.code or 0
        said = capsys.readouterr()
        assert ended == code, said.err
        if not code:
            return said.out
        (line,) = said.err.splitlines()
        assert line.startswith("error: ")
        return line

    return run


def png(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def noise(seed=0, shape=(20, 30), top=255):
    return np.random.default_rng(seed).integers(0, top, shape, endpoint=True).astype(np.uint8)


def pairs(tmp_path, names, ending=""):
    """PNG images and label maps of the values 0 to 3, none of which lacks one."""
    for seed, name in enumerate(names):
        png(tmp_path / "images" / f"{name}.png", noise(seed))
        png(tmp_path / "labels" / f"{name}{ending}.png", noise(seed + 100, top=3))
    return tmp_path / "images", tmp_path / "labels"


def build(images, out, *, preset="raw", **options):
    return build_shard(images, out, preprocessing=preprocessing(preset), **{"workers": 0} | options)


# ---- values on the image's grid


@st.composite
def grids(draw, whole=False):
    """Labels `(*S)`, and the size, step and origin of another grid that touches them."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=2, max_size=3)))
    size = [draw(st.integers(1, 9)) for _ in shape]
    step = [1.0 if whole else draw(st.floats(0.2, 3)) for _ in shape]
    origin = [float(draw(st.integers(-4, 4) if whole else st.floats(-4, 4))) for _ in shape]
    inside = [
        any(-0.5 <= o + s * i <= n - 0.5 for i in range(count))
        for n, count, s, o in zip(shape, size, step, origin, strict=True)
    ]
    assume(all(inside))
    labels = np.random.default_rng(draw(st.integers(0, 99))).integers(1, 2 ** draw(st.integers(1, 31)), shape)
    return labels.astype(np.min_scalar_type(int(labels.max()))), size, step, origin


def moved(labels, size, step, origin, flips):
    """`labels` beside an image that a preset would have brought from a turned file onto that grid."""
    ndim = labels.ndim
    before = np.diag([*(-1.0 if f else 1.0 for f in flips), 1.0])
    before[:ndim, ndim] = [n - 1 if f else 0 for f, n in zip(flips, labels.shape, strict=True)]
    to_old = np.diag([*step, 1.0])
    to_old[:ndim, ndim] = origin
    start = Original(labels.shape, before)
    read = Sample(np.zeros((1, *labels.shape), np.uint8), 1, 0, 0, 1, (1.0,) * ndim, "a", original=start, labels=labels)

    def chain(sample, **_):
        there = replace(start, to_original=before @ to_old)
        return replace(sample, pixels=np.zeros((1, *size), np.uint8), original=there)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules["coverfast.ingest.presets"]._CHAINS, "raw", chain)
        return preprocess(read, preprocessing("raw"))


@given(grids(), st.lists(st.booleans(), min_size=3, max_size=3))
def test_every_label_is_that_of_the_nearest_pixel_of_the_file(grid, flips):
    labels, size, step, origin = grid
    result = moved(labels, size, step, origin, flips[: labels.ndim])
    in_file = labels[tuple(slice(None, None, -1 if f else 1) for f in flips[: labels.ndim])]
    assert result.labels.shape == tuple(size)
    assert result.labels.dtype == labels.dtype
    assert set(np.unique(result.labels)) <= {0, *np.unique(labels)}
    for index in np.ndindex(*size):
        at = (result.original.to_original @ [*index, 1.0])[:-1]
        # Between two pixels, and on the outer edge, rounding decides.
        near = [sorted({int(np.floor(v + 0.5 + d)) for d in (-1e-6, 1e-6)}) for v in at]
        values = set()
        for picked in np.ndindex(*map(len, near)):
            place = tuple(n[k] for n, k in zip(near, picked, strict=True))
            ok = all(0 <= p < n for p, n in zip(place, in_file.shape, strict=True))
            values.add(int(in_file[place]) if ok else 0)
        edge = any(min(abs(v + 0.5), abs(v - n + 0.5)) < 1e-5 for v, n in zip(at, in_file.shape, strict=True))
        assert edge or int(result.labels[index]) in values


@given(grids(whole=True), st.lists(st.booleans(), min_size=3, max_size=3))
def test_whole_steps_copy_every_label(grid, flips):
    labels, size, _, origin = grid
    result = moved(labels, size, [1.0] * labels.ndim, origin, flips[: labels.ndim])
    expected = np.zeros(size, labels.dtype)
    for index in np.ndindex(*size):
        place = tuple(i + int(o) for i, o in zip(index, origin, strict=True))
        if all(0 <= p < n for p, n in zip(place, labels.shape, strict=True)):
            expected[index] = labels[place]
    np.testing.assert_array_equal(result.labels, expected)


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
def test_a_preset_in_2d_brings_image_and_labels_to_one_place(tmp_path, fit):
    labels = np.zeros((40, 60), np.uint8)
    labels[8:20, 20:44] = 7
    png(tmp_path / "images" / "a.png", labels * 30)
    png(tmp_path / "labels" / "a.png", labels)
    chosen = preprocessing("chest-xray", size=30, fit=fit)
    path = build_shard(
        tmp_path / "images", tmp_path / "s.h5", preprocessing=chosen, labels=tmp_path / "labels", workers=0
    ).paths[0]
    with Shard(path) as shard:
        sample = shard.read(0)
        assert shard.label_classes == (LabelClass(0, "background"), LabelClass(7, "7"))
        np.testing.assert_array_equal(shard.labels(0)[0], sample.labels == 7)
    assert set(np.unique(sample.labels)) == {0, 7}
    bright = sample.pixels[0] > 105
    assert (bright != (sample.labels == 7)).sum() <= 2 * (bright.sum() ** 0.5)
    assert (sample.labels == 7).sum() > 50


# ---- volumes, by real files through the command line


def oblique():
    """A rotated, anisotropic, flipped affine."""
    angle = 0.35
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn * (-0.9, 0.8, 2.5)
    affine[:3, 3] = (12, -30, 4)
    return affine


def head(seed=0):
    """A bright ball off the middle, and labels 2 and 5 of its halves."""
    i, j, k = np.meshgrid(*map(np.arange, (24, 28, 10)), indexing="ij")
    ball = ((i - 13) ** 2 * 0.81 + (j - 12) ** 2 * 0.64 + (k - 5) ** 2 * 6.25) < 70
    labels = np.where(ball, np.where(j < 12, 2, 5), 0).astype(np.uint8)
    image = 200 * ball + np.random.default_rng(seed).integers(0, 20, ball.shape)
    return image.astype(np.int16), labels


def nifti(path, array, affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(array, affine).to_filename(path)
    return path


@pytest.mark.parametrize(
    ("preset", "flags"),
    [
        ("brain-mr", ("--shape", "24,24,24")),
        ("ct", ("--spacing", "1.2", "--clip", "0,256")),
        ("raw", ()),
    ],
)
def test_volumes_come_back_over_their_image(tmp_path, coverfast_shards, preset, flags):
    image, labels = head()
    affine = oblique()
    nifti(tmp_path / "images" / "sub-01" / "case_0000.nii.gz", image, affine)
    # The same voxels in another order of axes, as floats: what lies where is what counts.
    turn = nibabel.orientations.axcodes2ornt("PSL")
    other = nibabel.Nifti1Image(labels.astype(np.float32), affine).as_reoriented(
        nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), turn)
    )
    (tmp_path / "labels" / "sub-01").mkdir(parents=True)
    other.to_filename(tmp_path / "labels" / "sub-01" / "case.nii.gz")
    (tmp_path / "t.csv").write_text("\ufeffvalue, name\n2, front\n5,back\n9,absent\n", encoding="utf-8")
    out = tmp_path / "s.h5"
    given = ("--labels", tmp_path / "labels", "--label-table", tmp_path / "t.csv", "--preset", preset, *flags)
    coverfast_shards("build", tmp_path / "images", "--out", out, "--workers", 0, *given)
    assert verify(out) == []
    with Shard(out) as shard:
        assert shard.label_classes == ((0, "background"), (2, "front"), (5, "back"), (9, "absent"))
        sample = shard.read(0)
    assert set(np.unique(sample.labels)) == {0, 2, 5}
    checked = 0
    for index in np.ndindex(*sample.labels.shape):
        at = (sample.original.to_original @ [*index, 1.0])[:3]
        if (np.abs(at - np.floor(at) - 0.5) < 1e-3).any():
            continue
        near = tuple(np.rint(at).astype(int))
        inside = all(0 <= p < n for p, n in zip(near, labels.shape, strict=True))
        assert sample.labels[index] == (labels[near] if inside else 0)
        checked += 1
    assert checked > 0.4 * sample.labels.size
    said = coverfast_shards("info", out)
    assert "0 background: 100%, 2 front: 100%, 5 back: 100%, 9 absent: 0% of samples" in said


def test_labels_on_another_grid_are_refused(tmp_path, coverfast_shards):
    image, labels = head()
    nifti(tmp_path / "images" / "a.nii.gz", image, oblique())

    def refusal(array, affine, name="a.nii.gz"):
        path = nifti(tmp_path / "labels" / name, array, affine)
        said = coverfast_shards(
            *("build", tmp_path / "images", "--out", tmp_path / "s.h5", "--labels", path, "--workers", 0), code=2
        )
        path.unlink()
        assert not (tmp_path / "s.h5").exists()
        return said

    assert "labels on another grid: size 9x28x24, the image's is 10x28x24" in refusal(labels[:, :, 1:], oblique())
    shifted = oblique()
    shifted[:3, 3] += (0, 0, 0.25)
    assert "labels on another grid: the corners are up to 0.25 mm from the image's" in refusal(labels, shifted)
    flipped = oblique() @ np.diag([-1, 1, 1, 1])  # the header that forgets the flip
    assert "labels on another grid" in refusal(labels, flipped)
    two = np.stack([labels, labels], axis=-1)
    assert "it holds 2 volumes" in refusal(two, oblique())
    np.save(tmp_path / "labels" / "a.npy", labels.transpose(2, 1, 0))
    said = coverfast_shards(
        *("build", tmp_path / "images", "--out", tmp_path / "s.h5", "--labels", tmp_path / "labels", "--workers", 0),
        code=2,
    )
    assert "says where it lies in mm and" in said
    # What SimpleITK makes of the header when it writes the file again is the same grid.
    sitk = pytest.importorskip("SimpleITK")
    nifti(tmp_path / "l.nii.gz", labels, oblique())
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "l.nii.gz")), str(tmp_path / "a.nrrd"))
    coverfast_shards(
        *("build", tmp_path / "images", "--out", tmp_path / "s.h5", "--labels", tmp_path / "a.nrrd", "--workers", 0)
    )
    with Shard(tmp_path / "s.h5") as shard:
        np.testing.assert_array_equal(shard.read(0).labels, labels[::-1].transpose(2, 1, 0))


# ---- what a label map may be


def png_of_bits(path, rows, bits):
    """A grey PNG of 1, 2 or 4 bits, which Pillow does not write."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    packed = b""
    for row in rows:
        text = "".join(f"{v:0{bits}b}" for v in row)
        packed += b"\0" + int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8), "big")
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), bits, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(packed)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_flat_labels_on_another_grid_are_refused(tmp_path, coverfast_shards, suffix):
    sitk = pytest.importorskip("SimpleITK")

    def write(folder, array, spacing=(0.5, 0.8), origin=(-20.0, 30.0), turned=False, kind=suffix):
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(spacing)
        image.SetOrigin(origin)
        image.SetDirection((0.0, -1.0, 1.0, 0.0) if turned else (1.0, 0.0, 0.0, 1.0))
        (tmp_path / folder).mkdir(exist_ok=True)
        sitk.WriteImage(image, str(tmp_path / folder / f"a{kind}"))
        return tmp_path / folder / f"a{kind}"

    build = ("build", write("images", noise()), "--out", tmp_path / "s.h5", "--overwrite", "--workers", 0, "--labels")
    labels = noise(1, top=2)
    for other, said in (
        ({"spacing": (1.0, 1.0)}, r"up to 15 mm"),  # 29 columns and 19 rows of so much more
        ({"spacing": (0.8, 0.5)}, r"up to 10.4 mm"),
        ({"origin": (-20.0, 30.25)}, r"up to 0.25 mm"),
        ({"turned": True}, r"the corners are up to"),
    ):
        line = coverfast_shards(*build, write("labels", labels, **other), code=2)
        with pytest.raises(InputError, match=rf"labels on another grid: .*{said}"):
            raise InputError(line)
    assert not (tmp_path / "s.h5").exists()
    # Half a twentieth of a pixel is rounding, another format says the same, and a picture cannot say anything.
    other = {".nrrd": ".mha", ".mha": ".nrrd"}[suffix]
    for path in (
        write("labels", labels, origin=(-20.0, 30.0 + 0.5 / 40)),
        write("others", labels, kind=other),
        png(tmp_path / "pictures" / "a.png", labels),
    ):
        coverfast_shards(*build, path)
        with Shard(tmp_path / "s.h5") as shard:
            np.testing.assert_array_equal(shard.labels(0)[0], labels)


def test_what_a_map_holds_is_kept_as_it_is(tmp_path):
    values = noise(3, (6, 8), top=3)
    image = Sample(np.zeros((1, 6, 8), np.uint8), 1, 0, 0, 255, (1.0, 1.0), "a", original=Original((6, 8), np.eye(3)))

    def read(name):
        return read_map(Source(tmp_path / name, name), image, Source(tmp_path / "a.png", "a.png"))

    palette = Image.fromarray(values, mode="P")
    palette.putpalette([200, 0, 0, 0, 90, 0, 10, 10, 10, 250, 250, 250])
    palette.save(tmp_path / "palette.png")
    palette.save(tmp_path / "palette.tif")
    palette.save(tmp_path / "two-bit.png", bits=2)
    Image.fromarray(values).save(tmp_path / "grey.png")
    Image.fromarray(values.astype(np.uint16) * 300).save(tmp_path / "wide.png")
    Image.fromarray(values > 1).save(tmp_path / "one-bit.png")
    for bits in (2, 4):
        png_of_bits(tmp_path / f"grey{bits}.png", values.tolist(), bits)
    np.save(tmp_path / "float.npy", values.astype(np.float64))
    np.save(tmp_path / "long.npy", values.astype(np.int64) * 100_000)
    for name in ("palette.png", "palette.tif", "two-bit.png", "grey.png", "grey2.png", "grey4.png", "float.npy"):
        found = read(name)
        np.testing.assert_array_equal(found, values, err_msg=name)
        assert found.dtype == np.uint8
    np.testing.assert_array_equal(read("one-bit.png"), values > 1)
    np.testing.assert_array_equal(read("wide.png"), values.astype(int) * 300)
    assert read("wide.png").dtype == np.uint16
    np.testing.assert_array_equal(read("long.npy"), values.astype(int) * 100_000)
    # An image with a palette is still read by its luma.
    luma = read_source(Source(tmp_path / "palette.png", "palette.png")).pixels[0]
    np.testing.assert_array_equal(luma, np.array([60, 53, 10, 250])[values])


def test_a_palette_png_by_the_command_line(tmp_path, coverfast_shards):
    values = noise(3, top=2)
    palette = Image.fromarray(values, mode="P")
    palette.putpalette([255, 255, 255, 255, 0, 0, 0, 0, 0])
    png(tmp_path / "images" / "a.png", noise())
    (tmp_path / "labels").mkdir()
    palette.save(tmp_path / "labels" / "a_mask.png")
    out = tmp_path / "s.h5"
    coverfast_shards("build", tmp_path / "images", "--labels", tmp_path / "labels", "--out", out, "--workers", 0)
    with Shard(out) as shard:
        np.testing.assert_array_equal(shard.labels(0)[0], values)
    coverfast_shards("preview", out, tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 1000


def test_scaled_integers_are_whole_within_a_thousandth(tmp_path):
    image, labels = head()
    stored = nibabel.Nifti1Image(labels.astype(np.int16), oblique())
    stored.header.set_slope_inter(0.5, 1.0)
    nibabel.save(stored, tmp_path / "half.nii.gz")
    whole = nibabel.Nifti1Image(labels.astype(np.float64), oblique())
    whole.set_data_dtype(np.int16)  # nibabel spreads 0 to 5 over all of int16
    nibabel.save(whole, tmp_path / "spread.nii.gz")
    nifti(tmp_path / "image.nii.gz", image, oblique())
    source = Source(tmp_path / "image.nii.gz", "image.nii.gz")
    read = read_source(source)
    found = read_map(Source(tmp_path / "spread.nii.gz", "spread.nii.gz"), read, source)
    assert sorted(np.unique(found)) == [0, 2, 5]
    with pytest.raises(InputError, match=r"half.nii.gz must be a label map of whole numbers, got 3.5 and others"):
        read_map(Source(tmp_path / "half.nii.gz", "half.nii.gz"), replace(read), source)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: png(p / "a.png", noise(0, (20, 30, 3))), r"one number a pixel, and this is colour \(RGB\)"),
        (lambda p: png(p / "a.png", noise(0, (20, 30, 2))), r"colour \(LA\)"),
        (lambda p: png(p / "a.jpg", noise(0, top=1)), r"JPEG changes values"),
        (lambda p: np.save(p / "a.npy", noise(0) / 2), r"whole numbers, got [\d.]+ and others, \d+ in all"),
        (lambda p: np.save(p / "a.npy", noise(0).astype(np.int16) - 3), r"values from 0 to 4294967295, got -\d"),
        (lambda p: np.save(p / "a.npy", noise(0)[None, None].repeat(2, 0)), r"size 20x30, the image's|another grid"),
        (lambda p: np.save(p / "a.npy", np.arange(600).reshape(20, 30)), r"at most 256 values"),
        (lambda p: np.save(p / "a.npy", np.full((20, 30), 2.0**25)), r"above 16777216 as integers"),
        (lambda p: np.save(p / "a.npy", np.full((20, 30), np.nan)), r"pixels must be finite"),
        (lambda p: (p / "a.nii").write_bytes(b"junk"), r"cannot be read as NIfTI"),
    ],
)
def test_what_is_no_label_map_is_refused(tmp_path, make, said, coverfast_shards):
    png(tmp_path / "images" / "a.png", noise())
    (tmp_path / "labels").mkdir()
    make(tmp_path / "labels")
    out = tmp_path / "s.h5"
    line = coverfast_shards(
        *("build", tmp_path / "images", "--out", out, "--labels", tmp_path / "labels", "--workers", 0), code=2
    )
    with pytest.raises(InputError, match=said):
        raise InputError(line)
    assert "Traceback" not in line
    assert not out.exists()


def test_several_channels_and_colour_in_other_kinds_are_refused(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    volume = Sample(
        np.zeros((1, 3, 4, 5), np.uint8), 1, 0, 0, 1, (1.0,) * 3, "a", original=Original((3, 4, 5), np.eye(4))
    )
    np.save(tmp_path / "c.npy", np.zeros((2, 3, 4, 5), np.uint8))
    with pytest.raises(InputError, match=r"c.npy must be a label map of 1 channel, got 2"):
        read_map(Source(tmp_path / "c.npy", "c.npy"), volume, Source(tmp_path / "a.npy", "a.npy"))
    sitk.WriteImage(sitk.GetImageFromArray(noise(0, (3, 4, 5, 3)), isVector=True), str(tmp_path / "c.nrrd"))
    with pytest.raises(InputError, match=r"a label map has one number a pixel, and this has 3"):
        read_map(Source(tmp_path / "c.nrrd", "c.nrrd"), volume, Source(tmp_path / "a.npy", "a.npy"))


# ---- by name and by table


def test_one_file_each_belong_together_and_one_folder_holds_both(tmp_path):
    png(tmp_path / "t1.png", noise())
    png(tmp_path / "result.png", noise(1, top=2))
    report = build(tmp_path / "t1.png", tmp_path / "s.h5", labels=tmp_path / "result.png")
    assert report.samples == 1
    png(tmp_path / "d" / "a.png", noise(2))
    png(tmp_path / "d" / "a_seg.png", noise(3, top=2))
    png(tmp_path / "d" / "b.png", noise(4))
    png(tmp_path / "d" / "b_seg.png", noise(5, top=2))
    report = build(tmp_path / "d", tmp_path / "t.h5", labels=tmp_path / "d")
    with Shard(report.paths[0]) as shard:
        assert [shard.source(i) for i in range(len(shard))] == ["d/a.png", "d/b.png"]
        np.testing.assert_array_equal(shard.read(1).labels, noise(5, top=2))
    png(tmp_path / "e" / "b.png", noise(4))
    with pytest.raises(InputError, match=r"labels: .*nowhere must be a file or folder"):
        build(tmp_path / "e", tmp_path / "u.h5", labels=tmp_path / "nowhere")


def test_values_that_the_table_does_not_name_are_refused(tmp_path, coverfast_shards):
    images, labels = pairs(tmp_path, "ab")
    (tmp_path / "t.csv").write_text("1,liver\n")
    said = coverfast_shards(
        *("build", images, "--out", tmp_path / "s.h5", "--labels", labels, "--label-table", tmp_path / "t.csv"),
        *("--workers", 0),
        code=2,
    )
    assert "a.png must have label values of the table, 0, 1, got 2, 3" in said
    alone = coverfast_shards("build", images, "--out", tmp_path / "s.h5", "--label-table", tmp_path / "t.csv", code=2)
    assert "--label-table) needs labels" in alone


def test_classes_of_images(tmp_path, coverfast_shards):
    images, _ = pairs(tmp_path, ["x/a", "x/b", "y/b", "c_0000", "sub-7/d", "sub-7/e"])
    rows = ["name,class", "a,benign", "x/b.png,malign", "y/b,benign", "c,benign", "sub-7,malign", "e.png,malign"]
    (tmp_path / "c.csv").write_text("\n".join([*rows, "other,normal"]))
    out = tmp_path / "s.h5"
    said = coverfast_shards("build", images, "--out", out, "--classes", tmp_path / "c.csv", "--workers", 0)
    assert f"1 of 7 rows of {tmp_path / 'c.csv'} are of no image (other)" in said
    with Shard(out) as shard:
        found = {shard.source(i): shard.info(i).target for i in range(len(shard))}
        assert shard.target_classes == ("benign", "malign", "normal")
        assert shard.label_classes == ()
    assert found == {
        "images/x/a.png": "benign",
        "images/x/b.png": "malign",
        "images/y/b.png": "benign",
        "images/c_0000.png": "benign",
        "images/sub-7/d.png": "malign",
        "images/sub-7/e.png": "malign",
    }
    assert "targets         benign: 3, malign: 3, normal: 0\n" in coverfast_shards("info", out)

    def refusal(*rows):
        (tmp_path / "c.csv").write_text("\n".join(rows))
        return coverfast_shards(
            *("build", images, "--out", tmp_path / "t.h5", "--classes", tmp_path / "c.csv", "--workers", 0), code=2
        )

    # "b" is the name of two images, so of none.
    said = refusal("a,benign", "b,malign", "c,benign", "sub-7,malign")
    assert "found none for 2 of 6 (images/x/b.png, images/y/b.png)" in said
    said = refusal(*rows, "d,benign")
    assert "images/sub-7/d.png must have 1 class in" in said
    assert "got benign and malign in the rows d, sub-7" in said


# ---- builds


def test_the_shard_does_not_depend_on_workers_or_interruption(tmp_path, monkeypatch):
    images, labels = pairs(tmp_path, [f"p{n}" for n in range(6)], "_seg")
    png(labels / "p3_seg.png", np.full((20, 30), 200, np.uint8))
    (tmp_path / "c.csv").write_text("".join(f"p{n},{'even' if n % 2 == 0 else 'odd'}\n" for n in range(6)))
    options = {"labels": labels, "classes": tmp_path / "c.csv", "val_fraction": 0.4}
    whole = build(images, tmp_path / "a.h5", **options)
    assert verify(whole.paths[0]) == []
    with Shard(whole.paths[0]) as shard:
        assert [value for value, _ in shard.label_classes] == [0, 1, 2, 3, 200]
        assert [shard.target_classes[t] for t in shard.targets] == ["even", "odd"] * 3
    # A map that fails stops the build; what is finished is kept, and made anew where its map or class has changed.
    good = (labels / "p5_seg.png").read_bytes()
    (labels / "p5_seg.png").write_bytes(b"junk")
    with pytest.raises(
        InputError, match=r"p5_seg.png cannot be read as PNG.*--skip-bad\) leaves such files out.*resumes"
    ):
        build(images, tmp_path / "b.h5", **options)
    (labels / "p5_seg.png").write_bytes(good)
    assert build(images, tmp_path / "b.h5", workers=2, **options).kept == 5
    assert (tmp_path / "b.h5").read_bytes() == (tmp_path / "a.h5").read_bytes()
    left_out = build(images, tmp_path / "c.h5", shard_size=6000, **options)
    tables = set()
    for path in left_out.paths:
        with Shard(path) as shard:
            tables.add((shard.label_classes, shard.target_classes))
    assert len(left_out.paths) > 1
    assert len(tables) == 1


def test_what_changed_meanwhile_is_made_anew(tmp_path):
    images, labels = pairs(tmp_path, "abcd")
    table = tmp_path / "c.csv"
    table.write_text("a,x\nb,x\nc,y\nd,y\n")
    (images / "d.png").write_bytes(b"junk")
    options = {"labels": labels, "classes": table}
    with pytest.raises(InputError, match=r"d.png cannot be read as PNG"):
        build(images, tmp_path / "s.h5", **options)
    png(images / "d.png", noise(9))
    png(labels / "a.png", np.full((20, 30), 9, np.uint8))
    table.write_text("a,x\nb,y\nc,y\nd,y\n")
    with pytest.raises(InputError, match=r"unfinished build with labels = true, got labels = null"):
        build(images, tmp_path / "s.h5", classes=table)
    assert build(images, tmp_path / "s.h5", **options).kept == 1
    with Shard(tmp_path / "s.h5") as shard:
        assert (shard.read(0).labels == 9).all()
        assert shard.info(1).target == "y"


def test_bad_maps_can_be_left_out_with_their_images(tmp_path):
    images, labels = pairs(tmp_path, "abc")
    png(labels / "b.png", noise(0, (21, 30), top=2))
    report = build(images, tmp_path / "s.h5", labels=labels, skip_bad=True)
    assert report.samples == 2
    assert "labels on another grid: size 21x30, the image's is 20x30" in report.skipped[0]


def test_a_dicom_series_goes_by_the_name_of_its_folder(tmp_path):
    pytest.importorskip("pydicom")
    from test_dicom import stack

    stack(tmp_path / "images" / "case1")
    image = scan(tmp_path / "images").sources[0]
    assert image.below == "case1"
    read = read_source(image)
    shape = read.pixels.shape[1:]
    in_mm = read.original.affine @ read.original.to_original
    values = noise(5, shape, top=2)
    nifti(tmp_path / "labels" / "case1.nii.gz", values, in_mm)
    report = build(tmp_path / "images", tmp_path / "s.h5", labels=tmp_path / "labels")
    with Shard(report.paths[0]) as shard:
        np.testing.assert_array_equal(shard.read(0).labels, values)
    (tmp_path / "labels" / "case1.nii.gz").rename(tmp_path / "labels" / "case2.nii.gz")
    with pytest.raises(InputError, match=r"1 images \(case1\).*a DICOM series goes by the name of its folder"):
        build(tmp_path / "images", tmp_path / "t.h5", labels=tmp_path / "labels")
