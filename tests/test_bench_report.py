"""`coverfast bench report`: pages and pictures say what the saved results say, all of it, and nothing stale remains."""

from __future__ import annotations

import builtins
import json
import re
import sys

import pytest
from saved_results import CPU, GPU, data_rows, mov_row, mov_rows, save, static_rows, step_rows, vpa_rows
from strategies import refused
from typer.testing import CliRunner

from coverfast.bench.compare import read_results
from coverfast.bench.plots import digest, digest_of, draw
from coverfast.bench.report import BEGIN, END, out_of_date, write_report
from coverfast.cli.main import app

RATES = {"copy": 1.2e10, "matrix": {"float32": 3.6e11}, "multiply_add": 1e11, "exponential": 2e9}
ALL = {"mov": mov_rows, "vpa": vpa_rows, "step": step_rows, "data": data_rows}


@pytest.fixture
def clone(tmp_path):
    """A clone with a README and results of two devices and of a compiler."""
    (tmp_path / "README.md").write_text(f"# coverfast\n\n{BEGIN}\nold\n{END}\nwords after\n")
    results = tmp_path / "bench" / "results"
    for bench, rows in ALL.items():
        save(results / "cpu-x86-64-2-threads" / f"{bench}.json", bench, rows(), rates=RATES)
    save(results / "nvidia-h200" / "mov.json", "mov", mov_rows(0.01), GPU)
    save(results / "compiler" / "static.json", "static", static_rows(), {k: v for k, v in CPU.items() if k in _COUNTS})
    return tmp_path


_COUNTS = ("command", "commit", "torch", "python", "triton")


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures are not drawn: they take a second."""
    chunk = b"tEXtSource\0"
    made = lambda found: b"\x89PNG\r\n\x1a\n" + (39).to_bytes(4, "big") + chunk + digest(found).encode() + b"sums"  # noqa: E731
    monkeypatch.setattr("coverfast.bench.report.draw", made)


def run(*arguments):
    return CliRunner().invoke(app, ["bench", "report", *map(str, arguments)], catch_exceptions=False)


def page_of(clone):
    return (clone / "bench" / "RESULTS.md").read_text()


def section(page, device):
    return next(part for part in page.split("\n## ") if part.startswith(device))


def line(page, *cells):
    """The only line of a table with these first cells, as cells."""
    found = [text for text in page.splitlines() if text.startswith("| " + " | ".join(cells) + " |")]
    assert len(found) == 1, (cells, found)
    return [cell.strip() for cell in found[0].strip("|").split("|")]


# --- the page --------------------------------------------------------------------------------------------------------


def test_every_device_and_file_has_its_section(clone, undrawn):
    done = run(clone / "bench" / "results")
    assert done.exit_code == 0, done.output
    page = page_of(clone)
    assert re.findall(r"^## (.*)$", page, re.M) == ["CPU x86_64 AVX2, 2 threads", "NVIDIA H200", "No device"]
    cpu, gpu, counts = (section(page, name) for name in ("CPU", "NVIDIA", "No device"))
    assert "A CPU; nothing here says anything about a GPU." in cpu
    assert "A CPU" not in gpu
    assert "Counts, not timings" in counts
    assert re.findall(r"^### (.*)$", cpu, re.M) == ["mov", "vpa", "step", "data"]
    assert cpu.count("torch 2.13.0+cpu, python 3.11.7, triton 3.7.1") == 1
    assert cpu.count("`coverfast bench x --save x.json`, commit 0123456789ab: [mov.json]") == 1
    assert "copy 12.0 GB/s, matrix float32 360 GFLOP/s, multiply-add 100 GFLOP/s, exponential 2.00 G/s" in cpu


def test_numbers_are_those_of_the_results(clone, undrawn):
    write_report(clone / "bench" / "results")
    cpu = section(page_of(clone), "CPU")
    heads = ["case", "variant", "dtype", "error", "forward ms", "fwd + bwd ms", "spread", "x ours", "extra MB", "note"]
    assert line(cpu, *heads[:3]) == heads  # no floor was measured: no columns of it
    assert f"| {' | '.join(['---'] * 3 + ['---:'] * 6 + ['---'])} |\n| paper-2d level 3 | coverfast" in cpu
    what = ("paper-3d level 4", "eager A", "float32")
    assert line(cpu, *what) == [*what, "1.2e-07", "128", "384", "3.84", "2.40", "880", ""]
    what = ("paper-3d level 4", "eager B", "float32")
    assert line(cpu, *what) == [*what, "1.2e-07", "", "", "", "", "", "does not fit in 20.0 GB"]
    # At 121 pixels, with projections: 147 GFLOP of the direct template, 1.63 of the pyramid.
    direct = line(cpu, "2D, 9", "121", "direct, projections", "coverfast torch")
    assert direct[4:7] == ["147 G", "147 G", "89.9"]
    assert direct[-2:] == ["89.9", ""]
    assert line(cpu, "small-3d", "published A", "float32 channels_last")[-3:] == ["1.40", "1.40", ""]
    assert line(cpu, "2D", "PNG a sample")[2:5] == ["520", "494 to 546", "416"]
    assert line(section(page_of(clone), "No device"), "mov_dq", "sm_90", "3d 4")[-3:] == ["26.5", "29.5", "7 x 128"]


def test_floors_and_losses_are_shown(tmp_path, undrawn):
    """A baseline that wins is named; what is wrong is compared with nothing."""
    floors = {"forward_floor_ms": 0.5, "both_floor_ms": 2.0}
    rows = [
        mov_row("a", "coverfast torch", 10.0, **floors),
        mov_row("a", "eager A", 8.0, **floors),
        mov_row("a", "eager B", 4.0, **floors | {"note": "wrong: not timed"}),
        mov_row("a", "forward alone", 4.0, **floors) | {"both_ms": None},
        mov_row("b", "coverfast torch", None),
        mov_row("b", "eager A", 8.0),
        mov_row("c", "coverfast torch", 10.0),
        mov_row("c", "eager | A", 20.0),
        mov_row("d", "coverfast torch", 10.0),
        mov_row("d", "eager A", 9.95),  # within the spread of 0.1
    ]
    save(tmp_path / "results" / "device" / "mov.json", "mov", rows)
    write_report(tmp_path / "results")
    page = (tmp_path / "RESULTS.md").read_text()
    head = line(page, "case", "variant", "dtype")
    expected = {"coverfast torch": ("5.00", "1.00"), "eager A": ("4.00", "0.800"), "eager B": ("", "")}
    for variant, (of_floor, ours) in (expected | {"forward alone": ("", "")}).items():
        cells = dict(zip(head, line(page, "a", variant, "float32"), strict=True))
        assert (cells["floor ms"], cells["x floor"], cells["x ours"]) == ("2.00", of_floor, ours)
    assert dict(zip(head, line(page, "b", "eager A", "float32"), strict=True))["x ours"] == ""
    assert "| c | eager \\| A | float32 |" in page
    assert "faster than ours, beyond spreads: 1 of 3: a float32 (eager A 0.800)." in page


def test_any_other_benchmark_is_shown_as_it_is(tmp_path, undrawn):
    rows = [{"case": "a", "dtype": "float32", "digits": {"q": 6.51, "k": 7.0}, "new": [3, 4], "count": 3}]
    save(tmp_path / "results" / "device" / "agree.json", "agree", rows)
    save(tmp_path / "results" / "device" / "empty.json", "mov", [])
    tuned = [{"case": "a", "rows": i, "taps": 2, "both_ms": 50.0 - i, "forward_ms": 9.0, "note": ""} for i in range(30)]
    save(tmp_path / "results" / "device" / "tune.json", "tune", tuned)
    write_report(tmp_path / "results")
    page = (tmp_path / "RESULTS.md").read_text()
    assert "| a | float32 | q 6.51, k 7.00 | 3, 4 | 3 |" in page
    assert "Nothing was measured." in page
    assert "empty.png" not in page
    assert [re.split(r" *\| *", text)[2] for text in page.splitlines() if "| 9.00 |" in text] == [
        str(i) for i in range(29, 19, -1)
    ]


# --- the front page --------------------------------------------------------------------------------------------------


def test_the_readme_gets_its_lines_and_keeps_the_others(clone, undrawn):
    write_report(clone / "bench" / "results")
    text = (clone / "README.md").read_text()
    assert text.startswith(f"# coverfast\n\n{BEGIN}\n| measured |")
    assert text.endswith(f"|\n{END}\nwords after\n")
    assert "old" not in text
    for words in (
        "`mov`, paper-3d level 4, float32, forward + backward | ours 160 ms, 160 MB; eager A 384 ms, 880 MB; ",
        "121 pixels, 2D: windows of 9, or one template | pyramid 1.63 GFLOP, 16.3 ms, 22.3 MB; "
        "direct 147 GFLOP, 1.47 s, 313 MB: 89.9, 89.9 and 14.0 times",
        "29 pixels, 3D",  # at 61 the direct template did not fit
        "training step, small-3d | ours 1.93 s, 300 MB; published A 2.70 s, 420 MB",
        "random crops/s, 2D, cached files | shard 3860, PNG 520, npy 4960",
        "paper-3d, finest level (counted, not timed) | mov_forward 20.8, mov_dq 26.5, mov_dk 30.2",
        "[mov.json](bench/results/nvidia-h200/mov.json), NVIDIA H200 |",
    ):
        assert words in text, text
    assert "level 3" not in text
    for link in re.findall(r"\]\((.*?)\)", text):
        assert (clone / link).exists(), link


def test_a_readme_without_a_place_is_left_alone(clone, undrawn):
    (clone / "README.md").write_text("# no place\n")
    write_report(clone / "bench" / "results")
    assert (clone / "README.md").read_text() == "# no place\n"
    (clone / "README.md").unlink()
    write_report(clone / "bench" / "results")
    assert not (clone / "README.md").exists()


@pytest.mark.parametrize("text", [f"{BEGIN}\n", f"{END}\n", f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_broken_place_is_refused_and_nothing_is_written(clone, undrawn, text):
    (clone / "README.md").write_text(text)
    with refused("README.md", "once each"):
        run(clone / "bench" / "results")
    assert not (clone / "bench" / "RESULTS.md").exists()
    assert (clone / "README.md").read_text() == text


# --- what is out of date ---------------------------------------------------------------------------------------------


def test_check_sees_one_changed_number(clone, undrawn):
    results = clone / "bench" / "results"
    assert run(results, "--check").exit_code == 1
    assert not (clone / "bench" / "RESULTS.md").exists()
    write_report(results)
    before = {path: path.read_bytes() for path in clone.rglob("*") if path.is_file()}
    assert run(results, "--check").exit_code == 0
    assert write_report(results).written == []
    file = results / "nvidia-h200" / "mov.json"
    saved = json.loads(file.read_text())
    saved["rows"][5]["error"] = 1.3e-7  # in no picture
    file.write_text(json.dumps(saved))
    done = run(results, "--check")
    assert done.exit_code == 1
    assert "RESULTS.md is not what the results give" in done.output
    assert {path for path, data in before.items() if path.read_bytes() != data} == {file}
    assert len(write_report(results).written) == 2  # the page, and the picture of that file alone
    assert run(results, "--check").exit_code == 0


def test_check_sees_edited_pages_and_missing_pictures(clone, undrawn):
    results = clone / "bench" / "results"
    write_report(results)
    page = clone / "bench" / "RESULTS.md"
    page.write_text(page.read_text().replace("384", "284"))
    assert out_of_date(results) == [page]
    write_report(results)
    readme = clone / "README.md"
    readme.write_text(readme.read_text().replace("words after", "other words after"))
    assert out_of_date(results) == []
    readme.write_text(readme.read_text().replace("384 ms", "38 ms"))
    picture = results / "nvidia-h200" / "mov.png"
    picture.unlink()
    assert out_of_date(results) == [readme, picture]
    picture.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0")
    assert out_of_date(results) == [readme, picture]


def test_a_folder_without_results_is_refused(tmp_path):
    save(tmp_path / "mov.json", "mov", mov_rows())  # of no device
    with refused("DEVICE/NAME.json"):
        run(tmp_path)
    save(tmp_path / "device" / "mov.json", "mov", mov_rows())
    (tmp_path / "device" / "old.json").write_text('{"provenance": {}, "rows": []}')
    with refused("old.json", "bench, provenance and rows"):
        run(tmp_path)


# --- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_are_there_small_and_the_same_again(clone):
    from matplotlib.image import imread

    results = clone / "bench" / "results"
    assert run(results).exit_code == 0
    links = re.findall(r"!\[.*?\]\((.*?)\)", page_of(clone))
    assert sorted(links) == sorted(
        f"results/{name}.png"
        for name in ("nvidia-h200/mov", *(f"cpu-x86-64-2-threads/{bench}" for bench in ("mov", "vpa", "step")))
    )
    for link in links:
        path = clone / "bench" / link
        assert path.stat().st_size < 120_000, link
        shown = imread(path)
        assert 800 < shown.shape[1] < 1600
        assert 300 < shown.shape[0] < 1400
        assert shown[..., :3].std() > 0.05
    assert out_of_date(results) == []
    path = results / "cpu-x86-64-2-threads" / "step.png"
    found = read_results(path.with_suffix(".json"))
    assert draw(found) == path.read_bytes()
    assert digest_of(path) == digest(found) != digest(read_results(results / "nvidia-h200" / "mov.json"))


def test_without_matplotlib_the_pages_still_come(clone, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] in ("matplotlib", "PIL"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    results = clone / "bench" / "results"
    done = run(results)
    assert done.exit_code == 0
    assert "no pictures: drawing needs the extra" in done.output
    assert "paper-3d level 4" in page_of(clone)
    assert not list(results.rglob("*.png"))
    assert "png is not what" in run(results, "--check").output
