"""DICOM, by pydicom: what a header says of each slice, and slices to an image.

Only the tags listed here are ever read. Those that identify somebody tell patients apart while files are sorted, and
no name, message or sample holds them.
"""

from __future__ import annotations

import hashlib
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coverfast.checks import require
from coverfast.ingest.readers.decoded import Decoded, as_stored, check_range, luma, narrow, to_ras
from coverfast.ingest.readers.itk import LPS_TO_RAS

# Standard tags whose values may tell volumes of one series apart that lie at the same positions.
MARKS = (
    *("TemporalPositionIdentifier", "TemporalPositionIndex", "EchoNumbers", "EchoTime", "EffectiveEchoTime"),
    *("AcquisitionNumber", "TriggerTime", "NominalCardiacTriggerDelayTime", "NominalPercentageOfCardiacPhase"),
    *("FrameReferenceTime", "DiffusionBValue", "DiffusionGradientOrientation", "FlipAngle", "InversionTime"),
    *("ComplexImageComponent", "ImageType", "FrameType", "StackID"),
)
_IDENTITY = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID", "PatientName")
_GEOMETRY = (
    *("Modality", "Rows", "Columns", "NumberOfFrames", "ImagePositionPatient", "ImageOrientationPatient"),
    *("PixelSpacing", "ImagerPixelSpacing", "SpacingBetweenSlices"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
)
_PIXELS = (
    *("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "BitsAllocated", "BitsStored", "HighBit"),
    *("PixelRepresentation", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *(f"{c}PaletteColorLookupTable{what}" for c in ("Red", "Green", "Blue") for what in ("Descriptor", "Data")),
    *(f"Segmented{c}PaletteColorLookupTableData" for c in ("Red", "Green", "Blue")),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths", "PixelData", "FloatPixelData", "DoubleFloatPixelData"),
)
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")
# Label maps and doses have pixels, and are no images of anatomy.
_NO_IMAGES = ("SEG", "RTDOSE")


class Plane(NamedTuple):
    """What all slices of a stack share: direction cosines along a row and down a column (LPS), and mm along the
    same two; both None for images without a place in the patient. between: mm from slice to slice as the header says,
    0 if it does not. localizer, mosaic: by their ImageType.
    """

    cosines: tuple[float, ...] | None
    spacing: tuple[float, float] | None
    between: float
    rows: int
    columns: int
    localizer: bool
    mosaic: bool


class Slice(NamedTuple):
    """A frame of a file. frame: its number from 0. series, instance: digests of the UIDs. patient: never leaves the
    process. position: mm, LPS, of the first pixel. marks: values of `MARKS`.
    """

    path: str
    frame: int
    frames: int
    series: str
    instance: str
    patient: str
    plane: Plane
    position: tuple[float, ...] | None
    marks: tuple[str, ...]


def digest(text: str, digits: int = 16) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:digits]


def headers(path: str) -> list[Slice]:
    """The slices of a DICOM file, without its pixels; none if it holds no image."""
    return _slices(_load(path, pixels=False), path)


def read_slices(parts: Sequence[tuple[str, int]]) -> Decoded:
    """Files and frames, in the order of a stack, as `(1, z, y, x)`, see `to_ras`; one alone as `(1, H, W)`.

    Stored integers keep their slope and intercept where all slices agree, and become scaled float32 where not (PET).
    MONOCHROME1 is inverted on the stored integers, within their bits: s becomes 2**bits - 1 - s, or -1 - s if signed,
    before slope and intercept. Tables (modality, palette) are applied, colour becomes luma. A tilted gantry gives a
    sheared affine, and pixels stay where they are.
    """
    planes: list[NDArray[Any]] = []
    scalings: list[tuple[float, float]] = []
    slices: list[Slice] = []
    path, ds, found = "", None, []
    for here, frame in parts:
        if here != path:
            path, ds = here, _load(here, pixels=True)
            found = _slices(ds, here)
        require(frame < len(found), f"{Path(here).name} holds {len(found)} frames, expected at least {frame + 1}")
        plane, *scaling = _plane(ds, frame)
        planes.append(plane)
        scalings.append((scaling[0], scaling[1]))
        slices.append(found[frame])
    slope, intercept = scalings[0]
    if len(set(scalings)) > 1 or planes[0].dtype.kind == "f":
        pairs = list(zip(planes, scalings, strict=True))
        if planes[0].dtype != np.float32:  # over all slices: one alone may well be flat
            ends = [float(end(p)) * a + b for p, (a, b) in pairs for end in (np.min, np.max)]
            check_range(min(ends), max(ends))
        planes = [narrow(p.astype(np.float64) * a + b) for p, (a, b) in pairs]
        slope, intercept = 1.0, 0.0
    if len(planes) == 1:
        image = as_stored(planes[0][None], slices[0].plane.spacing and slices[0].plane.spacing[::-1])
    else:
        image = to_ras(np.stack(planes).transpose(2, 1, 0), affine(slices))
    return image._replace(slope=slope, intercept=intercept)


def normal(plane: Plane) -> NDArray[np.float64]:
    """Unit vector along which slices are stacked."""
    row, column = np.reshape(plane.cosines or (), (2, 3))
    across = np.cross(row, column)
    return np.asarray(across / np.linalg.norm(across), np.float64)


def affine(slices: Sequence[Slice]) -> NDArray[np.float64]:
    """Index (column, row, slice) to mm in RAS+ of slices in order; refused unless they are evenly spaced.

    Slices that lie two or three times as far apart as all their headers say (SpacingBetweenSlices) count as missing
    some between them. Slices missing at the ends of a stack cannot be seen.
    """
    plane = slices[0].plane
    require(plane.spacing is not None, "it has positions but no PixelSpacing")
    positions = np.array([s.position for s in slices])
    gaps = np.diff(positions @ normal(plane))
    usual = float(np.sort(gaps)[(len(gaps) - 1) // 2])
    # Positions are often rounded to 0.1 mm. A missing slice makes a gap of at least twice the usual.
    allowed = min(max(0.1 * usual, 0.101), 0.4 * usual)
    odd = np.flatnonzero(abs(gaps - usual) > allowed)
    places = ", ".join(f"{gaps[k]:.4g} mm between slices {k + 1} and {k + 2}" for k in odd[:3])
    more = f" and {len(odd) - 3} more gaps" if len(odd) > 3 else ""
    require(len(odd) == 0, f"slices are missing or uneven: {places}{more}, expected {usual:.4g} mm")
    said = [s.plane.between for s in slices]
    if min(said) > 0 and np.ptp(said) <= 1e-3:
        # Twice or three times: some scanners state the gap between the edges of slices instead, a small part of it.
        times = round(usual / said[0])
        require(
            times not in (2, 3) or abs(usual - times * said[0]) > 0.1 * said[0],
            f"slices are missing: they lie {usual:.4g} mm apart, expected {said[0]:.4g} mm (SpacingBetweenSlices)",
        )
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    off = np.linalg.norm(positions - positions[0] - np.arange(len(slices))[:, None] * step, axis=1)
    require(
        off.max() <= 0.5 * usual,
        f"its slices must lie along a line, got slice {off.argmax() + 1} of {len(slices)} off by {off.max():.3g} mm",
    )
    matrix = np.eye(4)
    matrix[:3, :2] = np.reshape(plane.cosines or (), (2, 3)).T * plane.spacing
    matrix[:3, 2], matrix[:3, 3] = step, positions[0]
    return LPS_TO_RAS @ matrix


def _load(path: str, *, pixels: bool) -> Any:
    import pydicom

    tags = [*_IDENTITY, *_GEOMETRY, *MARKS, *(_PIXELS if pixels else ())]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they quote odd values, names among them
        try:
            return pydicom.dcmread(path, stop_before_pixels=not pixels, specific_tags=tags)
        except pydicom.errors.InvalidDicomError:
            # Old files lack the preamble. Forced, anything can be read as tags: what is no DICOM says no class.
            ds = pydicom.dcmread(path, stop_before_pixels=not pixels, specific_tags=tags, force=True)
            if not (ds.get("SOPClassUID") or ds.file_meta.get("MediaStorageSOPClassUID")):
                raise
            return ds


def _slices(ds: Any, path: str) -> list[Slice]:
    if not (ds.get("Rows") and ds.get("Columns")) or ds.get("Modality") in _NO_IMAGES:
        return []
    frames = int(ds.get("NumberOfFrames") or 1)
    # Without UIDs it is the content that names an image: the path may hold a person's name.
    instance = str(ds.get("SOPInstanceUID") or _start(path))
    series = str(ds.get("SeriesInstanceUID") or instance)
    known = (str(ds.get(k) or "").strip() for k in ("PatientID", "PatientName", "StudyInstanceUID"))
    patient = next(filter(None, known), series)
    found = []
    for frame in range(frames):
        get = _getter(ds, frame)
        cosines, position = _numbers(get("ImageOrientationPatient"), 6), _numbers(get("ImagePositionPatient"), 3)
        if cosines and not np.linalg.norm(np.cross(cosines[:3], cosines[3:])) > 0.5:
            cosines = None
        placed = cosines is not None and position is not None
        # Rows apart first, then columns: the other way round than the cosines.
        apart = _numbers(get("PixelSpacing"), 2) or _numbers(get("ImagerPixelSpacing"), 2)
        spacing = (apart[1], apart[0]) if apart and min(apart) > 0 else None
        kinds = [str(v).upper() for k in ("ImageType", "FrameType") for v in _values(get(k))]
        (between,) = _numbers(get("SpacingBetweenSlices"), 1) or (0.0,)
        plane = Plane(
            *(cosines if placed else None, spacing, between, int(ds.Rows), int(ds.Columns)),
            *("LOCALIZER" in kinds, "MOSAIC" in kinds),
        )
        marks = tuple(sys.intern("\\".join(map(str, _values(get(k))))) for k in MARKS)
        found.append(
            Slice(
                *(path, frame, frames, sys.intern(digest(series)), digest(instance), sys.intern(patient), plane),
                *(position if placed else None, marks),
            )
        )
    return found


def _start(path: str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.sha256(file.read(1 << 16)).hexdigest()


def _getter(ds: Any, frame: int) -> Any:
    """Values by keyword, those of the frame's functional groups before those of the file."""
    values: dict[str, Any] = {}
    per_frame = ds.get("PerFrameFunctionalGroupsSequence") or []
    for group in (*(ds.get("SharedFunctionalGroupsSequence") or []), *per_frame[frame : frame + 1]):
        for sequence in group:
            if sequence.VR == "SQ" and sequence.value:
                values.update((element.keyword, element.value) for element in sequence.value[0])
    return lambda keyword: values.get(keyword, ds.get(keyword))


def _values(value: Any) -> list[Any]:
    return (
        [] if value is None else list(value) if hasattr(value, "__iter__") and not isinstance(value, str) else [value]
    )


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    numbers = tuple(float(v) for v in _values(value) if v != "")
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def _plane(ds: Any, frame: int) -> tuple[NDArray[Any], float, float]:
    """A frame as `(rows, columns)`, bright where high, and its slope and intercept."""
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
    from pydicom.pixels.utils import pixel_array

    kind = str(ds.get("PhotometricInterpretation") or "MONOCHROME2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pixels = pixel_array(ds, index=frame)
    bits = int(ds.get("BitsStored") or ds.BitsAllocated)
    require(int(ds.get("HighBit") or bits - 1) == bits - 1, f"its HighBit must be {bits - 1}, got {ds.get('HighBit')}")
    if kind.startswith("PALETTE"):
        return luma(apply_color_lut(pixels, ds)[..., :3]), 1.0, 0.0
    if pixels.ndim == 3:
        require(kind in _COLOUR, f"its colours {kind} are not supported, expected one of {', '.join(_COLOUR)}")
        return luma(pixels[..., :3]), 1.0, 0.0
    require(kind in ("MONOCHROME1", "MONOCHROME2"), f"its pixels {kind} are not supported, expected MONOCHROME1 or 2")
    get = _getter(ds, frame)
    slope, intercept = (_numbers(get(k), 1) for k in ("RescaleSlope", "RescaleIntercept"))
    scaling = (slope or (1.0,))[0], (intercept or (0.0,))[0]
    require(scaling[0] != 0, "its RescaleSlope must not be 0")
    if ds.get("ModalityLUTSequence"):
        pixels, scaling = apply_modality_lut(pixels, ds), (1.0, 0.0)
        bits = 8 * pixels.dtype.itemsize
    if kind == "MONOCHROME1":
        pixels = -1 - pixels if pixels.dtype.kind != "u" else (2**bits - 1) - pixels
    return pixels, *scaling
