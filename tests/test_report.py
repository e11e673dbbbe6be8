"""The report of a run: colours, metrics file, sheets, and a page that is whole or absent."""

import builtins
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from coverfast.checks import InputError
from coverfast.phantom import phantom
from coverfast.report import Entry, Pictures, dvf_to_rgb, load_metrics, write_index, write_report
from coverfast.report.colours import feature_colours
from coverfast.report.curves import curves_sheet, running_mean, thinned
from coverfast.report.features import features_sheet
from coverfast.report.metrics import last_figures, meaning
from coverfast.report.overview import overview_sheet
from coverfast.report.similarity import similarity_sheet

NAMES = ("iteration", "loss", "loss_vec", "loss_con", "epe", "epe_ratio", "seconds")


def pictures(*size, channels=1, levels=5, seed=0, count=3, window=5, **changes):
    rng = np.random.default_rng(seed)
    n = len(size)
    x = np.stack([phantom(n, size, seed=seed, index=c).image for c in range(channels)])
    grid = np.stack(np.meshgrid(*[np.arange(s) for s in size], indexing="ij")).astype(np.float32)
    centre = (np.array(size, np.float32).reshape(n, *[1] * n) - 1) / 2
    dvf = 0.2 * (grid - centre) + np.arange(1, n + 1).reshape(n, *[1] * n)
    at = grid + dvf
    mask = ((at >= 0) & (at <= 2 * centre)).all(axis=0)[None]
    strides = [2 ** (levels - 1 - i) for i in range(levels)]
    sizes = [[s // k for s in size] for k in strides]
    middle = np.array([s // 3 for s in size])
    marks = np.array([np.where(np.arange(n) == i % n, middle, np.array(size) // 2 + i) for i in range(count)]).reshape(
        count, n
    )
    weights = rng.random((count, window**n))
    weights = (weights / weights.sum(1, keepdims=True)).reshape(count, *[window] * n)
    whole = {
        "x_a": x,
        "x_b": np.roll(x, 3, -1),
        "dvf_true": dvf,
        "mask": mask,
        "dvf_levels": [rng.normal(0, 2, (n, *s)).astype(np.float32) for s in sizes],
        "warped": [x] * levels,
        "features_a": [rng.normal(size=(8 * 2 ** (levels - 1 - i), *s)) for i, s in enumerate(sizes)],
        "features_b": [rng.normal(size=(8 * 2 ** (levels - 1 - i), *s)) for i, s in enumerate(sizes)],
        "centre": middle,
        "points": marks,
        "similarity": [weights] * levels,
        "vectors": [rng.uniform(-2, 2, (count, n))] * levels,
        "vectors_true": [rng.uniform(-9, 9, (count, n)) for _ in range(levels - 1)] + [np.full((count, n), np.nan)],
        "windows": [marks + 3.0] * levels,
    }
    return Pictures(**{**whole, **changes})


def metrics(n):
    falling = np.exp(-np.arange(n) / 200)
    return {"iteration": np.arange(1.0, n + 1), **{k: (i + 1) * falling for i, k in enumerate(NAMES[1:])}}


def full_metrics(n):
    """With what comes now and then."""
    found, seldom = metrics(n), np.arange(n) % 10 == 0
    names = [f"ratio_{i}" for i in range(5)] + ["cos_near", "cos_random", "rank", "rank_coarse", "val_epe_ratio"]
    found |= {name: np.where(seldom, 0.5 + i / 20, np.nan) for i, name in enumerate(names)}
    return found | {"lr": np.full(n, 1e-4), "grad_norm": found["loss"] ** 2, "data_wait": found["loss"] / 100}


def write_lines(path: Path, n: int, tail: str = "") -> Path:
    lines = [json.dumps({k: i + j / 10 for j, k in enumerate(NAMES)} | {"lr": 1e-4, "note": "x"}) for i in range(n)]
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
    assert set(read) == (set(NAMES) | {"lr"} if n else {"iteration", "loss"})  # "note" is no number
    assert all(v.shape == (n,) and v.dtype == np.float64 for v in read.values())
    assert np.allclose(read.get("epe_ratio", read["loss"]), np.arange(n) + 0.5)


def test_lines_may_have_different_keys(tmp_path, monkeypatch):
    monkeypatch.setattr("coverfast.report.metrics._BLOCK", 7)  # a key may be missing from whole blocks
    lines = [{"iteration": i, "loss": 1.0} | ({"rank": float(i)} if i == 17 else {}) for i in range(30)]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = load_metrics(path)
    assert np.array_equal(read["rank"], [17.0 if i == 17 else np.nan for i in range(30)], equal_nan=True)
    assert np.array_equal(read["iteration"], np.arange(30.0))
    path.write_text(path.read_text() + '{"iteration": 1}\n')
    with pytest.raises(InputError, match="line 31 must hold a number 'loss', got 'nothing'"):
        load_metrics(path)


@pytest.mark.parametrize("tail", ['{"iteration": 3, "lo', "{", '{"iteration": 3, "note": "\u00e9', "\n\n"])
def test_torn_last_line_is_dropped(tmp_path, tail):
    assert len(load_metrics(write_lines(tmp_path / "m.jsonl", 3, tail))["loss"]) == 3


def test_torn_inside_a_character(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", 2)
    path.write_bytes(path.read_bytes() + b'{"note": "\xc3')
    assert len(load_metrics(path)["loss"]) == 2


def test_null_and_nan_are_nan(tmp_path):
    line = dict.fromkeys(NAMES, 1.0) | {"epe": None, "loss": float("nan")}
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
    values = np.array([1.0, 2.0, 3.0, 4.0, 8.0])
    assert np.allclose(running_mean(values, 1), [1.5, 2.0, 3.0, 5.0, 6.0])
    assert np.array_equal(running_mean(values, 0), values)


def test_many_values_are_thinned_and_no_spike_is_lost():
    x, y = np.arange(100_003.0), np.sin(np.arange(100_003.0))
    y[51_234], y[70_000] = 9.0, -9.0
    at, low, high = thinned(x, y, 500)
    assert at.shape == low.shape == high.shape == (500,)
    assert (np.diff(at) > 0).all()
    assert (high.max(), low.min()) == (9.0, -9.0)
    assert abs(at[high.argmax()] - 51_234) < 101
    assert np.array_equal(thinned(x[:500], y[:500], 500), [x[:500], y[:500], y[:500]])


def test_last_figures_are_told_with_their_meaning():
    found = {"iteration": np.arange(1.0, 101.0), "odd": np.ones(100), "mfu": np.full(100, np.nan)}
    found |= {"loss": np.arange(100.0), "val_epe_ratio": np.array([0.5, 0.25] + [np.nan] * 98), "ratio_3": np.ones(100)}
    assert last_figures(found) == [
        ("loss", 99.0, 74.5, 100),
        ("val_epe_ratio", 0.25, 0.375, 2),
        ("ratio_3", 1.0, 1.0, 100),
        ("odd", 1.0, 1.0, 100),
    ]
    assert meaning("val_epe_ratio").startswith("held out: end-point error over")
    assert meaning("ratio_3") == "end-point ratio, level 3"
    assert meaning("odd") == ""


# ---- feature colours


def test_features_of_both_views_share_their_colours():
    rng = np.random.default_rng(0)
    tissues = rng.normal(size=(4, 12))
    a, b = rng.integers(0, 4, (16, 16)), rng.integers(0, 4, (8, 24))
    (colours_a, colours_b), share = feature_colours([tissues[a].transpose(2, 0, 1), tissues[b].transpose(2, 0, 1)])
    assert colours_a.shape == (16, 16, 3)
    assert colours_b.shape == (8, 24, 3)
    assert share > 0.999  # four points span three dimensions
    kinds = [np.unique(np.concatenate([colours_a[a == t], colours_b[b == t]]).round(6), axis=0) for t in range(4)]
    assert [len(k) for k in kinds] == [1] * 4
    gaps = [np.abs(kinds[i] - kinds[j]).max() for i in range(4) for j in range(i)]
    assert min(gaps) > 0.3


def test_colours_do_not_flip_with_the_sign_of_an_eigenvector(monkeypatch):
    maps = np.random.default_rng(1).normal(size=(6, 9, 9)) * np.array([4, 3, 2, 1, 1, 1.0])[:, None, None]
    (before,), share = feature_colours([maps])
    real = np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", lambda m: (real(m)[0], -real(m)[1]))
    (after,), _ = feature_colours([maps])
    assert np.array_equal(before, after)
    # Red rises with the channel that varies most.
    assert np.corrcoef(before[..., 0].ravel(), maps[0].ravel())[0, 1] > 0.9
    assert 0.7 < share < 0.95


def test_features_that_tell_nothing_are_grey():
    constant = np.full((5, 4, 4), 3.0)
    (colours,), share = feature_colours([constant])
    assert (colours == 0.5).all()
    assert np.isnan(share)
    two = np.random.default_rng(0).normal(size=(2, 6, 6))
    two[0, 0, 0] = np.nan
    (colours,), _ = feature_colours([two])
    assert (colours[0, 0] == 0.5).all()
    assert (colours[..., 2] == 0.5).all()
    assert colours[1:, :, :2].std() > 0.1
    assert (feature_colours([np.full((3, 2, 2), np.nan)])[0][0] == 0.5).all()


# ---- the sheets


@pytest.mark.parametrize(
    ("size", "levels", "n"), [((48, 48), 3, 50), ((128, 64), 7, 0), ((32, 96), 5, 200_000), ((32, 32, 64), 5, 5)]
)
def test_texts_do_not_overlap(size, levels, n):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    sample, found = pictures(*size, levels=levels), full_metrics(n)
    for sheet in (
        overview_sheet(sample, found),
        overview_sheet(sample, {}),
        features_sheet(sample),
        similarity_sheet(sample),
        curves_sheet(found),
    ):
        if sheet is None:
            continue
        figure = sheet.figure
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw_without_rendering()
        texts = []
        for axes in figure.axes:
            texts += [*axes.texts, axes.title, axes._left_title, axes._right_title, axes.xaxis.label]
            ticks = [t for a in (axes.xaxis, axes.yaxis) for t in a._update_ticks() if axes.axison]
            texts += [t.label1 for t in ticks]
            texts += axes.get_legend().get_texts() if axes.get_legend() else []
        boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_text().strip()]
        for i, (text, box) in enumerate(boxes):
            assert box.x0 >= 0, text
            assert box.x1 <= figure.bbox.width, text
            assert 0 <= box.y0 < box.y1 <= figure.bbox.height, text
            assert not [(text, other) for other, around in boxes[:i] if box.overlaps(around)]


def shown(sheet, name, note=""):
    return next(t for t in sheet.tiles if (t.name, t.note)[: 1 + bool(note)] == (name, note)[: 1 + bool(note)])


def test_both_fields_share_one_scale_and_the_mask_is_cut_from_the_truth():
    sample = pictures(48, 48)
    half = [*sample.dvf_levels[:-1], 0.5 * sample.dvf_true]
    sample = pictures(48, 48, dvf_levels=half)
    sheet = overview_sheet(sample, metrics(5))
    scale = np.hypot(*sample.dvf_true)[sample.mask[0]].max()
    truth, predicted = shown(sheet, "true displacement"), shown(sheet, "predicted")
    assert np.allclose(truth.rgb, dvf_to_rgb(sample.dvf_true, scale))
    assert np.allclose(predicted.rgb, dvf_to_rgb(0.5 * sample.dvf_true, scale))
    assert np.array_equal(truth.inside, sample.mask[0])
    assert predicted.inside is None
    assert 0 < sample.mask.mean() < 1
    assert "ratio 0.50" in predicted.note


def test_volume_shows_three_slices_and_the_displacement_in_each():
    sample = pictures(32, 48, 64)
    sheet = overview_sheet(sample, metrics(5))
    z, y, x = sample.centre
    tiles = [t for t in sheet.tiles if t.left == sheet.tiles[0].left][::2]  # view a, and below it its warps
    assert [t.rgb.shape[:2] for t in tiles] == [(48, 64), (32, 64), (32, 48)]
    for t, plane in zip(tiles, (sample.x_a[0, z], sample.x_a[0, :, y], sample.x_a[0, :, :, x]), strict=True):
        assert np.allclose(t.rgb[..., 0], plane)
        assert t.up
    fields = [sample.dvf_true[[1, 2], z], sample.dvf_true[[0, 2], :, y], sample.dvf_true[[0, 1], :, :, x]]
    masks = [sample.mask[0, z], sample.mask[0, :, y], sample.mask[0, :, :, x]]
    scale = max(np.hypot(*f)[m].max() for f, m in zip(fields, masks, strict=True))
    truths = [t for t in sheet.tiles if t.inside is not None and t.left == shown(sheet, "true displacement").left]
    for t, field, mask in zip(truths, fields, masks, strict=True):
        assert np.allclose(t.rgb, dvf_to_rgb(field, scale))
        assert np.array_equal(t.inside, mask)
    texts = [t.get_text() for t in sheet.canvas.texts]
    assert {f"z = {z}", f"y = {y}", f"x = {x}"} <= set(texts)


def test_what_is_drawn_lies_where_its_pixels_lie():
    """Row 0 of an image is at the top, that of a slice at the bottom, in marks as in pictures."""
    for size in ((32, 48), (32, 48, 64)):
        sheet = similarity_sheet(pictures(*size))
        tile = sheet.tiles[0]
        (x0, y0), (x1, y1) = tile.at(0, 0), tile.at(1, 1)
        assert x1 > x0
        assert (y1 > y0) == (len(size) == 2)
        rows, columns = tile.rgb.shape[:2]
        assert np.isclose(x1 - x0, tile.wide / columns)
        assert np.isclose(abs(y1 - y0), tile.tall / rows)
        image = next(i for i in sheet.canvas.images if np.array_equal(i.get_array(), tile.rgb))
        assert image.origin == ("upper" if len(size) == 2 else "lower")
        left, right, bottom, top = image.get_extent()
        assert np.allclose(
            [left, right, bottom, top], [tile.left, tile.left + tile.wide, tile.top + tile.tall, tile.top]
        )


def test_marks_and_windows_stand_where_they_should():
    sample = pictures(64, 64, count=1)
    sheet = similarity_sheet(sample)
    b, a, *levels = sheet.tiles
    crosses = [line for line in sheet.canvas.lines if line.get_marker() == "+"]
    rings = [line for line in sheet.canvas.lines if line.get_marker() == "o"]
    at = lambda line: (line.get_xdata()[0], line.get_ydata()[0])  # noqa: E731
    p = sample.points[0]
    true, found = (p + f[(slice(None), *p)] for f in (sample.dvf_true, sample.dvf_levels[-1]))
    assert np.allclose(at(crosses[0]), b.at(*p))
    assert np.allclose(at(crosses[2]), a.at(*true))
    assert np.allclose(at(rings[0]), a.at(*found))
    vector = sample.vectors[0][0]
    assert np.allclose(at(rings[2]), levels[0].at(*(vector + 2)))
    # No cross at the finest level, where nothing leads to the truth; two lines a cross, for its rim; one in the legend.
    assert len(crosses) == 2 * (2 + 4 + 1)
    frames = [f for f in sheet.canvas.patches if f.get_linewidth() == 1.3]
    wide = [abs(f.get_width()) / (a.wide / 64) for f in frames]
    assert np.allclose(wide, [5 * 16, 5 * 8, 5 * 4, 5 * 2, 5])
    y, x = sample.windows[0][0]
    centre = (frames[0].get_x() + frames[0].get_width() / 2, frames[0].get_y() + frames[0].get_height() / 2)
    assert np.allclose(centre, a.at(y, x))
    assert np.allclose(levels[1].rgb.argmin() // 3, sample.similarity[1][0].argmax())


def test_weights_of_a_volume_are_summed_across_the_plane():
    sample = pictures(32, 48, 32, count=2)
    sheet = similarity_sheet(sample)
    weights = sample.similarity[0][1].sum(1)  # the second point lies on the plane across y
    tile = sheet.tiles[7 + 2]
    assert np.isclose(float(tile.note), weights.max(), rtol=0.05)
    darkness = 1 - tile.rgb[..., 0]
    assert np.allclose(darkness / darkness.max(), weights / weights.max())
    assert sheet.tiles[7].note == f"y = {sample.centre[1]}"


def test_overlay_of_aligned_views_is_grey_whatever_their_contrast():
    sample = pictures(48, 48)
    sample = pictures(48, 48, warped=[0.1 + 0.6 * sample.x_b] * 5)
    sheet = overview_sheet(sample, metrics(2))
    tiles = [shown(sheet, "a over b", note) for note in ("before", "after warping")]
    before, after = (np.abs(t.rgb[..., 0] - t.rgb[..., 1])[sample.mask[0]].mean() for t in tiles)
    assert after < 1e-6 < 0.01 < before


def test_panels_without_data_are_left_out():
    titles = [axes.get_title(loc="left") for axes in curves_sheet(full_metrics(30)).figure.axes[1:]]
    assert len(titles) == 8
    few = curves_sheet({k: v for k, v in full_metrics(30).items() if k in ("iteration", "loss", "lr", "rank")})
    assert [axes.get_title(loc="left")[:4] for axes in few.figure.axes[1:]] == ["loss", "effe", "lear"]
    assert curves_sheet({}) is None
    assert curves_sheet(metrics(0)) is None
    assert curves_sheet({"iteration": np.arange(3.0), "loss": np.full(3, np.nan)}) is None


# ---- the page


@pytest.fixture
def coarse(monkeypatch):
    """Pictures of few pixels, for what is not about them."""
    monkeypatch.setattr("coverfast.report.sheet.DPI", 20)


class Page(HTMLParser):
    """Links, images and text; refuses tags that are not closed in order."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.images, self.text, self.open = [], [], "", []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.links += [dict(attributes)["href"]] if tag == "a" else []
        self.images += [dict(attributes)["src"]] if tag == "img" else []
        assert tag != "script"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open and self.open[-1] != "style" else ""


PNGS = ["overview.png", "features.png", "similarity.png", "curves.png"]


@pytest.mark.parametrize(
    ("size", "channels", "levels", "n"),
    [((48, 96), 3, 5, 1000), ((32, 48, 32), 2, 3, 1)],
    ids=["2d-rgb", "3d-two-channels"],
)
def test_report_is_a_page_with_readable_pictures(tmp_path, size, channels, levels, n):
    sample = pictures(*size, channels=channels, levels=levels)
    page = write_report(tmp_path / "a" / "b", sample, full_metrics(n), title="a <b> & c", about={"image": "<x>.png"})
    assert page == tmp_path / "a" / "b" / "index.html"
    assert sorted(p.name for p in page.parent.iterdir()) == sorted([*PNGS, "index.html"])
    found = Page(page)
    assert found.images == found.links == PNGS
    for name in PNGS:
        image = read_png(page.parent / name)
        assert image.shape[1] == 1760
        assert 300 < image.shape[0] < 3500
        assert image[..., :3].std() > 0.05
        assert f'src="{name}" alt=' in found.source
        assert f'width="1760" height="{image.shape[0]}"' in found.source
    assert "a <b> & c" in found.text
    assert "<x>.png" in found.text
    assert f"{sample.end_point()[0]:.2f} px off" in found.text
    assert "data_wait" in found.text
    assert not re.search(r"https?:", found.source)


def test_without_figures_and_marks_there_are_no_curves_and_no_matches(tmp_path, coarse):
    write_report(tmp_path, pictures(32, 32, count=0, levels=1), title="x")
    found = Page(tmp_path / "index.html")
    assert found.images == ["overview.png", "features.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["features.png", "index.html", "overview.png"]
    assert "<table" not in found.source


def test_the_page_over_several_leads_to_each(tmp_path):
    page = write_index(tmp_path, [Entry("a-1", "a & b", "ratio 0.5"), Entry("c", "c", "")], title="2 images")
    found = Page(page)
    assert found.links == ["a-1/index.html", "c/index.html"]
    assert found.images == ["a-1/overview.png", "c/overview.png"]
    assert "a & b" in found.text


def test_diverged_run_is_still_drawn(tmp_path, coarse):
    sample = pictures(32, 32)
    broken = ("dvf_levels", "warped", "features_a", "similarity", "vectors", "windows")
    sample = pictures(32, 32, **{name: [np.full_like(x, np.nan) for x in getattr(sample, name)] for name in broken})
    curves = {k: v if k == "iteration" else v * np.nan for k, v in metrics(10).items()}
    write_report(tmp_path / "a", sample, curves, title="x")
    nothing = pictures(32, 32, mask=np.zeros((1, 32, 32), bool), dvf_true=np.zeros((2, 32, 32)))
    write_report(tmp_path / "b", nothing, metrics(10), title="x")
    assert read_png(tmp_path / "b" / "overview.png").ndim == 3


def test_same_input_same_report(tmp_path, coarse):
    for name in "ab":
        write_report(tmp_path / name, pictures(32, 32, levels=2), full_metrics(2), title="x")
    for name in [*PNGS, "index.html"]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_failed_write_leaves_the_old_files_and_no_temporary(tmp_path, coarse, monkeypatch):
    for name in [*PNGS, "index.html"]:
        (tmp_path / name).write_bytes(b"old")
    real = Path.write_bytes

    def full_disk(self, data):
        if "similarity" not in self.name:
            return real(self, data)
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(InputError, match=r"similarity.png cannot be written: no space left"):
        write_report(tmp_path, pictures(32, 32), metrics(2), title="x")
    assert (tmp_path / "similarity.png").read_bytes() == (tmp_path / "index.html").read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*PNGS, "index.html"])


def test_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        write_report(tmp_path / "file" / "report", pictures(32, 32), metrics(2), title="x")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(InputError, match=r"drawing needs the extra: pip install coverfast\[plots\]"):
        write_report(tmp_path / "report", pictures(32, 32), metrics(2), title="x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_b": np.zeros((1, 32, 16))}, "x_b must have shape"),
        ({"mask": np.ones((32, 32), bool)}, "mask must have shape"),
        ({"dvf_true": np.zeros((3, 32, 32))}, "dvf_true must have shape"),
        ({"dvf_levels": []}, "at least one level"),
        ({"dvf_levels": [np.zeros((2, 16, 16))] * 5}, r"dvf_levels\[0\] must have shape \(2, 2, 2\)"),
        ({"warped": []}, "warped must have 5 entries, one a level, got 0"),
        ({"warped": [np.zeros((2, 32, 32))] * 5}, r"warped\[0\] must have shape"),
        ({"features_a": [np.zeros((8, 32, 32))] * 5}, r"features_a\[0\] must have shape \(any, 2, 2\)"),
        ({"vectors": [np.zeros((1, 2))] * 5}, r"vectors\[0\] must have shape \(3, 2\)"),
        ({"points": np.full((3, 2), 40)}, "must lie in an image of"),
        ({"x_a": np.zeros((32, 32))}, "x_a must be"),
    ],
)
def test_pictures_refuse_shapes_that_do_not_fit(changes, message):
    with pytest.raises(InputError, match=message):
        pictures(32, 32, **changes)
