"""Pictures of saved results, and how their numbers are written."""

from __future__ import annotations

import pytest
from saved_results import mov_rows, save, step_rows, vpa_rows

from coverfast.bench.compare import read_results
from coverfast.bench.figures import amount, short
from coverfast.bench.plots import DRAWN, draw

ALL = {"mov": mov_rows, "vpa": vpa_rows, "step": step_rows}


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0.0, "0"), (1.0, "1.00"), (0.01234, "0.0123"), (9.996, "10.0"), (1234.4, "1234"), (3e-5, "3.00e-05"),
     (float("inf"), "inf"), (2e7, "2.00e+07")],
)  # fmt: skip
def test_three_digits(value, text):
    assert short(value) == text


def test_amounts_have_prefixes():
    assert [amount(v, "B") for v in (0, 12, 1.5e3, 3.6e11, 2e21)] == [
        "0 B",
        "12.0 B",
        "1.50 kB",
        "360 GB",
        "2.00e+06 PB",
    ]


@pytest.mark.parametrize("bench", ["mov", "vpa", "step"])
def test_what_has_no_figures_is_drawn_all_the_same(tmp_path, bench):
    rows = []
    for row in ALL[bench]():
        none = {key: None for key in row if key.endswith(("_ms", "_mb")) or key == "mfu"}
        rows.append({**row, **none, "note": "does not run: ValueError: $x_ <b>"})
    found = read_results(save(tmp_path / "x.json", bench, rows))
    assert len(draw(found)) > 5000


def test_memory_that_does_not_grow_is_drawn(tmp_path):
    for bench, rows in (("mov", mov_rows()), ("vpa", vpa_rows())):
        rows = [{**row, "extra_mb": -0.01} for row in rows]
        assert len(draw(read_results(save(tmp_path / "x.json", bench, rows)))) > 5000


def test_what_did_not_fit_is_marked(tmp_path):
    """In the column of N = 9: B at 25 pixels and more, A at 121."""
    figure = DRAWN["vpa"](read_results(save(tmp_path / "vpa.json", "vpa", vpa_rows())))
    panel = figure.axes[4]
    assert figure.axes[1].get_title(loc="left") == "2D, window 9 a level"
    crosses = [float(mark.get_xdata()[0]) for mark in panel.lines if mark.get_marker() == "x"]
    assert sorted(crosses) == [25, 57, 121, 121]
    assert {text.get_text() for text in panel.texts} == {"does not fit"}
    direct = next(curve for curve in panel.lines if curve.get_label().startswith("_child3"))
    assert list(direct.get_xdata()) == [9, 25, 57, 121]
    bars = DRAWN["mov"](read_results(save(tmp_path / "mov.json", "mov", mov_rows())))
    assert [text.get_text() for text in bars.axes[0].texts].count("does not fit") == 1
    assert "384 ms" in [text.get_text() for text in bars.axes[0].texts]
