"""The picture of a run: colours, metrics file, and a PNG that is whole or absent."""

import builtins
import json
from pathlib import Path

import numpy as np
import pytest

from coverfast.checks import InputError
from coverfast.phantom import phantom
from coverfast.report import (
    METRICS,
    Pictures,
    _running_mean,
    dvf_to_rgb,
    load_metrics,
    pretrain_figure,
    write_report,
)


def pictures(*size, channels=1, levels=5, seed=0, **changes):
    rng = np.random.default_rng(seed)
    n = len(size)
    x = np.stack([phantom(n, size, seed=seed, index=c).image for c in range(channels)])
    grid = np.stack(np.meshgrid(*[np.arange(s) for s in size], indexing="ij")).astype(np.float32)
    centre = (np.array(size, np.float32).reshape(n, *[1] * n) - 1) / 2
    dvf = 0.2 * (grid - centre) + np.arange(1, n + 1).reshape(n, *[1] * n)
    at = grid + dvf
    mask = ((at >= 0) & (at <= 2 * centre)).all(axis=0)[None]
    strides = [2 ** (levels - 1 - i) for i in range(levels)]
    fields = [rng.normal(0, 2, (n, *[s // k for s in size])).astype(np.float32) for k in strides]
    whole = {"x_a": x, "x_b": np.roll(x, 3, -1), "dvf_true": dvf, "mask": mask}
    return Pictures(**{**whole, "dvf_levels": fields, "warped": [x] * levels, **changes})


def metrics(n):
    falling = np.exp(-np.arange(n) / 200)
    return {"iteration": np.arange(1.0, n + 1), **{k: (i + 1) * falling for i, k in enumerate(METRICS[1:])}}


def write_lines(path: Path, n: int, tail: str = "") -> Path:
    lines = [json.dumps({k: i + j / 10 for j, k in enumerate(METRICS)} | {"lr": 1e-4, "note": "x"}) for i in range(n)]
    path.write_text("".join(line + "\n" for line in lines) + tail)
    return path


def read_png(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)


# ---- colours


def test_no_displacement_is_white():
    rgb = dvf_to_rgb(np.zeros((2, 3, 5), np.float32))
    assert rgb.shape == (3, 5, 3)
    assert rgb.min() > 0.995


def test_hue_is_direction_and_saturation_is_magnitude():
    turn = np.arange(8) * np.pi / 4
    around = np.stack([np.sin(turn), np.cos(turn)])[:, None]
    full, half = dvf_to_rgb(around, 1.0)[0], dvf_to_rgb(0.5 * around, 1.0)[0]

    def hue(rgb):
        a, b = rgb @ (1, -0.5, -0.5), rgb @ (0, 0.75**0.5, -(0.75**0.5))
        return np.arctan2(b, a)

    between = np.abs(np.angle(np.exp(1j * (hue(full)[:, None] - hue(full)[None]))))
    assert between[~np.eye(8, dtype=bool)].min() > 0.2  # all eight differ
    assert between[np.arange(8), (np.arange(8) + 4) % 8].min() > 2.0  # opposite ones strongly
    assert np.abs(np.angle(np.exp(1j * (hue(full) - hue(half))))).max() < 0.5  # one direction, one hue
    assert (np.ptp(full, axis=-1) > 1.4 * np.ptp(half, axis=-1)).all()


def test_colour_depends_on_the_scale_and_saturates_beyond_it():
    dvf = np.array([[[0.0, 0.0, 0.0]], [[2.0, 4.0, 8.0]]])
    rgb = dvf_to_rgb(dvf, 4.0)[0]
    assert np.array_equal(rgb[1], rgb[2])
    assert not np.allclose(rgb[0], rgb[1], atol=0.05)
    assert np.allclose(dvf_to_rgb(dvf), dvf_to_rgb(dvf / 3))  # without a scale only proportions count


def test_what_is_not_finite_is_grey_and_hides_nothing_else():
    dvf = np.ones((2, 1, 3))
    dvf[0, 0, 0], dvf[1, 0, 1] = np.nan, np.inf
    rgb = dvf_to_rgb(dvf)
    assert (rgb[0, :2] == 0.5).all()
    assert np.allclose(rgb[0, 2], dvf_to_rgb(np.ones((2, 1, 1)))[0, 0])


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 4), (1, 2, 4, 4)])
def test_colour_refuses_other_shapes(shape):
    with pytest.raises(InputError, match="dvf must be"):
        dvf_to_rgb(np.zeros(shape))


def test_colour_refuses_a_scale_of_zero():
    with pytest.raises(InputError, match="scale must be positive"):
        dvf_to_rgb(np.zeros((2, 4, 4)), 0.0)


# ---- metrics


@pytest.mark.parametrize("n", [0, 1, 1000])
def test_metrics_file_is_read_back(tmp_path, n):
    read = load_metrics(write_lines(tmp_path / "metrics.jsonl", n))
    assert set(read) == set(METRICS)
    assert all(v.shape == (n,) and v.dtype == np.float64 for v in read.values())
    assert np.allclose(read["epe_ratio"], np.arange(n) + 0.5)


@pytest.mark.parametrize("tail", ['{"iteration": 3, "lo', "{", '{"iteration": 3, "note": "\u00e9', "\n\n"])
def test_torn_last_line_is_dropped(tmp_path, tail):
    assert len(load_metrics(write_lines(tmp_path / "m.jsonl", 3, tail))["loss"]) == 3


def test_torn_inside_a_character(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", 2)
    path.write_bytes(path.read_bytes() + b'{"note": "\xc3')
    assert len(load_metrics(path)["loss"]) == 2


def test_null_and_nan_are_nan(tmp_path):
    line = dict.fromkeys(METRICS, 1.0) | {"epe": None, "loss": float("nan")}
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(line) + "\n")
    read = load_metrics(path)
    assert np.isnan(read["epe"][0])
    assert np.isnan(read["loss"][0])
    assert read["loss_con"][0] == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"iter\n{"iteration": 1}\n', "line 1 must be a JSON object"),
        ("[1, 2]\n", "line 1 must be a JSON object"),
        ('{"iteration": 1}\n', "line 1 must hold a number 'loss'"),
        ('{"iteration": "one"}\n', "line 1 must hold a number 'iteration', got 'one'"),
    ],
)
def test_other_lines_are_refused(tmp_path, text, message):
    path = tmp_path / "m.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_metrics(path)


def test_absent_metrics_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load_metrics(tmp_path / "none.jsonl")


def test_running_mean_is_the_plain_mean_of_its_window():
    values = np.array([1.0, 2.0, np.nan, 4.0, 8.0])
    assert np.allclose(_running_mean(values, 1), [1.5, 1.5, 3.0, 6.0, 6.0])
    assert np.array_equal(_running_mean(values, 0), values, equal_nan=True)


# ---- the figure


@pytest.mark.parametrize(
    ("size", "channels", "levels", "n"),
    [
        ((64, 64), 1, 5, 1000),
        ((48, 96), 3, 5, 1),
        ((64, 32), 2, 1, 60),
        ((64, 64), 1, 7, 0),
        ((32, 48, 32), 2, 5, 3),
    ],
    ids=["2d", "rgb-wide", "two-channels-tall", "seven-levels", "3d"],
)
def test_report_is_a_readable_picture(tmp_path, size, channels, levels, n):
    target = tmp_path / "picture.png"
    write_report(target, pictures(*size, channels=channels, levels=levels), metrics(n))
    image = read_png(target)
    assert image.shape[1] == 1760
    assert 700 < image.shape[0] < 2000
    assert image[..., :3].std() > 0.1
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]


@pytest.mark.parametrize(
    ("size", "levels"),
    [((64, 64), 3), ((64, 64), 5), ((128, 64), 7), ((32, 96), 5), ((96, 32), 5), ((32, 32, 32), 5)],
)
def test_texts_do_not_overlap(size, levels):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    sample = pictures(*size, levels=levels)
    figure = pretrain_figure(sample, metrics(50))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = list(figure.texts)
    for axes in figure.axes:
        texts += [axes.title, axes._left_title, axes._right_title, axes.xaxis.label]
        ticks = [t for a in (axes.xaxis, axes.yaxis) for t in a._update_ticks() if axes.axison]
        texts += [t.label1 for t in ticks]
        texts += axes.get_legend().get_texts() if axes.get_legend() else []
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_text().strip()]
    for i, (text, box) in enumerate(boxes):
        assert box.x0 >= 0, text
        assert box.x1 <= figure.bbox.width, text
        assert not [(text, other) for other, around in boxes[:i] if box.overlaps(around)]


def shown(figure, title):
    axes = next(a for a in figure.axes if a.get_title(loc="left") == title)
    return axes, np.asarray(axes.images[0].get_array())


def test_both_fields_share_one_scale_and_the_mask_is_cut_from_the_truth():
    sample = pictures(48, 48)
    half = [*sample.dvf_levels[:-1], 0.5 * sample.dvf_true]
    sample = pictures(48, 48, dvf_levels=half)
    figure = pretrain_figure(sample, metrics(5))
    scale = np.hypot(*sample.dvf_true)[sample.mask[0]].max()
    _, truth = shown(figure, "true displacement")
    predicted_axes, predicted = shown(figure, "predicted")
    assert np.allclose(truth[..., :3], dvf_to_rgb(sample.dvf_true, scale))
    assert np.allclose(predicted, dvf_to_rgb(0.5 * sample.dvf_true, scale))
    assert np.array_equal(truth[..., 3].astype(bool), sample.mask[0])
    assert 0 < sample.mask.mean() < 1
    assert "ratio 0.50" in predicted_axes.get_title(loc="right")


def test_volume_shows_the_middle_slice_and_says_so():
    sample = pictures(32, 48, 32)
    figure = pretrain_figure(sample, metrics(5))
    assert np.allclose(shown(figure, "view a")[1][..., 0], sample.x_a[0, 16])
    scale = np.hypot(*sample.dvf_true[1:, 16])[sample.mask[0, 16]].max()
    assert np.allclose(shown(figure, "true displacement")[1][..., :3], dvf_to_rgb(sample.dvf_true[1:, 16], scale))
    assert any("middle slice along z (16 of 32), in-plane" in t.get_text() for t in figure.texts)


def test_overlay_of_aligned_views_is_grey_whatever_their_contrast():
    sample = pictures(48, 48)
    sample = pictures(48, 48, warped=[0.1 + 0.6 * sample.x_b] * 5)
    overlays = [np.asarray(a.images[0].get_array()) for a in pretrain_figure(sample, metrics(2)).axes[4:6]]
    before, after = (np.abs(o[..., 0] - o[..., 1])[sample.mask[0]].mean() for o in overlays)
    assert after < 1e-6 < 0.01 < before


def test_diverged_run_is_still_drawn(tmp_path):
    sample = pictures(32, 32)
    sample = pictures(
        32, 32, dvf_levels=[np.full_like(d, np.nan) for d in sample.dvf_levels], warped=[sample.x_a * np.nan] * 5
    )
    curves = {k: v if k == "iteration" else v * np.nan for k, v in metrics(10).items()}
    write_report(tmp_path / "a.png", sample, curves)
    nothing = pictures(32, 32, mask=np.zeros((1, 32, 32), bool), dvf_true=np.zeros((2, 32, 32)))
    write_report(tmp_path / "b.png", nothing, metrics(10))
    assert read_png(tmp_path / "b.png").ndim == 3


def test_same_input_same_picture(tmp_path):
    for name in ("a.png", "b.png"):
        write_report(tmp_path / name, pictures(32, 32), metrics(10))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_failed_write_leaves_the_old_picture_and_no_temporary(tmp_path, monkeypatch):
    target = tmp_path / "picture.png"
    target.write_bytes(b"old")

    def full_disk(self, data):
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(InputError, match="cannot be written: no space left"):
        write_report(target, pictures(32, 32), metrics(2))
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]


def test_absent_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        write_report(tmp_path / "none" / "picture.png", pictures(32, 32), metrics(2))


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(InputError, match=r"drawing needs the extra: pip install coverfast\[plots\]"):
        write_report(tmp_path / "picture.png", pictures(32, 32), metrics(2))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_b": np.zeros((1, 32, 16))}, "x_b must have shape"),
        ({"mask": np.ones((32, 32), bool)}, "mask must have shape"),
        ({"dvf_true": np.zeros((3, 32, 32))}, "dvf_true must have shape"),
        ({"dvf_levels": []}, "at least one level"),
        ({"dvf_levels": [np.zeros((2, 16, 16))] * 5}, "the last of dvf_levels must have shape"),
        ({"warped": []}, "warped must have one image a level, 5, got 0"),
        ({"warped": [np.zeros((2, 32, 32))] * 5}, r"warped\[0\] must have shape"),
        ({"x_a": np.zeros((32, 32))}, "x_a must be"),
    ],
)
def test_pictures_refuse_shapes_that_do_not_fit(changes, message):
    with pytest.raises(InputError, match=message):
        pictures(32, 32, **changes)
