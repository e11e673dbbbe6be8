"""The report of any method: what it shows, its curves, and what the terminal says of it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from strategies import refused

from coverfast.cli.progress import training_progress
from coverfast.methods import Shown
from coverfast.phantom import phantom
from coverfast.report import Entry, Gallery, dvf_to_rgb, load_metrics, on_host, write_index, write_report
from coverfast.report.curves import OTHERS, curves_sheet, loss_panel, merit_panel
from coverfast.report.gallery_sheet import gallery_sheet
from coverfast.report.metrics import meaning

LOSSES = ("loss", "loss_ncc", "loss_smooth", "loss_restore")


def image(*size, channels=1, index=0):
    return torch.stack(
        [torch.from_numpy(phantom(len(size), size, seed=0, index=index + c).image) for c in range(channels)]
    )


def field(*size, strength=1.0):
    """Grows along the last axis, is constant along the first."""
    found = torch.zeros(len(size), *size)
    found[0], found[-1] = 2 * strength, strength * torch.linspace(0, 6, size[-1])
    return found


def shown(*size, channels=1, moved=True, **more):
    a, b = (image(*size, channels=channels, index=i) for i in (0, 4))
    found = {
        "images": {"A": a, "B": b},
        "overlays": {"before matching": (a, b), "after matching": (a, a)},
        "fields": {"displacement": field(*size)} if moved else {},
        "text": "NCC rises from 0.2 to <0.5>.",
        "help": "Look at A & B.",
    }
    return Shown(**{**found, **more})


def metrics(n, names=(*LOSSES, "ncc", "ncc_before"), seldom=()):
    falling = np.exp(-np.arange(n) / 50)
    found = {"iteration": np.arange(1.0, n + 1)} | {name: (i + 1) * falling for i, name in enumerate(names)}
    return found | {name: np.where(np.arange(n) % 10 == 9, i + falling, np.nan) for i, name in enumerate(seldom)}


def tile(sheet, name):
    return next(t for t in sheet.tiles if t.name.replace("\n", " ").strip() == name)


def titles(sheet):
    return [axes.get_title(loc="left") for axes in sheet.figure.axes[1:]]


def read_png(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)


@pytest.fixture
def coarse(monkeypatch):
    """Pictures of few pixels, for what is not about them."""
    monkeypatch.setattr("coverfast.report.sheet.DPI", 20)


# ---- the page


@pytest.mark.parametrize(
    ("size", "channels", "moved"),
    [((48, 80), 1, True), ((48, 48), 3, False), ((24, 32, 40), 1, True), ((32, 24, 24), 3, False)],
    ids=["2d", "2d-rgb-no-field", "3d", "3d-rgb-no-field"],
)
def test_a_page_of_any_method(tmp_path, coarse, size, channels, moved):
    seen = shown(*size, channels=channels, moved=moved)
    page = write_report(tmp_path / "r", seen, metrics(60, seldom=["val_ncc"]), title="x", about={"run": "<r>"})
    assert sorted(p.name for p in page.parent.iterdir()) == ["curves.png", "index.html", "overview.png"]
    assert all(read_png(page.parent / name)[..., :3].std() > 0.05 for name in ("overview.png", "curves.png"))
    text = page.read_text()
    assert "<p>NCC rises from 0.2 to &lt;0.5&gt;.</p>" in text
    assert "<p>Look at A &amp; B.</p>" in text
    assert "&lt;r&gt;" in text
    assert "The local NCC is the figure to watch" in text
    assert meaning("ncc_before") in text
    assert [name in text for name in ("overview.png", "curves.png", "features.png")] == [True, True, False]
    assert on_host(seen).summary() == seen.text


def test_a_run_without_pictures_has_curves_and_figures(tmp_path, coarse):
    page = write_report(tmp_path, None, metrics(5, ["loss", "agreement"]), title="x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "index.html"]
    text = page.read_text()
    assert "agreement</code>" in text
    assert "<p></p>" not in text
    assert "NCC" not in text
    assert "end-point" not in text
    index = write_index(tmp_path, [Entry("a", "a", "", pictured=False), Entry("b", "b", "")], title="2").read_text()
    assert ["a/index.html" in index, "a/overview.png" in index, "b/overview.png" in index] == [True, False, True]
    write_report(tmp_path / "nothing", None, title="x")
    assert [p.name for p in (tmp_path / "nothing").iterdir()] == ["index.html"]


def test_same_input_same_page(tmp_path, coarse):
    for name in "ab":
        write_report(tmp_path / name, shown(32, 32), title="x")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"images": {"A": torch.rand(1, 32, 32), "B": torch.rand(1, 32, 16)}},
            "image 'B' must be on the grid of image 'A'",
        ),
        ({"overlays": {"o": (torch.rand(1, 32, 32), torch.rand(1, 16, 32))}}, "overlay 'o' must be on the grid of"),
        ({"overlays": {"o": (torch.rand(1, 32, 32),)}}, "overlay 'o' must be two images, got 1"),
        ({"overlays": {"o": torch.rand(2, 1, 32, 32)}}, "overlay 'o' must be two images"),
        ({"fields": {"f": torch.rand(3, 32, 32)}}, "field 'f' must have 2 components, one a spatial axis, got 3"),
        (
            {"fields": {"f": torch.rand(2, 16, 32)}},
            "field 'f' must be on the grid of image 'A', (32, 32), got (16, 32)",
        ),
        (
            {"images": {"A": torch.rand(32, 32)}},
            "image 'A' must be (C, *S) with 2 or 3 spatial axes, got shape (32, 32)",
        ),
        ({"images": {"A": torch.rand(0, 32, 32)}}, "image 'A' must be (C, *S)"),
        ({"images": {" ": torch.rand(1, 32, 32)}}, "must have a title, got ' '"),
        ({"images": {}, "overlays": {}, "fields": {}}, "at least one image, overlay or field, got none"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_drawn(tmp_path, changes, words):
    with refused(words):
        write_report(tmp_path / "report", shown(32, 32, **changes), metrics(5), title="x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seen", [[image(32, 32)], {"A": image(32, 32)}], ids=["list", "dict"])
def test_what_is_no_picture_is_refused(tmp_path, seen):
    with refused(f"must be a coverfast.methods.Shown or None, got {type(seen).__name__}"):
        write_report(tmp_path / "report", seen, title="x")
    assert not list(tmp_path.iterdir())


def test_pictures_come_to_the_host_from_any_type():
    a = image(32, 32)
    mixed = shown(32, 32, images={"A": a.bfloat16(), "B": a.double().requires_grad_(), "C": a > 0.5})
    found = on_host(mixed)
    assert isinstance(found, Gallery)
    assert {x.dtype for x in (*found.images.values(), *found.fields.values())} == {np.dtype("float32")}
    assert np.array_equal(found.images["B"], a.numpy())
    assert on_host(found) is found
    assert on_host(None) is None
    assert Gallery.of(shown(32, 32, text="")).summary() == "5 pictures"


# ---- the overview


def test_overlays_are_grey_where_they_agree_and_fields_in_their_colours():
    sheet = gallery_sheet(Gallery.of(shown(32, 48)), {})
    before, after = (tile(sheet, name).rgb for name in ("before matching", "after matching"))
    assert np.abs(np.diff(after, axis=-1)).max() < 1e-6
    assert np.abs(np.diff(before, axis=-1)).max() > 0.2
    a, b = image(32, 48)[0].numpy(), image(32, 48, index=4)[0].numpy()
    assert np.corrcoef(before[..., 0].ravel(), a.ravel())[0, 1] > 0.95  # the first in magenta
    assert np.allclose(before[..., 1], b)
    found = tile(sheet, "displacement")
    longest = float(np.quantile(np.hypot(*field(32, 48).numpy()), 0.995))
    assert np.allclose(found.rgb, dvf_to_rgb(field(32, 48).numpy(), longest))
    assert found.note == f"mean {np.hypot(*field(32, 48).numpy()).mean():.3g} px"


def test_fields_of_like_lengths_share_a_scale_and_small_ones_are_seen():
    fields = {"long": field(32, 32), "like": field(32, 32, strength=0.6), "small": field(32, 32, strength=0.05)}
    sheet = gallery_sheet(Gallery.of(shown(32, 32, fields={**fields, "none": torch.zeros(2, 32, 32)})), {})
    depth = {name: np.ptp(tile(sheet, name).rgb, axis=-1).max() for name in (*fields, "none")}
    assert depth["like"] < 0.8 * depth["long"]
    assert depth["small"] > 0.8 * depth["long"]
    assert depth["none"] < 0.01
    assert titles(sheet) == ["displacement", "displacement"]
    notes = [tile(sheet, name).note.split("wheel")[1] for name in (*fields, "none")]
    assert notes[0] == notes[1] != notes[2] == notes[3]
    assert gallery_sheet(Gallery.of(shown(32, 32, fields={"none": torch.zeros(2, 32, 32)})), {}).tiles


def test_a_grid_is_where_the_field_takes_it():
    moved = torch.zeros(2, 48, 64)
    moved[0], moved[1] = 3.0, torch.arange(64.0) / 8
    sheet = gallery_sheet(Gallery.of(shown(48, 64, fields={"f": moved})), {})
    still, drawn = (c.get_segments() for c in sheet.canvas.collections)
    here = tile(sheet, "the same as a grid")
    box = np.array([here.left, sheet.height - here.top - here.tall, here.wide, here.tall]) * sheet.figure.dpi
    assert all(np.allclose(lines.get_clip_box().bounds, box) for lines in sheet.canvas.collections)
    assert len(still) == len(drawn) == 12 + 16
    row, column = 1 + 4 * 5, 1 + 4 * 7  # every fourth pixel, as far from one edge as from the other
    assert np.allclose(still[5], np.column_stack(here.at(np.full(64, row), np.arange(64))))
    assert np.allclose(drawn[5], np.column_stack(here.at(np.full(64, row + 3), np.arange(64) * 9 / 8)))
    assert np.allclose(drawn[12 + 7], np.column_stack(here.at(np.arange(48) + 3, np.full(48, column * 9 / 8))))


def test_a_volume_is_cut_where_its_edges_are():
    volume = torch.zeros(1, 40, 32, 24)
    volume[:, 24:36, 4:14, 10:20] = torch.rand(12, 10, 10, generator=torch.Generator().manual_seed(1))
    gallery = Gallery.of(Shown({"A": volume}, fields={"f": field(40, 32, 24)}))
    assert np.allclose([plane.index for plane in gallery.planes], [29.5, 8.5, 14.5], atol=1)
    sheet = gallery_sheet(gallery, {})
    z, y, x = (plane.index for plane in gallery.planes)
    slices = [t for t in sheet.tiles if t.left == sheet.tiles[0].left]
    for t, plane in zip(slices, (volume[0, z], volume[0, :, y], volume[0, :, :, x]), strict=True):
        assert np.allclose(t.rgb[..., 1], plane.numpy())
        assert t.up
    assert {f"z = {z}", f"y = {y}", f"x = {x}"} <= {text.get_text() for text in sheet.canvas.texts}
    flat = Gallery.of(Shown({"A": torch.full((1, 1, 20, 30), 0.5)}))
    assert [plane.index for plane in flat.planes] == [0, 10, 15]
    assert gallery_sheet(flat, {}).tiles


def test_what_diverged_is_still_drawn(tmp_path, coarse):
    broken = torch.full((2, 32, 32), torch.nan)
    broken[:, :16], broken[0, 20] = 1e30, -torch.inf
    nothing = torch.full((1, 32, 32), torch.nan)
    seen = Shown({"A": nothing}, {"o": (nothing, nothing)}, {"f": broken, "g": broken * torch.nan})
    with np.errstate(all="raise"):
        write_report(
            tmp_path, seen, {k: v * np.nan for k, v in metrics(5).items()} | {"iteration": np.arange(5.0)}, title="x"
        )
    assert read_png(tmp_path / "overview.png").ndim == 3


LONG = "a title of many words that cannot stand on one line above a picture, WHATEVER ITS LETTERS ARE"


@pytest.mark.parametrize(
    ("size", "images", "fields", "named"),
    [
        ((48, 48), 3, 1, metrics(40)),
        ((32, 96), 9, 5, {}),
        ((24, 32, 40), 4, 2, metrics(200, ["loss", "epe_ratio"])),
        ((32, 24, 24), 1, 0, {}),
    ],
)
def test_texts_do_not_overlap(size, images, fields, named):
    pictures = {f"{i} {LONG[: 1 + 30 * i]}": image(*size, channels=2) for i in range(images)}
    forces = {f"{i} {LONG[::-1][: 1 + 40 * i]}": field(*size, strength=0.3**i) for i in range(fields)}
    overlays = {"Overlay_$x_y$_" + 60 * "W": (image(*size), image(*size))}
    assert_apart(gallery_sheet(Gallery.of(Shown(pictures, overlays, forces)), named).figure)


def test_texts_of_curves_do_not_overlap():
    losses = [f"loss_{'of_many_words_' * (i % 4)}{i}" for i in range(9)]
    found = metrics(300, [*LOSSES, *losses, "ncc", "$\\odd$_" + 70 * "W"], ["val_loss", "val_ncc", "val_ncc_before"])
    assert_apart(curves_sheet(found).figure)


def assert_apart(figure):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    texts = []
    for axes in figure.axes:
        texts += [*axes.texts, axes.title, axes._left_title, axes.xaxis.label]
        texts += [t.label1 for a in (axes.xaxis, axes.yaxis) for t in a._update_ticks() if axes.axison]
        texts += axes.get_legend().get_texts() if axes.get_legend() else []
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_text().strip()]
    for i, (text, box) in enumerate(boxes):
        assert box.x0 >= 0, text
        assert box.x1 <= figure.bbox.width, text
        assert 0 <= box.y0 < box.y1 <= figure.bbox.height, text
        assert not [(text, other) for other, around in boxes[:i] if box.overlaps(around)]


# ---- curves


def test_curves_of_gvsl():
    found = metrics(
        30, [*LOSSES, "ncc", "ncc_before", "displacement", "folded"], ["val_loss", "val_ncc", "val_loss_ncc"]
    )
    losses, ncc = curves_sheet(found).figure.axes[1:3]
    assert [t.get_text() for t in losses.get_legend().get_texts()] == ["$L$", "1 - NCC", "smoothness", "restoration"]
    assert [t.get_text() for t in ncc.get_legend().get_texts()] == ["learned from", "held out", "before matching"]
    assert len(curves_sheet(found).figure.axes) == 1 + 5  # and held-out loss, displacement, folded
    assert merit_panel(found).curves[0].key == "ncc"
    assert all(meaning(name) for name in (*found, "val_ncc_before") if name != "iteration")


def test_figures_that_nobody_knows_are_drawn():
    found = metrics(
        30, ["loss", "loss_odd", "loss_vec", "odd_0", "odd_1", "even", "lonely"], ["val_even", "val_loss_odd"]
    )
    sheet = curves_sheet(found)
    by_title = {axes.get_title(loc="left"): axes for axes in sheet.figure.axes[1:]}
    assert list(by_title) == ["loss (log scale)", "odd", "even", "lonely"]
    legends = [
        [t.get_text() for t in by_title[t].get_legend().get_texts()] for t in ("loss (log scale)", "odd", "even")
    ]
    assert legends == [["$L$", "$L_{vec}$, px", "loss_odd"], ["odd_0", "odd_1"], ["learned from", "held out"]]
    colours = [curve.colour for curve in loss_panel(found).curves]
    assert len(set(colours)) == len(colours)
    assert titles(curves_sheet(metrics(10, ["loss"], ["val_alone"]))) == ["loss (log scale)", "val_alone"]
    many = curves_sheet(metrics(30, ["loss", *(f"figure {chr(97 + i)}" for i in range(20))]))
    assert len(titles(many)) == 1 + OTHERS
    assert curves_sheet(metrics(30, ["loss"]) | {"empty": np.full(30, np.nan)}) is not None


def test_losses_may_be_negative():
    found = metrics(30, ["loss", "loss_a"])
    assert loss_panel(found).log
    found["loss"] = found["loss"] - 2
    assert (loss_panel(found).title, loss_panel(found).log) == ("loss", False)
    found = metrics(30, ["loss", "loss_a"]) | {"loss_a": np.zeros(30)}  # of a field that begins at rest
    assert loss_panel(found).log
    assert curves_sheet(found) is not None


def test_held_out_losses_stand_in_for_a_figure_of_merit():
    assert merit_panel(metrics(9, ["loss"])) is None
    assert merit_panel(metrics(10, ["loss"], ["val_loss"])).title == "loss: learned from, held out"
    with_ratio = metrics(10, ["loss", "epe_ratio"], ["val_loss"])
    assert merit_panel(with_ratio).curves[0].key == "epe_ratio"
    assert len(titles(curves_sheet(with_ratio))) == 2


# ---- the terminal


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"ncc": 0.25, "ncc_before": 0.125, "loss_ncc": 0.75, "val_ncc": 0.2},
            "loss 2.000  NCC 0.250  from 0.125  held out NCC 0.200",
        ),
        ({"agreement": 0.5, "loss_agreement": 0.5, "val_loss": 3.0}, "loss 2.000"),
    ],
)
def test_progress_of_other_methods(capsys, more, said):
    with training_progress(1, 2) as progress:
        progress.show([{"loss": 2.0, "seconds": 0.1, "data_wait": 0.0, "skipped": 0.0, **more, "iteration": 2}])
    assert re.fullmatch(rf"2/2  {re.escape(said)}  \S+ it/s  0 s left\n", capsys.readouterr().out)


def test_a_metrics_file_of_another_method_is_read(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"iteration": 1, "loss": -1.5, "agreement": 0.5, "val_agreement": null}\n')
    assert titles(curves_sheet(load_metrics(tmp_path / "m.jsonl"))) == ["loss", "agreement"]
