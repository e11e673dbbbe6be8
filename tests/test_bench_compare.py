"""`coverfast bench compare`: what got worse is found, and neither a slower machine nor noise is taken for it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from saved_results import CPU, GPU, data_rows, mov_row, mov_rows, save, static_rows, step_rows, vpa_rows
from strategies import refused
from typer.testing import CliRunner

from coverfast.bench.compare import against_base, compare, drift, ratios, read_results, regressions
from coverfast.cli.main import app

ALL = {"mov": mov_rows, "vpa": vpa_rows, "step": step_rows, "data": data_rows, "static": static_rows}


def changed(rows, wanted, **factors):
    """Rows whose figures are multiplied where the variant (or way, or kernel) begins with `wanted`."""
    out = []
    for row in rows:
        name = str(row.get("variant") or row.get("way") or row.get("kernel"))
        new = {k: row[k] * x for k, x in factors.items() if row.get(k) is not None} if name.startswith(wanted) else {}
        out.append({**row, **new})
    return out


def run(*arguments):
    return CliRunner().invoke(app, ["bench", "compare", *map(str, arguments)], catch_exceptions=False)


def flat(done):
    return " ".join(done.output.split())


# --- judging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bench", ALL)
def test_the_same_is_no_regression(bench):
    found = ratios(ALL[bench](), ALL[bench]())
    assert len(found) >= 3
    assert {r.worse for r in found} == {1.0}
    assert regressions(found, 1.0) == []


@given(st.floats(1.2, 20), st.sampled_from(["forward_ms", "both_ms", "extra_mb"]), st.integers(0, 3))
def test_one_planted_slowdown_is_found_and_nothing_else(factor, key, which):
    after = mov_rows()
    row = [row for row in after if row["variant"] == "coverfast torch"][which]
    row[key] *= factor
    (found,) = regressions(ratios(mov_rows(), after), 1.1)
    assert found.worse == pytest.approx(factor)
    assert row["case"] in found.row
    assert found.figure == {"forward_ms": "forward ms", "both_ms": "fwd + bwd ms", "extra_mb": "extra MB"}[key]
    # Seen from the other side it is a gain.
    back = ratios(after, mov_rows())
    assert regressions(back, 1.1) == []
    assert min(r.worse for r in back) == pytest.approx(1 / factor)


@given(st.floats(0.3, 3.0))
def test_a_machine_that_drifts_is_no_regression(speed):
    """All times are longer alike; memory is not divided."""
    times = {"forward_ms": speed, "both_ms": speed, "spread_ms": speed}
    after = changed(mov_rows(), "", **times)
    found = drift(mov_rows(), after)
    assert found == pytest.approx(speed)
    assert all(r.worse == pytest.approx(1) for r in ratios(mov_rows(), after, found))
    after = changed(after, "coverfast", both_ms=2.0, extra_mb=1.5)
    worse = regressions(ratios(mov_rows(), after, found), 1.1)
    assert {r.figure: r.worse for r in worse} == pytest.approx({"fwd + bwd ms": 2.0, "extra MB": 1.5})
    assert len(worse) == 8


def test_without_baselines_there_is_no_drift():
    ours = [row for row in mov_rows() if row["variant"].startswith("coverfast")]
    assert drift(ours, changed(ours, "", both_ms=2.0)) is None


def test_rates_are_worse_when_they_fall():
    after = changed(data_rows(), "shard", warm=0.5)
    found = regressions(ratios(data_rows(), after), 1.1)
    assert [(r.figure, r.worse) for r in found] == [("crops/s warm", pytest.approx(2))]
    assert regressions(ratios(data_rows(), changed(data_rows(), "shard", warm=2.0)), 1.1) == []
    # A machine at half its speed: cold reads too.
    after = changed(data_rows(), "", warm=0.5, cold=0.5)
    slower = drift(data_rows(), after)
    assert slower == pytest.approx(2)
    assert {r.worse for r in ratios(data_rows(), after, slower)} == {1.0}
    found = regressions(ratios(step_rows(), changed(step_rows(), "coverfast", images_per_s=0.5)), 1.1)
    assert {r.figure for r in found} == {"images/s"}


def test_a_baselines_slowdown_is_not_ours():
    found = ratios(mov_rows(), changed(mov_rows(), "eager B", extra_mb=9.0))
    assert found[0].worse == pytest.approx(9)
    assert regressions(found, 1.1) == []


@pytest.mark.parametrize(("spread", "count"), [(0.0, 1), (2.9, 1), (3.1, 0)])
def test_noise_is_no_regression(spread, count):
    """10 and 13 ms: a difference counts when it is larger than the larger spread."""
    before = [mov_row("a", "coverfast torch", 10.0, spread_ms=0.1, forward_ms=None)]
    after = [mov_row("a", "coverfast torch", 13.0, spread_ms=spread, forward_ms=None)]
    for one, two in ((before, after), ([{**before[0], "spread_ms": spread}], [{**after[0], "spread_ms": 0.1}])):
        assert len(regressions(ratios(one, two), 1.1)) == count
    assert len(regressions(ratios(before, after), 1.4)) == 0


def test_a_page_more_is_no_regression():
    small, more, larger = ([mov_row("a", "coverfast torch", 10.0, mb)] for mb in (0.5, 1.4, 1.6))
    assert regressions(ratios(small, more), 1.1) == []
    assert [(r.figure, r.worse) for r in regressions(ratios(small, larger), 1.1)] == [("extra MB", 1.6)]
    none = [mov_row("a", "coverfast torch", 10.0, -0.01)]  # a process may have room to spare
    assert regressions(ratios(none, small), 1.1) == []
    assert regressions(ratios(none, larger), 1.1)[0].worse == 1.6


@pytest.mark.parametrize("note", ["wrong: not timed", "does not fit in 20.0 GB"])
def test_what_became_wrong_or_does_not_run_is_a_regression(note):
    after = mov_rows()
    gone = dict.fromkeys(("forward_ms", "both_ms", "spread_ms", "extra_mb"))
    after[3] |= {**gone, "note": note}
    assert after[3]["variant"] == "coverfast torch"
    (found,) = regressions(ratios(mov_rows(), after), 1e9)
    assert note in str(found)
    assert after[3]["case"] in str(found)
    assert regressions(ratios(after, mov_rows()), 1.1) == []
    assert any("now" in r.note for r in ratios(after, mov_rows()))


def test_zero_spills_may_not_become_many():
    after = [{**row, "spills": 8} for row in static_rows()]
    assert [r.figure for r in regressions(ratios(static_rows(), after), 1.1)] == ["spilled bytes"] * 3
    assert regressions(ratios(after, static_rows()), 1.1) == []


def test_columns_may_come_and_go():
    """A file of another version has facts and figures of its own; what both know tells rows apart."""
    newer = [{**row, "facts": row["facts"] | {"seed": 1}, "runs": 5, "joules": 3.0} for row in mov_rows(2.0)]
    worse = regressions(ratios(mov_rows(), newer), 1.1)
    assert len(worse) == 12
    assert all(r.worse == pytest.approx(2) for r in worse)


def test_a_row_of_another_layout_is_another_row():
    other = [{**row, "facts": row["facts"] | {"layout": "channels_last"}} for row in mov_rows(3.0)]
    assert ratios(mov_rows(), other) == []
    assert len(ratios(mov_rows(), other + mov_rows())) == len(ratios(mov_rows(), mov_rows()))


def test_another_revision_in_the_same_run():
    """What `--base REV` compares: ours with the variants that are named after it, whatever else is there."""
    rows = mov_rows(2.0) + [{**row, "variant": f"{row['variant']} @ 1a2b3c"} for row in mov_rows()]
    rows = [row for row in rows if row["variant"].startswith("coverfast")]
    found = against_base(rows)
    worse = regressions(found, 1.1)
    assert len(found) == len(worse) == 12
    assert all(r.worse == pytest.approx(2) for r in worse)
    # In two files of such runs the other revision is a baseline.
    assert drift(rows, changed(rows, "", both_ms=1.5, forward_ms=1.5)) == pytest.approx(1.5)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_regression_is_an_exit_code_and_a_sentence(tmp_path):
    a = save(tmp_path / "a.json", "mov", mov_rows())
    assert run(a, a).exit_code == 0
    b = save(tmp_path / "b.json", "mov", changed(mov_rows(), "coverfast", both_ms=2.0))
    done = run(a, b)
    assert done.exit_code == 1
    text = flat(done)
    assert "4 figures of ours are worse by more than 1.1; the worst is paper-2d level 3" in text.replace("mov, ", "")
    assert "10 before, 20 after, 2.00 times as bad" in text
    assert "become 1.000 times as long" in text
    assert run(a, b, "--threshold", "2.5").exit_code == 0
    assert run(b, a).exit_code == 0


def test_rows_of_one_file_alone_are_named(tmp_path):
    a, b = save(tmp_path / "a.json", "mov", mov_rows()[:-1]), save(tmp_path / "b.json", "mov", mov_rows()[1:])
    done = run(a, b)
    assert done.exit_code == 1
    assert "1 rows of ours are no longer there, the first: mov, paper-2d level 3, coverfast torch" in flat(done)
    assert run(b, b).exit_code == 0
    assert "1 rows only in a.json: mov, paper-2d level 3, coverfast torch, float32" in flat(done)
    assert "1 rows only in b.json: mov, paper-3d level 4, eager B, float32" in flat(done)


def test_other_devices_are_compared_only_against_baselines(tmp_path):
    a, b = save(tmp_path / "a.json", "mov", mov_rows()), save(tmp_path / "b.json", "mov", mov_rows(0.01), GPU)
    with refused("b.json", "nvidia-h200", "cpu-x86-64-2-threads", "--anyway"):
        run(a, b)
    done = run(a, b, "--anyway")
    assert done.exit_code == 0
    assert "become 0.010 times as long" in flat(done)
    ours = save(
        tmp_path / "ours.json", "mov", [row for row in mov_rows(100.0) if row["variant"] == "coverfast torch"], GPU
    )
    found = compare(read_results(a), read_results(ours), anyway=True)
    assert {r.figure for r in found.ratios} == {"extra MB"}
    four = {**CPU, "threads": 4}
    with refused("4-threads"):
        run(a, save(tmp_path / "four.json", "mov", mov_rows(), four))


def test_what_cannot_be_compared_is_refused(tmp_path):
    a = save(tmp_path / "a.json", "mov", mov_rows())
    for arguments in ([], ["--anyway"]):
        with refused("step.json", "mov", "step"):
            run(a, save(tmp_path / "step.json", "step", step_rows()), *arguments)
    with refused("rows in common"):
        run(a, save(tmp_path / "other.json", "mov", [{**row, "case": "another"} for row in mov_rows()]))
    with refused("missing.json", "No such file"):
        run(a, tmp_path / "missing.json")
    for text in (
        "[1]",
        "no",
        json.dumps({"provenance": CPU, "rows": []}),
        '{"bench": 1, "provenance": {}, "rows": [3]}',
    ):
        (tmp_path / "bad.json").write_text(text)
        with refused("bad.json", "bench, provenance and rows"):
            run(a, tmp_path / "bad.json")
    assert run(a, a, "--threshold", "0.9").exit_code == 2
