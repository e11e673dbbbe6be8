"""DICOM: series in mixed trees, stacks, slices by position, values, places, refusals, and nothing that identifies."""

from __future__ import annotations

import errno
import hashlib
import random
import shutil
import sys
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coverfast.checks import InputError
from coverfast.ingest import Source, Unreadable, find_sources, read_source, scan

pydicom = pytest.importorskip("pydicom")
nibabel = pytest.importorskip("nibabel")
Rotation = pytest.importorskip("scipy.spatial.transform").Rotation

REAL = Path(pydicom.__file__).parent / "data" / "test_files"
CT, CR, PET = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.1", "1.2.840.10008.5.1.4.1.1.128"
AXIAL = (1, 0, 0, 0, 1, 0)
# What must never come out, planted in every file.
SECRETS = {
    "PatientName": "Roe^Jane",
    "PatientID": "MRN-4711",
    "PatientBirthDate": "19610203",
    "StudyDate": "20191112",
    "AcquisitionDateTime": "20191112101112",
    "InstitutionName": "St. Nowhere",
    "ReferringPhysicianName": "Quack^Quentin",
    "AccessionNumber": "ACC-0815",
    "DeviceSerialNumber": "SN-991",
    "StudyDescription": "head of Jane Roe",
    "PatientComments": "call 555-0100",
}


def uid(text):
    return "2.25." + str(int(hashlib.sha256(text.encode()).hexdigest()[:30], 16))


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def dataset(pixels, *, series="s", instance=None, sop=CT, stored=None, **tags):
    """A data set with the secrets, `tags` over all else; None leaves a tag out."""
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = sop
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = uid(str(instance or random.random()))
    ds.SeriesInstanceUID, ds.StudyInstanceUID = uid(series), uid("study")
    ds.Modality = "CT"
    frames, colour = pixels.ndim == 3 and pixels.shape[2] != 3, pixels.ndim == 3 and pixels.shape[2] == 3
    ds.Rows, ds.Columns = pixels.shape[1:] if frames else pixels.shape[:2]
    if frames:
        ds.NumberOfFrames = len(pixels)
    ds.SamplesPerPixel, ds.PhotometricInterpretation = (3, "RGB") if colour else (1, "MONOCHROME2")
    if colour:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated = 8 * pixels.itemsize
    ds.BitsStored = stored or ds.BitsAllocated
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, value in {**SECRETS, **tags}.items():
            if value is not None:
                setattr(ds, name, value)
    ds.PixelData = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    if len(ds.PixelData) % 2:
        ds.PixelData += b"\0"
    return ds


def save(path, ds):
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


def ct(number, z, pixels, *, series="s", **tags):
    """A slice at z mm, axial unless the tags say otherwise."""
    place = {"ImagePositionPatient": [-10, -20, z], "ImageOrientationPatient": list(AXIAL), "PixelSpacing": [0.5, 0.75]}
    return dataset(pixels, series=series, instance=f"{series} {number}", **{**place, **tags})


def stack(folder, count=5, *, series="s", step=2.5, skip=(), seed=0, **tags):
    """`count` slices of 4 x 6 upwards, in files whose names say nothing of the order; the volume (z, y, x)."""
    rng = np.random.default_rng(seed)
    volume = rng.integers(-1000, 1000, (count, 4, 6)).astype(np.int16)
    for k in set(range(count)) - set(skip):
        save(folder / f"{sha(f'{series}{k}')}", ct(k, k * step - 100, volume[k], series=series, **tags))
    return volume


def only(folder, **options):
    (source,) = find_sources(folder)
    return source, read_source(source, **options)


def test_a_stack_in_any_order_of_files(tmp_path):
    volume = stack(tmp_path / "in", RescaleSlope=2, RescaleIntercept=-1024)
    source, sample = only(tmp_path)
    # Rows run to the left and lines to posterior; superior is already last.
    np.testing.assert_array_equal(sample.pixels[0], volume[:, ::-1, ::-1])
    assert sample.pixels.dtype == np.int16
    assert (sample.slope, sample.intercept) == (2, -1024)
    assert (sample.lo, sample.hi) == (2 * volume.min() - 1024.0, 2 * volume.max() - 1024.0)
    assert sample.spacing == (2.5, 0.5, 0.75)
    assert (sample.original.shape, sample.original.orientation) == ((6, 4, 5), "LPS")
    assert (source.kind, len(source.files), source.name) == ("DICOM", 5, f"dicom/{sha(uid('s'))}")
    assert sample.source == source.name


@given(
    quaternion=st.tuples(*[st.integers(-9, 9)] * 4).filter(any),
    tilt=st.floats(-0.4, 0.4),
    downwards=st.booleans(),
)
def test_world_coordinates(tmp_path_factory, quaternion, tilt, downwards):
    folder = tmp_path_factory.mktemp("world")
    turn = Rotation.from_quat(quaternion).as_matrix()
    row, column, across = turn.T
    # A tilted gantry pushes each slice along its columns.
    step = 3 * (across + tilt * column)
    values = np.arange(3 * 2 * 4, dtype=np.int16).reshape(3, 2, 4)
    origin = np.array([5.0, -7, 11])
    for k in range(3):
        place = [round(float(v), 8) for v in origin + step * (2 - k if downwards else k)]
        cosines = [round(float(v), 10) for v in (*row, *column)]
        ds = ct(k, 0, values[k], ImagePositionPatient=place, ImageOrientationPatient=cosines)
        save(folder / f"{k}.dcm", ds)
    _, sample = only(folder)
    original = sample.original
    assert sorted(sample.pixels.ravel()) == list(range(24))
    for stored, value in np.ndenumerate(sample.pixels[0]):
        k, j, i = np.argwhere(values == value)[0]
        lps = origin + i * 0.75 * row + j * 0.5 * column + (2 - k if downwards else k) * step
        ras = (original.affine @ original.to_original @ [*stored, 1])[:3]
        np.testing.assert_allclose(ras, [-lps[0], -lps[1], lps[2]], atol=1e-5)
    directions = (original.affine @ original.to_original)[:3, 2::-1]
    np.testing.assert_allclose(sample.spacing[::-1], np.linalg.norm(directions, axis=0))
    assert np.trace(directions / np.linalg.norm(directions, axis=0)) > 0.9
    assert original.orientation == "".join(nibabel.aff2axcodes(original.affine))


def test_a_mixed_tree(tmp_path):
    """Two patients, four series, two folders for one of them, a text, a radiograph, an RTSTRUCT, a DICOMDIR."""
    volumes = {
        "a1": stack(tmp_path / "A", 4, series="a1", seed=1),
        "a2": stack(tmp_path / "A", 3, series="a2", seed=2),
        "b1": stack(tmp_path / "B", 6, series="b1", seed=3, PatientID="other", StudyInstanceUID=uid("2")),
    }
    for file in sorted((tmp_path / "A").iterdir())[::2]:
        file.rename(_made(tmp_path / "A" / "deep" / f"{file.name}.dcm"))
    xray = np.arange(20, dtype=np.uint16).reshape(4, 5)
    ds = dataset(
        xray, series="x", instance="x", sop=CR, Modality="CR", PatientID="other", ImagerPixelSpacing=[0.1, 0.2]
    )
    save(tmp_path / "x.ima", ds)
    (tmp_path / "notes.txt").write_text("words " * 100)
    structures = ct(0, 0, xray, series="r", Modality="RTSTRUCT")
    del structures.Rows, structures.PixelData
    save(tmp_path / "structures.dcm", structures)
    save(tmp_path / "labels.dcm", ct(0, 0, xray, series="l", Modality="SEG"))
    save(tmp_path / "scout.dcm", ct(0, 0, xray, series="a1", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]))
    shutil.copy(next((tmp_path / "B").iterdir()), tmp_path / "again.dcm")
    np.save(tmp_path / "array.npy", xray)
    calls = []
    found = scan([tmp_path / "B", tmp_path], progress=lambda *call: calls.append(call))
    assert (found.refused, found.ignored) == ([], 5)
    assert calls == [(i, 18) for i in range(19)]
    samples = {s.name: read_source(s) for s in found.sources}
    assert list(samples) == sorted(samples)
    groups = {}
    for name, volume in volumes.items():
        sample = samples[f"dicom/{sha(uid(name))}"]
        np.testing.assert_array_equal(sample.pixels[0], volume[:, ::-1, ::-1])
        groups[name] = sample.group
    (radiograph,) = (s for n, s in samples.items() if n.startswith(f"dicom/{sha(uid('x'))}-"))
    np.testing.assert_array_equal(radiograph.pixels[0], xray)
    assert (radiograph.spacing, radiograph.original.affine) == ((0.1, 0.2), None)
    assert groups["a1"] == groups["a2"] == "patient-" + min(sha(uid("a1")), sha(uid("a2")))
    assert groups["b1"] == radiograph.group == "patient-" + min(sha(uid("b1")), sha(uid("x")))
    assert len(samples) == 5


def test_a_pattern_for_names_wins_over_the_patient(tmp_path):
    """As where all was anonymised to one PatientID; what matched may be a name, and is not kept."""
    for person in ("Roe", "Doe"):
        stack(tmp_path / "in" / person / "one", 3, series=f"{person}1")
        stack(tmp_path / "in" / person, 4, series=f"{person}2")
    assert len({s.group for s in scan(tmp_path / "in").sources}) == 1
    found = scan(tmp_path / "in", group="^in/([^/]+)/").sources
    assert {(s.path.relative_to(tmp_path).parts[1], s.group) for s in found} == {
        (person, f"patient-{sha(person)}") for person in ("Roe", "Doe")
    }
    assert not any("oe" in s.name + s.group for s in found)
    save(tmp_path / "in" / "lonely.dcm", ct(0, 0, np.zeros((4, 4), np.int16), series="x"))
    with pytest.raises(InputError, match=r"group must match every name, got no match in in/lonely\.dcm"):
        scan(tmp_path / "in", group="^in/([^/]+)/")


def _made(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_names_and_places_of_files_do_not_matter(tmp_path):
    stack(tmp_path / "one", 4)
    stack(tmp_path / "one", 3, series="t")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for number, file in enumerate(sorted((tmp_path / "two").iterdir(), reverse=True)):
        file.rename(_made(tmp_path / "two" / str(number % 3) / f"{number}.DCM"))
    one, two = scan(tmp_path / "one").sources, scan(tmp_path / "two").sources
    assert [(s.name, s.group) for s in one] == [(s.name, s.group) for s in two]
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(read_source(a).pixels, read_source(b).pixels)


@pytest.mark.parametrize(("skip", "where"), [({2}, "5 mm between slices 2 and 3"), ({1, 4}, "slices 1 and 2, 5 mm")])
def test_missing_slices_are_refused(tmp_path, skip, where):
    stack(tmp_path / "gap", 8, skip=skip)
    whole = stack(tmp_path / "whole", 3, series="t")
    found = scan(tmp_path)
    assert [s.name for s in found.sources] == [f"dicom/{sha(uid('t'))}"]
    (sentence,) = found.refused
    assert f"(dicom/{sha(uid('s'))}) cannot be read as DICOM: slices are missing or uneven: " in sentence
    assert where in sentence
    assert sentence.endswith("expected 2.5 mm")
    with pytest.raises(InputError, match="slices are missing"):
        find_sources(tmp_path)
    np.testing.assert_array_equal(read_source(found.sources[0]).pixels[0], whole[:, ::-1, ::-1])
    # A slice that goes after the scan is missed as well.
    found.sources[0].files[1].unlink()
    with pytest.raises(Unreadable, match="No such file"):
        read_source(found.sources[0])


@pytest.mark.parametrize("said", [2.5, 1.667, 1.25, 0.8])
def test_every_other_slice_missing_is_refused(tmp_path, said):
    """Evenly spaced, and not as the headers say; 0.8 and 1.25 mm may be the gap between edges."""
    stack(tmp_path, 9, skip=range(1, 9, 2), SpacingBetweenSlices=said)
    found = scan(tmp_path)
    if said < 1.5:
        assert (len(found.sources), found.refused) == (1, [])
    else:
        (sentence,) = found.refused
        assert f"they lie 5 mm apart, expected {said} mm (SpacingBetweenSlices)" in sentence


def test_spacings_between_slices_that_say_nothing(tmp_path):
    stack(tmp_path / "as said", 5, series="0", SpacingBetweenSlices=2.5)
    stack(tmp_path / "wider", 5, series="1", SpacingBetweenSlices=5)
    stack(tmp_path / "turned", 5, series="2", SpacingBetweenSlices=-1.25)
    for k in range(4):  # where they disagree
        ds = ct(k, 2 * k, np.zeros((4, 4), np.int16), series="3", SpacingBetweenSlices=1 + k)
        save(tmp_path / "other" / str(k), ds)
    found = scan(tmp_path)
    assert (len(found.sources), found.refused) == (4, [])


def test_positions_rounded_to_a_tenth_are_even(tmp_path):
    for k in range(30):
        save(tmp_path / str(k), ct(k, round(k * 0.625, 1), np.full((4, 4), k, np.int16)))
    _, sample = only(tmp_path)
    assert sample.pixels[0, :, 0, 0].tolist() == list(range(30))
    assert sample.spacing[0] == pytest.approx(0.625, abs=0.01)


def test_slices_off_a_line_and_without_spacing(tmp_path):
    for k in range(5):
        place = [-10 + 40 * (k == 2), -20, 3 * k]
        save(tmp_path / "off" / str(k), ct(k, 0, np.zeros((4, 4), np.int16), ImagePositionPatient=place))
        save(tmp_path / "no" / str(k), ct(k, 3 * k, np.zeros((4, 4), np.int16), series="n", PixelSpacing=None))
    off, no = scan(tmp_path).refused[::-1]
    assert "its slices must lie along a line, got slice 3 of 5 off by 40 mm" in off
    assert "it has positions but no PixelSpacing" in no


def test_stacks_of_one_series(tmp_path):
    """Axial and coronal, and two sizes, under one UID: volumes of their own, told apart by digests of UIDs."""
    axial = stack(tmp_path, 4)
    small = np.arange(3 * 4 * 2, dtype=np.int16).reshape(3, 4, 2)
    for k in range(3):
        save(tmp_path / f"small{k}", ct(f"small{k}", k, small[k]))
        side = {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1], "ImagePositionPatient": [0, k * 2, 0]}
        save(tmp_path / f"side{k}", ct(f"side{k}", 0, small[k] + 50, **side))
    found = scan(tmp_path)
    assert found.refused == []
    assert len({s.name for s in found.sources}) == 3
    assert all(s.name.startswith(f"dicom/{sha(uid('s'))}-") for s in found.sources)
    pixels = {len(s.parts) * 1000 + read_source(s).pixels.max(): read_source(s).pixels[0] for s in found.sources}
    np.testing.assert_array_equal(pixels[4000 + axial.max()], axial[:, ::-1, ::-1])
    np.testing.assert_array_equal(pixels[3023], small[:, ::-1, ::-1])
    # Slices run to posterior, lines to inferior, rows to the left.
    np.testing.assert_array_equal(pixels[3073], (small + 50)[::-1].transpose(1, 0, 2)[::-1, :, ::-1])


@pytest.mark.parametrize(
    "tags",
    [
        [{"TemporalPositionIdentifier": t} for t in (1, 2, 3)],
        [{"EchoNumbers": 1, "AcquisitionNumber": 7}, {"EchoNumbers": 2, "AcquisitionNumber": 7}],
        [{"ImageType": ["ORIGINAL", "PRIMARY", kind]} for kind in ("M", "P")],
        [{"EchoNumbers": e, "TemporalPositionIdentifier": t} for e in (1, 2) for t in (1, 2)],
    ],
)
def test_volumes_over_each_other_are_parted_by_a_tag(tmp_path, tags):
    for t, tag in enumerate(tags):
        for k in range(3):
            ds = ct(
                f"{t} {k}", 2 * k, np.full((2, 2), 10 * t + k, np.int16), InstanceNumber=random.randrange(99), **tag
            )
            save(tmp_path / f"{t}{k}", ds)
    found = scan(tmp_path)
    assert found.refused == []
    values = sorted(tuple(read_source(s).pixels[0, :, 0, 0].tolist()) for s in found.sources)
    assert values == [(10 * t, 10 * t + 1, 10 * t + 2) for t in range(len(tags))]


def test_volumes_over_each_other_without_a_tag_are_refused(tmp_path):
    for t in range(2):
        for k in range(3):
            save(tmp_path / f"{t}{k}", ct(f"{t} {k}", 2 * k, np.zeros((2, 2), np.int16)))
    (sentence,) = scan(tmp_path).refused
    assert "it has 6 slices at 3 positions, and no standard tag tells them apart" in sentence


def test_instances_under_one_uid_are_not_lost(tmp_path):
    for k in range(3):
        save(tmp_path / "placed" / str(k), ct("same", k, np.full((2, 2), k, np.int16)))
        wide = np.full((2, 2 + 2 * k), k, np.uint8)
        save(tmp_path / "flat" / str(k), dataset(wide, series="f", instance="same", Modality="CR"))
        shutil.copy(tmp_path / "flat" / str(k), tmp_path / "flat" / f"copy of {k}")
    found = scan(tmp_path)
    assert (found.refused, found.ignored) == ([], 3)
    assert len({s.name for s in found.sources}) == 4
    assert sorted(read_source(s).pixels.shape for s in found.sources) == [
        *((1, 2, 2 + 2 * k) for k in range(3)),
        (1, 3, 2, 2),
    ]


# ---- values


@pytest.mark.parametrize(
    ("dtype", "stored", "values", "expected"),
    [
        (np.uint8, 8, [0, 7, 255], [255, 248, 0]),
        (np.uint16, 12, [0, 7, 4095], [4095, 4088, 0]),
        (np.int16, 16, [-32768, 0, 5], [32767, -1, -6]),
        (np.int16, 12, [-2048, 0, 5], [2047, -1, -6]),
    ],
)
def test_monochrome1_is_inverted(tmp_path, dtype, stored, values, expected):
    tags = {"PhotometricInterpretation": "MONOCHROME1", "RescaleSlope": 0.5, "RescaleIntercept": 3}
    save(tmp_path / "x.dcm", dataset(np.array([values], dtype), stored=stored, **tags))
    _, sample = only(tmp_path)
    assert sample.pixels.dtype == dtype
    assert sample.pixels.ravel().tolist() == expected
    assert (sample.slope, sample.intercept) == (0.5, 3)
    assert (np.diff(sample.normalised().ravel()) < 0).all()


def test_bits_beyond_those_stored_do_not_count(tmp_path):
    """Old files keep overlays there."""
    unsigned = np.array([[0xF001, 0x1FFF, 0x0ABC]], np.uint16)
    save(tmp_path / "u.dcm", dataset(unsigned, series="u", stored=12))
    save(tmp_path / "s.dcm", dataset(unsigned.view(np.int16), series="s", stored=12))
    pixels = {s.path.name: read_source(s).pixels.ravel().tolist() for s in find_sources(tmp_path)}
    assert pixels == {"u.dcm": [1, 0xFFF, 0xABC], "s.dcm": [1, -1, 0xABC - 4096]}


def test_slopes_that_differ_become_float32(tmp_path):
    """As in PET, where each slice is scaled by its own maximum."""
    volume = np.random.default_rng(0).integers(0, 30000, (3, 4, 4)).astype(np.uint16)
    slopes = (0.5, 1.25, 7e-3)
    for k in range(3):
        ds = ct(k, k, volume[k], sop=PET, Modality="PT", RescaleSlope=slopes[k], RescaleIntercept=k)
        save(tmp_path / str(k), ds)
    _, sample = only(tmp_path)
    expected = volume * np.array(slopes)[:, None, None] + np.arange(3)[:, None, None]
    assert sample.pixels.dtype == np.float32
    assert (sample.slope, sample.intercept) == (1, 0)
    np.testing.assert_allclose(sample.pixels[0], expected[:, ::-1, ::-1], rtol=1e-6)


def test_slices_are_judged_together_for_float32(tmp_path):
    """One flat slice is no reason to refuse, a volume that float32 would flatten is."""
    for series, offset in (("even", 0.0), ("far", 1e9)):
        for k in range(3):
            pixels = np.full((4, 4), 7 * k, np.int16)
            pixels[0, 0] += 1
            # Each slice but the first spans 1e-6 only, far from 0.
            tags = {"RescaleSlope": 1e-6 * (k + 1), "RescaleIntercept": 100.0 * k if series == "even" else offset}
            save(tmp_path / series / str(k), ct(k, k, pixels, series=series, **tags))
    assert read_source(find_sources(tmp_path / "even")[0]).pixels.dtype == np.float32
    with pytest.raises(Unreadable, match="must be apart enough for float32"):
        read_source(find_sources(tmp_path / "far")[0])


def test_colour_palettes_and_tables(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    save(tmp_path / "rgb.dcm", dataset(rgb, series="c"))
    table = dataset(np.array([[0, 1, 2, 3]], np.uint8), series="t")
    item = pydicom.Dataset()
    item.LUTDescriptor, item.ModalityLUTType = [4, 0, 16], "US"
    item["LUTDescriptor"].VR = "US"
    item.add_new("LUTData", "US", [10, 200, 3000, 40000])
    table.ModalityLUTSequence = [item]
    save(tmp_path / "table.dcm", table)
    samples = {s.path.name: read_source(s) for s in find_sources(tmp_path)}
    assert np.abs(samples["rgb.dcm"].pixels[0] - rgb @ np.array([0.299, 0.587, 0.114])).max() <= 0.51
    assert samples["table.dcm"].pixels.ravel().tolist() == [10, 200, 3000, 40000]


def enhanced(volume, *, step=2.0, order=None, **tags):
    """A multi-frame data set, its frames in a shuffled order."""
    order = order or list(range(len(volume)))[::-1]
    ds = dataset(volume[order], instance="e", sop="1.2.840.10008.5.1.4.1.1.2.1", **tags)
    measures, plane, shared = (pydicom.Dataset() for _ in range(3))
    measures.PixelSpacing, plane.ImageOrientationPatient = [0.5, 0.75], list(AXIAL)
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    ds.SharedFunctionalGroupsSequence = [shared]
    ds.PerFrameFunctionalGroupsSequence = []
    for k in order:
        place, scale, frame = (pydicom.Dataset() for _ in range(3))
        place.ImagePositionPatient = [-10, -20, step * k]
        scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = 2, -7, "HU"
        frame.PlanePositionSequence, frame.PixelValueTransformationSequence = [place], [scale]
        ds.PerFrameFunctionalGroupsSequence.append(frame)
    return ds


def test_many_frames_in_one_file(tmp_path):
    volume = np.random.default_rng(0).integers(-99, 99, (5, 4, 6)).astype(np.int16)
    save(tmp_path / "e.dcm", enhanced(volume, order=[3, 1, 4, 0, 2]))
    source, sample = only(tmp_path)
    np.testing.assert_array_equal(sample.pixels[0], volume[:, ::-1, ::-1])
    assert (sample.slope, sample.intercept, sample.spacing) == (2, -7, (2, 0.5, 0.75))
    assert source.files == (tmp_path / "e.dcm",)
    # The same file without a scan, as one of its own.
    np.testing.assert_array_equal(read_source(Source(tmp_path / "e.dcm", "e.dcm")).pixels, sample.pixels)


def test_a_film_is_refused_once(tmp_path):
    save(tmp_path / "film.dcm", dataset(np.zeros((7, 4, 5), np.uint8), Modality="US"))
    (sentence,) = scan(tmp_path).refused
    assert sentence.endswith("it has 7 frames without positions and orientations, expected 1")


def test_files_that_are_refused(tmp_path):
    image = dataset(np.zeros((4, 4), np.uint16))
    whole = save(tmp_path / "whole", image).read_bytes()
    (tmp_path / "whole").unlink()
    (tmp_path / "text.dcm").write_text("hello")
    (tmp_path / "header").write_bytes(whole[:200])
    (tmp_path / "pixels").write_bytes(whole[:-3])
    found = scan(tmp_path)
    assert len(found.refused) + found.ignored == 2
    assert any(s.endswith("text.dcm cannot be read as DICOM: its header is broken (InvalidDicomError)")
               for s in found.refused)  # fmt: skip
    (tmp_path / "old.dcm").write_bytes(whole[132:])  # without preamble and mark, as files once were
    (source,) = [s for s in scan(tmp_path).sources if s.path.name == "old.dcm"]
    np.testing.assert_array_equal(read_source(source).pixels, np.zeros((1, 4, 4)))
    (source,) = found.sources
    with pytest.raises(Unreadable, match=r"pixels cannot be read as DICOM: .*less than expected"):
        read_source(source)
    with pytest.raises(InputError, match=r"text.dcm cannot be read as DICOM: its header is broken"):
        find_sources(tmp_path / "text.dcm")
    del image.SOPClassUID  # then the class is said beside the tags
    save(tmp_path / "meta.dcm", image)
    (tmp_path / "meta.dcm").write_bytes((tmp_path / "meta.dcm").read_bytes()[132:])
    assert "meta.dcm" in [s.path.name for s in scan(tmp_path).sources]
    # With preamble and mark it is DICOM, class or not.
    del image.file_meta.MediaStorageSOPClassUID
    image.preamble = bytes(128)
    image.save_as(_made(tmp_path / "marked" / "image"))
    del image.Rows, image.PixelData
    image.save_as(tmp_path / "marked" / "none")
    found = scan(tmp_path / "marked")
    assert ([s.path.name for s in found.sources], found.ignored, found.refused) == (["image"], 1, [])
    mosaic = ct(0, 0, np.zeros((4, 4), np.int16), ImageType=["ORIGINAL", "PRIMARY", "MOSAIC"])
    save(tmp_path / "m" / "mosaic", mosaic)
    assert "it is a mosaic of slices" in scan(tmp_path / "m").refused[0]
    slope = dataset(np.zeros((4, 4), np.int16), RescaleSlope=0)
    with pytest.raises(Unreadable, match="RescaleSlope must not be 0"):
        read_source(find_sources(save(tmp_path / "z" / "slope.dcm", slope))[0])
    palette = dataset(np.zeros((4, 4), np.uint8), PhotometricInterpretation="YBR_PARTIAL_422")
    with pytest.raises(Unreadable, match="cannot be read as DICOM"):
        read_source(find_sources(save(tmp_path / "z" / "partial.dcm", palette))[0])


def test_a_directory_file_is_no_image(tmp_path):
    if not (REAL / "dicomdirtests" / "DICOMDIR").exists():
        pytest.skip("this pydicom came without the file")
    shutil.copy(REAL / "dicomdirtests" / "DICOMDIR", tmp_path)
    stack(tmp_path / "disc", 3)
    found = scan(tmp_path)
    assert (len(found.sources), found.ignored, found.refused) == (1, 1, [])


def test_a_machine_that_fails_is_not_a_broken_file(tmp_path, monkeypatch):
    stack(tmp_path, 3)
    reader = pydicom.dcmread

    def fail(*args, **kwargs):
        raise error

    for error in (OSError(errno.EMFILE, "too many"), MemoryError()):
        source = find_sources(tmp_path)[0]
        monkeypatch.setattr(pydicom, "dcmread", fail)
        kind, words = (MemoryError, "^$") if isinstance(error, MemoryError) else (InputError, "Too many open files")
        for call in (lambda: scan(tmp_path), lambda source=source: read_source(source)):
            with pytest.raises(kind, match=words) as caught:
                call()
            assert not isinstance(caught.value, Unreadable)
        monkeypatch.setattr(pydicom, "dcmread", reader)


def test_the_extra_is_named(tmp_path, monkeypatch):
    stack(tmp_path, 2)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(InputError, match=r"reading DICOM needs the extra: pip install coverfast\[io\]"):
        scan(tmp_path)


# ---- what must not come out


def test_nothing_that_identifies(tmp_path, capfd, recwarn):
    stack(tmp_path / "Roe Jane 19610203", 4)
    stack(tmp_path / "Roe Jane 19610203", 6, series="gap", skip=[2])
    save(tmp_path / "Roe Jane 19610203" / "x", dataset(np.zeros((4, 4), np.uint8), series="x", Modality="CR"))
    broken = dataset(np.zeros((4, 4), np.uint8), series="b", Modality="CR")
    broken.PixelData = b"\0" * 4
    save(tmp_path / "Roe Jane 19610203" / "broken", broken)
    odd = save(tmp_path / "Roe Jane 19610203" / "odd", ct(0, 0, np.zeros((4, 4), np.uint8), series="o"))
    content = odd.read_bytes()
    assert b"0.5\\0.75" in content
    odd.write_bytes(content.replace(b"0.5\\0.75", b"Roe^Jane"))
    found = scan(tmp_path)
    said = [s.replace(str(tmp_path / "Roe Jane 19610203"), "") for s in found.refused]
    for source in found.sources:
        try:
            sample = read_source(source)
            said.append(repr(sample))
        except Unreadable as error:
            said.append(str(error).replace(str(tmp_path / "Roe Jane 19610203"), ""))
        said += [source.name, source.group]
    captured = capfd.readouterr()
    said += [captured.out, captured.err, *(str(w.message) for w in recwarn)]
    text = " ".join(said)
    assert "less than expected" in text
    assert "slices are missing" in text
    assert "its header is broken (ValueError)" in text
    for secret in (*SECRETS.values(), "Roe", "Jane", uid("s"), uid("gap"), uid("study"), uid("x")):
        assert secret not in text
        assert sha(secret) not in text or secret.startswith("2.25.")
    assert {s.group for s in found.sources} == {f"patient-{min(sha(uid(s)) for s in ('s', 'gap', 'x', 'b'))}"}


def test_a_file_without_uids_is_named_by_its_content(tmp_path):
    ds = dataset(np.zeros((4, 4), np.uint8), series="x")
    ds.PatientID = ds.PatientName = ""
    del ds.SOPInstanceUID, ds.SeriesInstanceUID, ds.StudyInstanceUID
    one, two = (save(tmp_path / name / "x.dcm", ds) for name in ("Roe Jane", "two"))
    (source,), (other,) = find_sources(one), find_sources(two)
    assert (source.name, source.group) == (other.name, other.group)
    assert sha(hashlib.sha256(one.read_bytes()[: 1 << 16]).hexdigest()) in source.name
    assert source.group == f"patient-{source.name.split('/')[1].split('-')[0]}"


def test_patients_without_an_id(tmp_path):
    """By name, and without a name by study: not all under one."""
    for number, tags in enumerate(
        [{"PatientName": "A"}, {"PatientName": "A"}, {"PatientName": "B"}, {"PatientName": ""}, {"PatientName": None}]
    ):
        study = uid(f"study{min(number, 3)}")
        ds = dataset(np.zeros((4, 4), np.uint8), series=f"{number}", PatientID="", StudyInstanceUID=study)
        for name, value in tags.items():
            if value is None:
                del ds[name]
            else:
                setattr(ds, name, value)
        save(tmp_path / str(number), ds)
    groups = {s.path.name: s.group for s in find_sources(tmp_path)}
    assert groups["0"] == groups["1"]
    assert groups["3"] == groups["4"]
    assert len(set(groups.values())) == 3


def test_many_slices_take_some_hundred_bytes_each(tmp_path):
    for series in range(3):
        stack(tmp_path / str(series), 100, series=str(series))
    scan(tmp_path)
    tracemalloc.start()
    found = scan(tmp_path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.sources) == 3
    assert kept / 300 < 700
    assert peak / 300 < 1400


# ---- real files


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("CT_small.dcm", (128, 128), np.int16),
        ("MR_small.dcm", (64, 64), np.int16),
        ("MR_small_bigendian.dcm", (64, 64), np.int16),
        ("MR_small_RLE.dcm", (64, 64), np.int16),
        ("MR_small_jp2klossless.dcm", (64, 64), np.int16),
        ("MR_small_jpeg_ls_lossless.dcm", (64, 64), np.int16),
        ("JPEG2000.dcm", (1024, 256), np.int16),
        ("SC_rgb_jpeg.dcm", (256, 256), np.uint8),
        ("examples_palette.dcm", (350, 800), np.uint16),
    ],
)
@pytest.mark.filterwarnings("ignore:Expected explicit VR")
def test_real_files(name, shape, dtype):
    if not (REAL / name).exists():
        pytest.skip("this pydicom came without the file")
    sample = read_source(find_sources(REAL / name)[0])
    assert (sample.pixels.shape, sample.pixels.dtype) == ((1, *shape), dtype)
    ds = pydicom.dcmread(REAL / name, specific_tags=["PatientName", "PatientID"])
    if name == "CT_small.dcm":
        assert (sample.slope, sample.intercept, sample.spacing) == (1, -1024, (0.661468, 0.661468))
    if name.startswith("MR_small") and (REAL / "MR_small.dcm").exists():
        plain = pydicom.dcmread(REAL / "MR_small.dcm").pixel_array
        np.testing.assert_array_equal(sample.pixels[0], plain)
    for value in (str(ds.get("PatientName")), str(ds.get("PatientID"))):
        assert not value or value not in repr(sample)


def test_all_real_files_at_once():
    """What the wheel holds: each file is an image, is none, or is refused in one sentence."""
    if not REAL.is_dir():
        pytest.skip("this pydicom came without its sample files")
    found = scan(REAL)
    done, sentences = [], list(found.refused)
    for source in found.sources:
        try:
            done.append(read_source(source))
        except Unreadable as error:
            sentences.append(str(error))
    assert len(done) >= 0.8 * len(found.sources) > 0
    assert all("cannot be read as DICOM: " in s and "\n" not in s for s in sentences)
    volume = next((s for s in done if s.pixels.shape == (1, 5, 16, 16)), None)
    if (REAL / "dicomdirtests" / "98892001" / "CT5N").is_dir():
        assert volume is not None
        assert volume.spacing == pytest.approx((2.5, 0.488281, 0.488281))
    mosaic = Path(nibabel.__file__).parent / "tests" / "data" / "0.dcm"
    if mosaic.exists():
        assert "it is a mosaic of slices" in scan(mosaic).refused[0]
