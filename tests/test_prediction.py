"""Predictions come back on the grid, in the format and with the geometry of the file they are of."""

from __future__ import annotations

import csv
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from coverfast import InputError, UNet
from coverfast.cli.main import app
from coverfast.cli.predict import predict
from coverfast.downstream import Network
from coverfast.downstream.network import network_bytes
from coverfast.downstream.prediction import in_file_order, on_grid, predict_source
from coverfast.downstream.prediction_files import suffixes, write_labels, write_probabilities
from coverfast.ingest import Source, find_sources, preprocessing, read_source
from coverfast.phantom import phantom

nibabel = pytest.importorskip("nibabel")
sitk = pytest.importorskip("SimpleITK")
ndimage = pytest.importorskip("scipy.ndimage")
Rotation = pytest.importorskip("scipy.spatial.transform").Rotation


class Threshold(nn.Module):
    """Foreground where the image is above a level: a network that looks at one pixel."""

    def __init__(self, ndim, level=0.5, crop=9, channels=1, settings=None):
        super().__init__()
        self.task, self.names, self.values = "segmentation", ("background", "bright"), (0, 1)
        self.crop, self.ndim, self.in_channels, self.level = (crop,) * ndim, ndim, channels, level
        self.preprocessing = settings or preprocessing("raw")

    def forward(self, images):
        x = images[:, :1] - self.level
        return torch.cat([-20 * x, 20 * x], 1)


def source(path):
    return Source(path, path.name)


def bright(array, level=0.5):
    """What `Threshold` makes of the values of a file."""
    values = array.astype(np.float64)
    return (values - values.min()) / (values.max() - values.min()) > level


def round_trip(path, folder, ndim=3, values=(0, 1), **options):
    """Predict a file and write the label map; its path."""
    network = Threshold(ndim)
    predicted = predict_source(network, source(path), network.preprocessing, **options)
    written = folder / f"out{suffixes(source(path))[0]}"
    write_labels(written, predicted.labels, values, source(path), predicted.sample)
    assert sorted(p.name for p in folder.iterdir()) == sorted({path.name, written.name} | _beside(path))
    return written


def _beside(path):
    return {p.name for p in path.parent.iterdir() if p.stem.split(".")[0] == path.stem.split(".")[0]}


def oblique(mirror=1):
    """A rotated, anisotropic affine whose axes run the other way, and go to other world axes."""
    turn = Rotation.from_euler("xyz", [12, -25, 40], degrees=True).as_matrix()
    matrix = np.eye(4)
    matrix[:3, :3] = turn @ np.diag([-0.8, 1.1, 2.7 * mirror]) @ np.eye(3)[[1, 0, 2]]
    matrix[:3, 3] = -31, 52, 7.5
    return matrix


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_rotated_anisotropic_nifti_comes_back_where_it_was(tmp_path, suffix):
    rng = np.random.default_rng(0)
    image = nibabel.Nifti1Image(rng.integers(-900, 900, (13, 10, 7)).astype(np.int16), None)
    image.set_sform(oblique(), 1)
    image.set_qform(oblique(), 3)
    image.header.set_slope_inter(0.5, -12)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"a scan"
    image.header["cal_max"] = 700
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Jane Roe"))
    path = tmp_path / f"scan{suffix}"
    nibabel.save(image, path)
    read = nibabel.load(path)
    found = nibabel.load(round_trip(path, tmp_path))
    assert nibabel.aff2axcodes(read.affine) != ("R", "A", "S")
    np.testing.assert_array_equal(found.affine, read.affine)
    for form in ("get_sform", "get_qform"):
        mine, theirs = (getattr(i.header, form)(coded=True) for i in (found, read))
        np.testing.assert_array_equal(mine[0], theirs[0])
        assert mine[1] == theirs[1]
    np.testing.assert_array_equal(np.asarray(found.dataobj), bright(np.asarray(read.dataobj)))
    assert found.get_data_dtype() == np.uint8
    assert (found.dataobj.slope, found.dataobj.inter) == (1, 0)
    assert found.header.get_xyzt_units() == ("mm", "sec")
    assert found.header["cal_max"] == 0
    assert not found.header.extensions
    assert bytes(found.header["descrip"]).rstrip(b"\0") == b"a scan"
    with open(tmp_path / f"out{suffix}", "rb") as file:  # noqa: PTH123
        assert (file.read(2) == b"\x1f\x8b") == suffix.endswith(".gz")


@pytest.mark.parametrize("preset", [{"spacing": 1.0}, {"spacing": 1.9}])
def test_after_another_spacing_it_is_right_to_a_voxel(tmp_path, preset):
    """Smooth structures: what differs lies within a voxel of their boundary."""
    rng = np.random.default_rng(3)
    smooth = ndimage.gaussian_filter(rng.normal(size=(36, 30, 16)), (4, 4, 2))
    smooth = 1000 * (smooth - smooth.min()) / np.ptp(smooth)
    image = nibabel.Nifti1Image(smooth.astype(np.int16), oblique())
    nibabel.save(image, tmp_path / "scan.nii.gz")
    network = Threshold(3, settings=preprocessing("ct", clip=(0.0, 1000.0), **preset), crop=12)
    predicted = predict_source(network, source(tmp_path / "scan.nii.gz"), network.preprocessing, probabilities=True)
    labels = in_file_order(predicted.labels, predicted.sample)
    expected = smooth > 500
    assert labels.shape == expected.shape
    near = ndimage.binary_dilation(expected) & ~ndimage.binary_erosion(expected, border_value=1)
    assert not (labels != expected)[~near].any()
    assert (labels != expected).mean() < 0.03
    # Half a voxel off would be no closer than this.
    for axis in range(3):
        assert (labels != expected).sum() < (np.roll(labels, 1, axis) != expected).sum() / 2
    np.testing.assert_array_equal(predicted.probabilities.argmax(0), predicted.labels)
    np.testing.assert_allclose(predicted.probabilities.sum(0), 1, atol=1e-5)


def test_what_a_preset_cut_off_is_background(tmp_path):
    pixels = np.full((20, 50), 255, np.uint8)
    pixels[:, 5] = 0
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    network = Threshold(2, settings=preprocessing("chest-xray", size=20, fit="crop"))
    predicted = predict_source(network, source(tmp_path / "wide.png"), network.preprocessing, probabilities=True)
    np.testing.assert_array_equal(np.flatnonzero(predicted.labels.any(axis=0)), np.arange(15, 35))
    np.testing.assert_array_equal(predicted.labels.all(axis=0), predicted.labels.any(axis=0))
    np.testing.assert_array_equal(predicted.probabilities[:, 0, 0], [1, 0])
    # The other way round: padding that the file never had is not in the result.
    network = Threshold(2, settings=preprocessing("chest-xray", size=50, fit="pad"))
    predicted = predict_source(network, source(tmp_path / "wide.png"), network.preprocessing)
    np.testing.assert_array_equal(predicted.labels, pixels > 0)


@given(
    st.integers(2, 3).flatmap(lambda n: st.tuples(*[st.lists(st.integers(1, 6), min_size=n, max_size=n)] * 2)),
    st.floats(0.3, 3),
    st.floats(-4, 4),
    st.integers(0, 99),
)
def test_on_another_grid(sizes, scale, offset, seed):
    old, new = sizes
    probabilities = np.random.default_rng(seed).dirichlet(np.ones(3), old)
    probabilities = np.moveaxis(probabilities, -1, 0).astype(np.float32)
    scales = [scale * (1 + 0.1 * axis) for axis in range(len(old))]
    planes = list(on_grid(probabilities, new, scales, [offset] * len(old)))
    found = np.stack(planes, 1) if len(old) == 3 else planes[0]
    position = np.stack(
        np.meshgrid(*[s * np.arange(n) + offset for n, s in zip(new, scales, strict=True)], indexing="ij")
    )
    clamped = np.clip(position, 0, np.reshape(old, (-1, *[1] * len(old))) - 1)
    expected = np.stack([ndimage.map_coordinates(p, clamped, order=1) for p in probabilities])
    along = tuple(range(1, position.ndim))
    covered = (position.min(axis=along) > -1) & (position.max(axis=along) < old)
    beyond = (np.abs(position - clamped) > 0.5 + 1e-6) & ~covered.reshape(-1, *[1] * len(old))
    beyond = beyond.any(axis=0)
    expected[:, beyond] = np.reshape([1, 0, 0], (3, 1))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, -1)])
def test_a_size_that_rounds_down_leaves_no_border_without_a_class(tmp_path, signs):
    """10, 7 and 13 voxels of 0.5 mm become 3, 2 and 4 of 1.5 mm, whose last ends 0.25 mm before the file does."""
    affine = np.diag([0.5 * s for s in signs] + [1.0])
    nibabel.save(nibabel.Nifti1Image(np.full((10, 7, 13), 1000, np.int16), affine), tmp_path / "flat.nii.gz")
    network = Threshold(3, settings=preprocessing("ct", clip=(0.0, 1000.0), spacing=1.5))
    predicted = predict_source(network, source(tmp_path / "flat.nii.gz"), network.preprocessing, probabilities=True)
    assert predicted.labels.shape == (13, 7, 10)
    assert predicted.labels.all()
    assert np.ptp(predicted.probabilities[1]) == 0


def test_an_axis_that_was_cut_stays_background_beyond_its_border():
    probabilities = np.zeros((2, 3, 4), np.float32)
    probabilities[1] = 1
    # Rows: 8 pixels of half a size in 3 whole ones, the last at 3.0 - 0.01 or 3.0; columns: all there.
    for offset, rows in ((-0.51, 8), (-0.5, 7)):
        (found,) = on_grid(probabilities, (8, 4), (0.5, 1.0), (offset, 0.0))
        np.testing.assert_array_equal(found[1].all(axis=1).sum(), rows)
        np.testing.assert_array_equal(found[1].all(axis=1), found[1].any(axis=1))


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("off", [-1e-9, 0, 1e-9])
def test_whole_positions_are_exact(ndim, off):
    probabilities = np.random.default_rng(0).dirichlet(np.ones(4), (6, 5, 7)[:ndim])
    probabilities = np.moveaxis(probabilities, -1, 0).astype(np.float32)
    planes = list(on_grid(probabilities, (4, 4, 4)[:ndim], [1.0] * ndim, [1.0 + off] * ndim))
    found = np.stack(planes, 1) if ndim == 3 else planes[0]
    np.testing.assert_array_equal(found, probabilities[(slice(None), *[slice(1, 5)] * ndim)])


@given(st.permutations(range(3)), st.tuples(*[st.sampled_from([-1, 1])] * 3))
def test_every_orientation_of_a_file_is_undone(order, signs):
    from coverfast.ingest.readers.decoded import to_ras
    from coverfast.samples import Sample

    volume = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[order] * np.array(signs) * [1.0, 2.0, 3.0]
    decoded = to_ras(volume, affine)
    sample = Sample(decoded.pixels, 1, 0, 0, 1, decoded.spacing, "x", original=decoded.original)
    np.testing.assert_array_equal(in_file_order(decoded.pixels[0], sample), volume)
    np.testing.assert_array_equal(in_file_order(decoded.pixels[0][..., None], sample)[..., 0], volume)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
@pytest.mark.parametrize("values", [(0, 7), (0, 40000)])
def test_pictures(tmp_path, suffix, values):
    pixels = (255 * phantom(2, (37, 52), seed=1).image).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"a{suffix}")
    with Image.open(tmp_path / f"a{suffix}") as image:
        expected = np.asarray(image) / 255 > 0.5
    written = round_trip(tmp_path / f"a{suffix}", tmp_path, 2, values)
    assert written.suffix == (".png" if suffix == ".jpg" else suffix)
    with Image.open(written) as image:
        assert image.format == ("TIFF" if suffix == ".tif" else "PNG")
        found = np.asarray(image)
    assert found.dtype == (np.uint8 if values[1] < 256 else np.uint16)
    np.testing.assert_array_equal(found, np.where(expected, values[1], 0))


def test_a_picture_lies_as_its_orientation_tag_says(tmp_path):
    pixels = np.zeros((30, 40), np.uint8)
    pixels[:10, :30] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    with Image.open(round_trip(tmp_path / "a.png", tmp_path, 2)) as image:
        np.testing.assert_array_equal(np.asarray(image), np.rot90(pixels, -1) > 0)


def test_values_that_a_picture_cannot_hold(tmp_path):
    Image.fromarray(np.eye(30, dtype=np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"label values up to 65535, all that \.png holds, got 70000"):
        round_trip(tmp_path / "a.png", tmp_path, 2, (0, 70000))
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("shape", [(12, 15), (6, 7, 8)])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_arrays(tmp_path, shape, suffix):
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    path = tmp_path / f"a{suffix}"
    np.save(path, array) if suffix == ".npy" else np.savez(path, image=array)
    found = np.load(round_trip(path, tmp_path, len(shape), (0, 300)))
    found = found if suffix == ".npy" else found[found.files[0]]
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, np.where(bright(array), 300, 0))


@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr", ".mha", ".mhd"])
@pytest.mark.parametrize("ndim", [2, 3])
def test_itk_formats(tmp_path, suffix, ndim):
    array = np.random.default_rng(0).integers(-500, 500, (6, 9, 7)[:ndim]).astype(np.int16)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.7, 1.5, 4.0)[:ndim])
    image.SetOrigin((-20.0, 30.0, 7.0)[:ndim])
    turn = Rotation.from_euler("xyz", [0 if ndim == 2 else 20, 0, 130], degrees=True).as_matrix()[:ndim, :ndim]
    image.SetDirection(turn.ravel().tolist())
    sitk.WriteImage(image, str(tmp_path / f"a{suffix}"))
    read = sitk.ReadImage(str(tmp_path / f"a{suffix}"))
    written = round_trip(tmp_path / f"a{suffix}", tmp_path, ndim)
    assert written.suffix == {".nhdr": ".nrrd", ".mhd": ".mha"}.get(suffix, suffix)
    found = sitk.ReadImage(str(written))
    for what in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(found, what)(), getattr(read, what)(), rtol=1e-12, atol=1e-12)
    labels = sitk.GetArrayFromImage(found)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, bright(array))


def test_one_volume_of_several_and_the_other_kinds_of_nifti(tmp_path):
    array = np.random.default_rng(0).integers(0, 500, (5, 6, 7, 3)).astype(np.int16)
    nibabel.save(nibabel.Nifti2Image(array, oblique()), tmp_path / "four.nii")
    found = nibabel.load(round_trip(tmp_path / "four.nii", tmp_path, volume=1))
    assert isinstance(found, nibabel.Nifti2Image)
    assert found.shape == (5, 6, 7)
    np.testing.assert_allclose(found.affine, oblique())
    np.testing.assert_array_equal(np.asarray(found.dataobj), bright(array[..., 1]))
    (tmp_path / "pair").mkdir()
    nibabel.save(nibabel.Nifti1Pair(array[..., 0], oblique()), tmp_path / "pair" / "p.hdr")
    written = round_trip(tmp_path / "pair" / "p.hdr", tmp_path / "pair")
    assert written.name == "out.nii.gz"
    np.testing.assert_allclose(nibabel.load(written).affine, oblique(), atol=1e-5)
    np.testing.assert_array_equal(np.asarray(nibabel.load(written).dataobj), bright(array[..., 0]))


def test_a_dicom_series_becomes_a_nifti_in_its_place(tmp_path):
    from test_dicom import stack

    turn = Rotation.from_euler("xyz", [8, 5, -20], degrees=True).as_matrix()
    volume = stack(tmp_path / "ct", 6, step=2.0, ImageOrientationPatient=[*turn[:, 0], *turn[:, 1]])
    (series,) = find_sources(tmp_path / "ct")
    network = Threshold(3)
    predicted = predict_source(network, series, network.preprocessing)
    assert suffixes(series) == (".nii.gz", ".nii.gz")
    write_labels(tmp_path / "out.nii.gz", predicted.labels, (0, 1), series, predicted.sample)
    found = nibabel.load(tmp_path / "out.nii.gz")
    np.testing.assert_allclose(found.affine, predicted.sample.original.affine, atol=1e-5)
    # The file's axes: column, row, slice.
    np.testing.assert_array_equal(np.asarray(found.dataobj), bright(volume).transpose(2, 1, 0))
    assert found.header.get_xyzt_units()[0] == "mm"


def test_probabilities_have_the_classes_last(tmp_path):
    array = np.random.default_rng(0).integers(0, 500, (5, 6, 7)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(array, oblique()), tmp_path / "a.nii.gz")
    sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / "a.mha"))
    np.save(tmp_path / "a.npy", array)
    Image.fromarray(array[0].astype(np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(array[0].astype(np.uint8)).save(tmp_path / "a.tif")
    for suffix, ndim in ((".nii.gz", 3), (".mha", 3), (".npy", 3), (".png", 2)):
        network = Threshold(ndim)
        one = source(tmp_path / f"a{suffix}")
        predicted = predict_source(network, one, network.preprocessing, probabilities=True)
        path = tmp_path / f"p{suffixes(one)[1]}"
        write_probabilities(path, predicted.probabilities, one, predicted.sample)
        match path.suffix:
            case ".gz":
                found = nibabel.load(path)
                np.testing.assert_allclose(found.affine, oblique(), atol=1e-5)
                found = np.asarray(found.dataobj)
            case ".mha":
                found = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
            case _:
                found = np.load(path)
        level = bright(array[0] if suffix == ".png" else array) if suffix != ".png" else array[0].astype(np.uint8) > 127
        assert found.dtype == np.float32
        assert found.shape == (*level.shape, 2)
        np.testing.assert_array_equal(found.argmax(-1), level)
        np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)
    assert suffixes(source(tmp_path / "a.tif")) == (".tif", ".npy")


def test_images_that_are_not_of_the_network(tmp_path):
    Image.fromarray(np.eye(9, dtype=np.uint8)).save(tmp_path / "a.png")
    for network, message in (
        (Threshold(3), "a.png must be 3D like the network's images, got 2D"),
        (Threshold(2, channels=2), r"a.png must have 2 channel\(s\) like the network's images, got 1"),
    ):
        with pytest.raises(InputError, match=message):
            predict_source(network, source(tmp_path / "a.png"), network.preprocessing)


# --- the command ---


def trained(folder, ndim=2, task="segmentation", settings=None, **options):
    torch.manual_seed(0)
    names = ("background", "organ", "lesion") if task == "segmentation" else ("well", "ill")
    values = (0, 5, 300) if task == "segmentation" else None
    network = Network(
        UNet(ndim, 1, (8, 8, 8)),
        task,
        names,
        values,
        crop=16,
        preprocessing=settings or preprocessing("raw"),
        **options,
    )
    folder.mkdir(exist_ok=True)
    (folder / "network.safetensors").write_bytes(network_bytes(network, {}))
    return network.eval()


def png(path, size=(40, 52), index=0):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray((255 * phantom(2, size, seed=0, index=index).image).round().astype(np.uint8)).save(path)
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["predict", *map(str, arguments), "--device", "cpu"])


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    monkeypatch.setattr("coverfast.report.sheet.DPI", 15)


def test_the_command_on_pictures(tmp_path):
    network = trained(tmp_path / "run")
    images = [png(tmp_path / "x" / "scan.png"), png(tmp_path / "y" / "scan.png", index=1)]
    (tmp_path / "bad.png").write_bytes(b"nothing")
    done = run(
        tmp_path / "run", images[0], tmp_path / "bad.png", images[1], "--out", tmp_path / "out", "--probabilities"
    )
    assert done.exit_code == 2
    assert done.stderr.count("error: ") == 1
    assert "bad.png cannot be read as PNG" in done.stderr
    names = [f"scan{more}-{what}" for more in ("", "-2") for what in ("labels.png", "overlay.png", "probabilities.npy")]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(names)
    for path, name in zip(images, ("scan", "scan-2"), strict=True):
        with Image.open(tmp_path / "out" / f"{name}-labels.png") as image:
            labels = np.asarray(image)
        predicted = predict_source(network, source(path), network.preprocessing, probabilities=True)
        np.testing.assert_array_equal(labels, np.array(network.values)[predicted.labels])
        np.testing.assert_array_equal(
            np.load(tmp_path / "out" / f"{name}-probabilities.npy"), np.moveaxis(predicted.probabilities, 0, -1)
        )
        assert f"{name}-labels.png: " in done.stdout
    before = (tmp_path / "out" / "scan-labels.png").stat().st_mtime_ns
    again = run(tmp_path / "run", images[0], "--out", tmp_path / "out")
    assert isinstance(again.exception, InputError)
    assert "scan-labels.png and 1 more must be new, it exists already; see --overwrite" in str(again.exception)
    assert (tmp_path / "out" / "scan-labels.png").stat().st_mtime_ns == before
    assert run(tmp_path / "run", images[0], "--out", tmp_path / "out", "--overwrite").exit_code == 0
    assert (tmp_path / "out" / "scan-labels.png").stat().st_mtime_ns > before


def test_the_command_on_a_volume(tmp_path):
    network = trained(tmp_path / "run", 3, settings=preprocessing("ct", clip=(0.0, 1000.0), spacing=1.5))
    volume = (1000 * phantom(3, (20, 24, 18), seed=0).image).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(volume, oblique()), tmp_path / "head.nii.gz")
    done = run(tmp_path / "run" / "network.safetensors", tmp_path / "head.nii.gz", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["head-labels.nii.gz", "head-overlay.png"]
    found = nibabel.load(tmp_path / "out" / "head-labels.nii.gz")
    np.testing.assert_array_equal(found.affine, nibabel.load(tmp_path / "head.nii.gz").affine)
    assert found.get_data_dtype() == np.uint16
    assert set(np.unique(found.dataobj)) <= set(network.values)
    assert found.shape == volume.shape


def test_the_command_on_classes(tmp_path):
    network = trained(tmp_path / "run", task="classification")
    images = [png(tmp_path / f"{name}.png", index=i) for i, name in enumerate("ab")]
    done = run(tmp_path / "run", *images, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["predictions.csv"]
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["file", "class", "well", "ill"]
    for path, row in zip(images, rows[1:], strict=True):
        found = predict_source(network, source(path), network.preprocessing).probabilities
        assert row[:2] == [str(path), network.names[found.argmax()]]
        assert [float(v) for v in row[2:]] == pytest.approx(found.tolist(), abs=1e-6)
    refused = run(tmp_path / "run", *images, "--out", tmp_path / "new", "--probabilities")
    assert isinstance(refused.exception, InputError)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_too_little_memory_is_a_sentence_and_the_others_are_done(tmp_path, monkeypatch, error):
    trained(tmp_path / "run")
    images = [png(tmp_path / f"{name}.png", index=i) for i, name in enumerate("ab")]
    calls, real = [], Network.forward

    def forward(self, windows):
        calls.append(len(windows))
        if len(calls) == 1:
            raise error
        return real(self, windows)

    monkeypatch.setattr(Network, "forward", forward)
    done = run(tmp_path / "run", *images, "--out", tmp_path / "out", "--batch", 3)
    assert done.exit_code == 2
    assert done.stderr.splitlines() == [
        f"error: {images[0]} does not fit into the memory of cpu, 3 window(s) of 16x16 pixels at a time; use a smaller "
        "--batch"
    ]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["b-labels.png", "b-overlay.png"]


def test_without_matplotlib_there_are_no_overlays(tmp_path, monkeypatch, capsys):
    trained(tmp_path / "run", settings={"preset": "phantom", "seed": 1})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.chdir(tmp_path)
    predict(tmp_path / "run", [png(tmp_path / "a.png")], device="cpu")
    assert [p.name for p in tmp_path.glob("runs/*-predict/*")] == ["a-labels.png"]
    said = capsys.readouterr().out
    assert "note: no overlays: " in said
    assert "note: the network learned from images that no preset made ('phantom')" in said


def test_the_overlay_shows_the_image_as_it_was_read(tmp_path, monkeypatch):
    """Not as the network saw it: it is the written labels that are to be judged."""
    views = []
    import coverfast.report.cases as cases

    real = cases.overlay_sheet
    monkeypatch.setattr(cases, "overlay_sheet", lambda view, names: views.append(view) or real(view, names))
    network = trained(tmp_path / "run", settings=preprocessing("chest-xray", size=24))
    path = png(tmp_path / "a.png")
    assert run(tmp_path / "run", path, "--out", tmp_path / "out").exit_code == 0
    np.testing.assert_array_equal(views[0].image, read_source(source(path)).normalised())
    expected = predict_source(network, source(path), network.preprocessing).labels
    np.testing.assert_array_equal(views[0].prediction, expected)
