"""Presets: what they do to values, where their pixels lie, and that a dict in a shard repeats them."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st
from PIL import Image

from coverfast.checks import InputError
from coverfast.ingest.presets import PRESETS, preprocess, preprocessing
from coverfast.ingest.resample import resample_to, smoothing, to_dtype
from coverfast.samples import Original, Sample, check_sample

RADIOGRAPHS = Path(__file__).parents[2] / "shared" / "data" / "chestxray"


def sample_of(pixels, *, slope=1.0, intercept=0.0, spacing=None, original=None):
    ends = sorted(float(v) * slope + intercept for v in (pixels.min(), pixels.max()))
    if pixels.dtype == np.uint8 and (slope, intercept) == (1, 0):
        ends = [0.0, 255.0]
    spacing = spacing or (1.0,) * (pixels.ndim - 1)
    return Sample(pixels, slope, intercept, *ends, spacing, "folder/a", "patient-1", "val", original)


def run(sample, preset, **given):
    """What a build does, by way of the JSON in the shard."""
    settings = json.loads(json.dumps(preprocessing(preset, **given)))
    result = preprocess(sample, settings)
    check_sample(result)
    assert (result.source, result.group, result.split) == ("folder/a", "patient-1", "val")
    assert preprocess(sample, settings).pixels.tobytes() == result.pixels.tobytes()
    return result


def noise(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype, endpoint=True)


# ---- settings


def test_settings_are_complete_and_explained():
    assert preprocessing("raw") == {"preset": "raw", "size": None}
    assert preprocessing("chest-xray", fit="pad") == {"preset": "chest-xray", "size": 512, "fit": "pad"}
    assert preprocessing("ct", clip=(0, 100), spacing=None) == {"preset": "ct", "spacing": 1.0, "clip": [0, 100]}
    assert preprocessing("brain-mr")["shape"] == [160, 160, 128]
    for name, parameters in PRESETS.items():
        settings = preprocessing(name)
        assert preprocessing(**json.loads(json.dumps(settings))) == settings
        assert all(parameter.help for parameter in parameters.values())


@pytest.mark.parametrize(
    ("preset", "given", "message"),
    [
        ("mr", {}, "preset must be one of raw, chest-xray, brain-mr, ct, got 'mr'"),
        ("ct", {"size": 4}, "size must be a parameter of the preset ct, it has spacing, clip"),
        ("raw", {"size": 2.0}, "size must be an int from 1 to 16384, got 2.0"),
        ("raw", {"size": True}, "size must be an int from 1 to 16384, got True"),
        ("chest-xray", {"size": 0}, "size must be an int from 1 to 16384, got 0"),
        ("chest-xray", {"fit": "bend"}, "fit must be one of squash, crop, pad, got 'bend'"),
        ("chest-xray", {"fit": 1}, "fit must be one of squash, crop, pad, got 1"),
        ("brain-mr", {"shape": (8, 8)}, "shape must be 3 ints from 1 to 4096, got .8, 8."),
        ("brain-mr", {"threshold": 1.5}, "threshold must be a number from 0 to 1, got 1.5"),
        ("ct", {"spacing": 0}, "spacing must be a number from 0.01 to 100, got 0"),
        ("ct", {"spacing": math.nan}, "spacing must be a number from 0.01 to 100, got nan"),
        ("ct", {"clip": [5, 5]}, "clip must be two numbers, the lower one first, got 5 5"),
        ("ct", {"clip": 5}, "clip must be 2 numbers from -1000000000 to 1000000000, got 5"),
    ],
)
def test_bad_settings_are_refused(preset, given, message):
    with pytest.raises(InputError, match=message):
        preprocessing(preset, **given)


def test_other_dimensions_and_settings_are_refused_by_name():
    flat, deep = sample_of(noise((1, 8, 8), np.uint8)), sample_of(noise((1, 8, 8, 8), np.uint8))
    for sample, preset, message in (
        (flat, "ct", "folder/a must be 3D for the preset ct, got 2D"),
        (flat, "brain-mr", "folder/a must be 3D for the preset brain-mr, got 2D"),
        (deep, "chest-xray", "folder/a must be 2D for the preset chest-xray, got 3D"),
    ):
        with pytest.raises(InputError, match=message):
            preprocess(sample, preprocessing(preset))
    with pytest.raises(InputError, match="size is for 2D images, folder/a is 3D"):
        preprocess(deep, preprocessing("raw", size=4))
    for nonsense in ({}, [], {"size": 4}, {"preset": "phantom"}, {"preset": None}, {"preset": "raw", 3: 4}):
        with pytest.raises(InputError, match=r"preset|preprocessing"):
            preprocess(deep, nonsense)
    strip = sample_of(noise((1, 5, 11), np.uint8))
    with pytest.raises(InputError, match=r"folder/a: the grid must have pixels inside the image \(5, 11\), got size"):
        preprocess(strip, preprocessing("chest-xray", size=2, fit="pad"))
    with pytest.raises(InputError, match="folder/a must have at most 2,147,483,648 pixels after preprocessing, got 1x"):
        preprocess(replace(deep, spacing=(500.0,) * 3), preprocessing("ct"))


# ---- where pixels lie


@st.composite
def placed(draw, ndim):
    """A float32 image that is a linear function of world coordinates, and that function."""
    shape = tuple(draw(st.lists(st.integers(5, 24), min_size=ndim, max_size=ndim)))
    spacing = tuple(draw(st.lists(st.sampled_from([0.4, 0.75, 1.0, 1.3, 3.0]), min_size=ndim, max_size=ndim)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    turn, shift = np.linalg.qr(rng.standard_normal((ndim, ndim)))[0], rng.uniform(-50, 50, ndim)
    order = rng.permutation(ndim)
    flips = rng.choice([-1, 1], ndim)
    # Stored axis a is axis order[a] of the file, maybe backwards.
    to_original = np.zeros((ndim + 1, ndim + 1))
    to_original[ndim, ndim] = 1
    for axis, (target, flip) in enumerate(zip(order, flips, strict=True)):
        to_original[target, axis] = flip
        to_original[target, ndim] = 0 if flip > 0 else shape[axis] - 1
    affine = np.eye(ndim + 1)
    affine[:ndim, :ndim] = turn @ np.diag(np.array(spacing)[np.argsort(order)])
    affine[:ndim, ndim] = shift
    slopes = rng.standard_normal(ndim)

    def value(original, index):
        """index: (ndim, ...) into the stored image."""
        flat = np.concatenate([index.reshape(ndim, -1), np.ones((1, index[0].size))])
        return (slopes @ (affine @ original.to_original @ flat)[:ndim]).reshape(index.shape[1:])

    original = Original(tuple(int(shape[a]) for a in np.argsort(order)), to_original, affine if ndim == 3 else None)
    pixels = value(original, np.indices(shape, dtype=float)).astype(np.float32)[None]
    return sample_of(pixels, spacing=spacing, original=original), value


def check_place(before, after, value, reach, off=0.0):
    """Inside, where no border is near, each pixel is the function at the place that it claims, to `off` old pixels."""
    assert after.original.affine is before.original.affine
    assert after.original.shape == before.original.shape
    index = np.indices(after.pixels.shape[1:], dtype=float)
    truth = value(after.original, index)
    ndim = len(index)
    homogeneous = np.concatenate([index.reshape(ndim, -1), np.ones((1, index[0].size))])
    old = (np.linalg.inv(before.original.to_original) @ after.original.to_original @ homogeneous)[:ndim]
    limits = np.array(before.pixels.shape[1:])[:, None] - 1
    margin = np.array(reach)[:, None]
    inside = ((old >= margin - 1e-9) & (old <= limits - margin + 1e-9)).all(axis=0).reshape(truth.shape)
    scale = float(np.ptp(before.pixels)) + float(np.abs(before.pixels).max())
    steepest = sum(float(np.abs(np.diff(before.pixels[0], axis=axis)).max()) for axis in range(ndim))
    np.testing.assert_allclose(after.pixels[0][inside], truth[inside], atol=2e-6 * scale + off * steepest)


def unless_between(sample, preset, **given):
    """`run`, unless the image is so thin that it lies between the new pixels."""
    try:
        return run(sample, preset, **given)
    except InputError as error:
        if "folder/a: the grid must have pixels inside the image" not in str(error):
            raise
        reject()


def steps(before, after):
    return [new / old for new, old in zip(after.spacing, before.spacing, strict=True)]


@given(case=placed(3), spacing=st.sampled_from([0.5, 0.8, 1.0, 1.7]))
def test_ct_pixels_lie_where_they_say(case, spacing):
    before, value = case
    after = run(before, "ct", spacing=spacing, clip=(-1e9, 1e9))
    # The extent, half a pixel beyond the outermost centres, is that of before to half a new pixel.
    for old, new, mm in zip(before.pixels.shape[1:], after.pixels.shape[1:], before.spacing, strict=True):
        assert new == 1 or abs(new - old * mm / spacing) <= 0.5 + 1e-9
    np.testing.assert_allclose(after.spacing, spacing)
    reach = [0 if s <= 1 else math.ceil(3 * smoothing(s)) + 1 for s in steps(before, after)]
    check_place(before, after, value, reach)


@given(case=placed(3), shape=st.lists(st.integers(1, 30), min_size=3, max_size=3), enlarge=st.floats(0.3, 3))
def test_brain_pixels_lie_where_they_say(case, shape, enlarge):
    before, value = case
    after = unless_between(before, "brain-mr", shape=shape, enlarge=enlarge)
    assert after.pixels.shape == (1, *shape)
    np.testing.assert_allclose(after.spacing, after.spacing[0], rtol=1e-3)
    assert after.spacing[0] >= min(before.spacing) / enlarge * 0.999
    reach = [0 if s <= 1 else math.ceil(3 * smoothing(s)) + 1 for s in steps(before, after)]
    check_place(before, after, value, reach)


@given(case=placed(2), size=st.integers(1, 40), how=st.sampled_from(["squash", "crop", "pad", "raw"]))
def test_image_pixels_lie_where_they_say(case, size, how):
    before, value = case
    given_ = {"size": size} if how == "raw" else {"size": size, "fit": how}
    after = unless_between(before, "raw" if how == "raw" else "chest-xray", **given_)
    assert after.pixels.shape == (1, size, size)
    # A triangle at uneven steps is a few hundredths of a pixel off, in Pillow as anywhere.
    reach = [0 if s <= 1 else math.ceil(s) for s in steps(before, after)]
    check_place(before, after, value, reach, off=0.1 if any(reach) else 0)
    # The covered square in old pixels, edge to edge.
    height, width = before.pixels.shape[1:]
    edges = np.linalg.inv(before.original.to_original) @ after.original.to_original
    for axis, old in enumerate((height, width)):
        side = {"squash": old, "pad": max(height, width)}.get(how, min(height, width))
        low, high = (edges[axis, axis] * v + edges[axis, 2] for v in (-0.5, size - 0.5))
        assert high - low == pytest.approx(side)
        assert (low + high + 1) / 2 == pytest.approx(old / 2, abs=0.5 if size == side else 1e-6)


def test_half_pixel_geometry_in_numbers():
    ramp = np.broadcast_to(np.arange(12, dtype=np.float32), (1, 12, 12, 12))
    after = run(sample_of(ramp.copy(), spacing=(0.5, 1.0, 1.0)), "ct", spacing=0.5, clip=(-1e6, 1e6))
    assert after.pixels.shape == (1, 12, 24, 24)
    # new = (old + 0.5) * 2 - 0.5, the border repeated
    np.testing.assert_allclose(after.pixels[0, 5, 7], np.clip((np.arange(24) + 0.5) / 2 - 0.5, 0, 11))
    np.testing.assert_allclose(after.original.to_original[2], [0, 0, 0.5, -0.25])


# ---- bits that stay


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint64", "int64", "float32"])
def test_nothing_to_scale_leaves_bits_alone(dtype):
    deep = noise((2, 9, 7, 6), dtype)
    whole = run(sample_of(deep), "brain-mr", shape=(9, 7, 6), threshold=0, enlarge=1)
    assert whole.pixels.dtype == deep.dtype
    assert whole.pixels.tobytes() == deep.tobytes()
    np.testing.assert_array_equal(whole.original.to_original, np.eye(4))
    flat = noise((1, 7, 10), dtype)
    np.testing.assert_array_equal(run(sample_of(flat), "raw", size=7).pixels, flat[:, :, 1:8])
    np.testing.assert_array_equal(run(sample_of(flat[:, :, :7]), "chest-xray", size=7).pixels, flat[:, :, :7])
    sample = sample_of(flat)
    assert preprocess(sample, preprocessing("raw")) is sample


def test_spacing_of_a_rounded_header_moves_nothing():
    deep = noise((1, 30, 30, 30), np.float32)
    result = run(sample_of(deep, spacing=(0.9999999, 1.0, 1.0000001)), "ct", clip=(-100, 100))
    np.testing.assert_array_equal(result.pixels, deep)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "uint64", "int64", "float32"])
def test_scaling_keeps_dtype_and_range(dtype):
    deep, flat = noise((2, 9, 7, 6), dtype), noise((2, 9, 7), dtype)
    for result, given_ in (
        (run(sample_of(deep), "brain-mr", shape=(5, 12, 5)), deep),
        (run(sample_of(flat), "chest-xray", size=5), flat),
        (run(sample_of(flat), "raw", size=20), flat),
    ):
        assert result.pixels.dtype == np.dtype(dtype)
        assert given_.min() <= result.pixels.min() < result.pixels.max() <= given_.max()


def test_integers_are_rounded_and_do_not_wrap():
    assert to_dtype(np.array([-3.0, 0.5, 1.5, 254.6, 300.0]), np.dtype(np.uint8)).tolist() == [0, 0, 2, 255, 255]
    for dtype in (np.uint64, np.int64):
        top = np.iinfo(dtype).max
        assert to_dtype(np.array([float(top), 1e30]), np.dtype(dtype)).min() > top // 2
    wide = np.full((1, 4, 4, 4), 2**30 + 1, np.int32)  # float32 has no such number
    assert (resample_to(wide, (3, 3, 3), (1.2,) * 3, (0.1,) * 3) == 2**30 + 1).all()


# ---- filters


@pytest.mark.parametrize("ndim", [2, 3])
def test_shrinking_does_not_alias(ndim):
    checks = (np.indices((48,) * ndim).sum(axis=0) % 2 * 200).astype(np.uint8)[None]
    small = resample_to(checks, (12,) * ndim, (4.0,) * ndim, (1.5,) * ndim)
    assert np.abs(small[(slice(None), *(slice(2, -2),) * ndim)].astype(int) - 100).max() <= 1
    assert set(np.unique(resample_to(checks, (12,) * ndim, (4.0,) * ndim, (1.0,) * ndim, order=0))) <= {0, 200}


@pytest.mark.parametrize("ndim", [2, 3])
def test_enlarging_does_not_blur(ndim):
    values = noise((1, *(6, 7, 8)[:ndim]), np.uint8)
    large = resample_to(values, [3 * s for s in values.shape[1:]], (1 / 3,) * ndim, (-1 / 3,) * ndim)
    np.testing.assert_array_equal(large[(slice(None), *(slice(1, None, 3),) * ndim)], values)


def test_smoothing_makes_pixels_of_the_new_width():
    fwhm = 2 * math.sqrt(2 * math.log(2))
    assert [smoothing(s) for s in (0.3, 1.0)] == [0, 0]
    for step in (1.1, 2.0, 7.0):
        assert (fwhm * smoothing(step)) ** 2 + 1 == pytest.approx(step**2)
    # An impulse spreads as that Gaussian.
    impulse = np.zeros((1, 1, 1, 41), np.float32)
    impulse[..., 20] = 1
    spread = resample_to(impulse, (1, 1, 21), (1.0, 1.0, 2.0), (0.0, 0.0, 0.0))[0, 0, 0]
    expected = np.exp(-0.5 * ((np.arange(21) * 2 - 20) / smoothing(2)) ** 2) / (smoothing(2) * math.sqrt(2 * math.pi))
    np.testing.assert_allclose(spread, expected, atol=0.01)


def test_images_are_scaled_as_pillow_does():
    flat = noise((1, 60, 45), np.uint8)
    expected = Image.fromarray(flat[0].astype(np.float32)).resize((20, 20), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(run(sample_of(flat), "chest-xray", size=20).pixels[0], np.rint(np.asarray(expected)))


@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    size=st.tuples(*[st.integers(1, 9)] * 3),
    step=st.tuples(*[st.sampled_from([0.5, 1.0, 1.25, 2.0, 3.0])] * 3),
    origin=st.tuples(*[st.sampled_from([-2.0, -0.4, 0.0, 0.3, 0.75])] * 3),
)
def test_labels_take_the_nearest_pixel(shape, size, step, origin):
    labels = np.arange(1, 1 + math.prod(shape), dtype=np.int32).reshape(1, *shape)
    expected = np.zeros((1, *size), np.int32)
    for index in np.ndindex(*size):
        place = [o + s * i for o, s, i in zip(origin, step, index, strict=True)]
        if all(-0.5 <= p <= n - 0.5 for p, n in zip(place, shape, strict=True)):
            old = tuple(min(math.floor(p + 0.5), n - 1) for p, n in zip(place, shape, strict=True))
            expected[(0, *index)] = labels[(0, *old)]
    if not expected.any():
        with pytest.raises(InputError, match="the grid must have pixels inside the image"):
            resample_to(labels, size, step, origin, order=0, fill=lambda _: 0)
        return
    np.testing.assert_array_equal(resample_to(labels, size, step, origin, order=0, fill=lambda _: 0), expected)


def test_only_the_near_part_of_a_volume_matters():
    volume = noise((1, 40, 40, 40), np.float32)
    whole = resample_to(volume, (20, 20, 20), (2.0,) * 3, (0.5,) * 3)
    part = resample_to(volume, (4, 5, 6), (2.0,) * 3, (12.5, 14.5, 16.5))
    np.testing.assert_allclose(part, whole[:, 6:10, 7:12, 8:14], rtol=1e-5, atol=1e-6)
    for wrong in ({"order": 2}, {"step": (0.0, 1.0, 1.0)}):
        with pytest.raises(InputError, match=r"order must be 0 or 1|step must be positive"):
            resample_to(volume, (4, 4, 4), **({"step": (1.0,) * 3, "origin": (0.0,) * 3} | wrong))


# ---- values


def test_chest_xray_values():
    eight = run(sample_of(noise((1, 40, 30), np.uint8) // 2), "chest-xray", size=20)
    assert (eight.lo, eight.hi) == (0, 255)
    for sample in (
        sample_of(noise((1, 40, 30), np.uint16), slope=0.5, intercept=-7),
        sample_of(noise((1, 40, 30), np.uint8), slope=-1, intercept=255),
        sample_of(noise((1, 40, 30), np.uint16)),
    ):
        result = run(sample, "chest-xray", size=20)
        assert result.pixels.dtype == sample.pixels.dtype
        image = result.normalised()
        assert (image.min(), image.max()) == (0, 1)


def test_padding_by_a_part_of_a_pixel_moves_nothing():
    # 5 rows on 13 * 5/6: the first and the last reach over the border.
    ramp = np.broadcast_to(np.arange(5, dtype=np.float32)[:, None], (5, 6))[None].copy()
    result = run(sample_of(ramp), "chest-xray", size=13, fit="pad")
    place = np.arange(13) * 6 / 13 + (6 / 13 - 1) / 2 - 0.5
    expected = np.where((place >= -0.5) & (place <= 4.5), np.clip(place, 0, 4), 0)
    np.testing.assert_allclose(result.pixels[0, :, 6], expected, atol=1e-5)


def test_padding_is_the_darkest_value():
    flat = noise((1, 10, 20), np.uint8) // 2 + 40
    for slope, darkest in ((1.0, np.min), (-1.0, np.max)):
        result = run(sample_of(flat, slope=slope), "chest-xray", size=20, fit="pad")
        np.testing.assert_array_equal(result.pixels[:, 5:15], flat)
        assert (result.pixels[:, [0, 4, 15, 19]] == darkest(flat)).all()


@pytest.mark.skipif(not RADIOGRAPHS.is_dir(), reason="the radiographs are not here")
def test_real_radiographs():
    for path in sorted(RADIOGRAPHS.glob("*.png")):
        pixels = np.asarray(Image.open(path))[None]
        result = run(sample_of(pixels), "chest-xray")
        assert result.pixels.shape == (1, 512, 512)
        blocks = pixels[0].reshape(512, 2, 512, 2).mean(axis=(1, 3))
        assert np.abs(result.pixels[0] - blocks).mean() < 1.5
        assert result.spacing == (2.0, 2.0)


@pytest.mark.parametrize(("dtype", "slope", "intercept"), [("int16", 1, 0), ("uint16", 1, -1024), ("uint16", 0.5, 3.5)])
def test_ct_values_are_clipped_and_whole(dtype, slope, intercept):
    stored = np.random.default_rng(0).integers(0, 4000, (1, 6, 7, 8)).astype(dtype)
    result = run(sample_of(stored, slope=slope, intercept=intercept), "ct")
    assert (result.pixels.dtype, result.slope, result.intercept) == (np.int16, 1, 0)
    assert (result.lo, result.hi) == (0, 2048)
    values = stored.astype(float) * slope + intercept
    np.testing.assert_array_equal(result.pixels, np.rint(np.clip(values, 0, 2048)))
    # The paper's formula, read as it must be meant.
    np.testing.assert_allclose(result.normalised(), np.minimum(np.maximum(0, values), 2048) / 2048, atol=0.5 / 2048)


@pytest.mark.parametrize(
    ("clip", "dtype"),
    [((-1024, 1024), "int16"), ((0, 1), "float32"), ((0.5, 2048), "float32"), ((0, 40000), "float32")],
)
def test_ct_storage_follows_the_clip_range(clip, dtype):
    values = np.linspace(-2000, 50000, 512, dtype=np.float32).reshape(1, 8, 8, 8)
    values[0, 0, 0] = np.linspace(0, 1, 8)
    result = run(sample_of(values), "ct", clip=clip)
    assert result.pixels.dtype == dtype
    expected = (np.clip(values.astype(float), *clip) - clip[0]) / (clip[1] - clip[0])
    np.testing.assert_allclose(result.normalised(), expected, atol=1e-6 if dtype == "float32" else 0.5 / 2048)


def mni(stride=1):
    from nilearn.datasets import load_mni152_template

    image = load_mni152_template(resolution=1)
    turn = np.eye(4)[[2, 1, 0, 3]]
    turn[2, 0] = stride
    pixels = np.asarray(image.dataobj, np.float32).transpose(2, 1, 0)[None, ::stride]
    original = Original(image.shape, turn, image.affine, "RAS")
    stored = np.rint(pixels * 1000).astype(np.int16)
    return sample_of(np.ascontiguousarray(stored), spacing=(float(stride), 1.0, 1.0), original=original)


@pytest.mark.parametrize("stride", [1, 3])
def test_a_real_head_is_not_cut(stride):
    head = mni(stride)
    result = run(head, "brain-mr")
    assert result.pixels.shape == (1, 160, 160, 128)
    assert result.pixels.dtype == np.int16
    # 145 mm from left to right on 128 voxels
    np.testing.assert_allclose(result.spacing, 145 / 128, rtol=0.01)
    image = result.normalised()
    assert (image.min(), image.max()) == (0, 1)

    def moments(sample):
        """Volume in mm3 and centre in mm of what is brighter than a fifth."""
        bright = np.argwhere(sample.pixels[0] > 200).T
        centre = sample.original.affine @ sample.original.to_original @ [*bright.mean(axis=1), 1]
        return bright.shape[1] * math.prod(sample.spacing), centre[:3]

    (volume, centre), (volume_after, centre_after) = moments(head), moments(result)
    assert volume_after == pytest.approx(volume, rel=0.02)
    np.testing.assert_allclose(centre_after, centre, atol=0.2)


def test_the_box_survives_noise_and_padding():
    clean = mni()
    tight = np.array(run(clean, "brain-mr").original.to_original)
    rng = np.random.default_rng(0)
    noisy = np.hypot(
        clean.pixels + rng.normal(0, 40, clean.pixels.shape), rng.normal(0, 40, clean.pixels.shape)
    ).astype(np.int16)
    for spot in ((3, 5, 7), (180, 230, 185), (100, 2, 90)):  # single bright voxels, as spikes leave them
        noisy[(0, *spot)] = 30000
    found = run(replace(clean, pixels=noisy), "brain-mr")
    np.testing.assert_allclose(found.original.to_original, tight, atol=3)
    wide = np.pad(clean.pixels, ((0, 0), (40, 0), (0, 60), (30, 30)))
    found = run(replace(clean, pixels=wide), "brain-mr")
    tight[0, 3] += 30
    tight[2, 3] += 40
    np.testing.assert_allclose(found.original.to_original, tight, atol=1.5)


def test_a_small_brain_in_much_padding_is_found():
    volume = np.zeros((1, 64, 64, 64), np.float32)
    volume[0, 10:40, 10:40, 10:40] = 0.05  # a ghost
    volume[0, 30:42, 30:42, 30:42] = 1  # less than one voxel in a hundred
    result = run(sample_of(volume), "brain-mr", shape=(12, 12, 12))
    np.testing.assert_array_equal(result.pixels, volume[:, 30:42, 30:42, 30:42])


def test_brain_enlarges_only_so_far():
    small = np.zeros((1, 40, 40, 40), np.float32)
    small[0, 10:30, 12:28, 15:25] = 1
    sample = sample_of(small, spacing=(1.0, 1.0, 2.0))
    # 20 mm on 80 voxels would be 0.25 mm.
    assert run(sample, "brain-mr", shape=(80, 80, 80), enlarge=4).spacing == (0.25,) * 3
    result = run(sample, "brain-mr", shape=(80, 80, 80), enlarge=2)
    assert result.spacing == (0.5,) * 3
    bright = np.argwhere(result.pixels[0] > 0.5)
    np.testing.assert_array_equal(bright.min(axis=0) + bright.max(axis=0), 79)
    np.testing.assert_array_equal(np.ptp(bright, axis=0) + 1, (40, 32, 40))
    # Negative slopes: dark numbers are bright values, and the padding is dark.
    turned = replace(sample, pixels=1 - small, slope=-1.0, intercept=1.0)
    np.testing.assert_allclose(run(turned, "brain-mr", shape=(80, 80, 80)).normalised(), result.normalised(), atol=1e-6)
    flat = sample_of(np.full((1, 4, 5, 6), 7, np.int16))
    assert (run(flat, "brain-mr", shape=(8, 8, 8)).normalised() == 0).all()


def test_what_knows_no_file_gets_a_place_in_its_own_grid():
    result = run(sample_of(noise((1, 8, 6), np.uint8)), "chest-xray", size=4)
    assert result.original.shape == (8, 6)
    np.testing.assert_allclose(result.original.to_original, [[2, 0, 0.5], [0, 1.5, 0.25], [0, 0, 1]])
