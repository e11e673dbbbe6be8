"""Tables in Markdown, with the columns of every benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from coverfast.bench.compare import Row
from coverfast.bench.figures import amount, facts_of, firsts, ratio, same_case, series_of, short, time_of, width_of


class Column(NamedTuple):
    """Heading, and the text of a row's cell; a column without any text is left out. words: to the left."""

    heading: str
    cell: Callable[[Row], Any]
    words: bool = False


def markdown(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """A table."""
    cells = [[cell(column.cell(row)) for row in rows] for column in columns]
    kept = [(column, texts) for column, texts in zip(columns, cells, strict=True) if any(texts)]
    lines = [[column.heading for column, _ in kept], ["---" if column.words else "---:" for column, _ in kept]]
    lines += [list(texts) for texts in zip(*(texts for _, texts in kept), strict=True)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(value: Any) -> str:
    text = short(value) if isinstance(value, float) else "" if value is None else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def words(key: str) -> Column:
    return Column(key, lambda row: _joined(row.get(key)), words=True)


def _joined(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else value


def _plain(key: str, words: bool = False) -> Column:
    """As it is: a text, a number, or numbers by name."""

    def text(row: Row) -> Any:
        value = row.get(key)
        return ", ".join(f"{k} {short(v)}" for k, v in value.items()) if isinstance(value, dict) else _joined(value)

    return Column(key, text, words)


def _value(heading: str, key: str, scale: float = 1.0) -> Column:
    return Column(heading, lambda row: None if row.get(key) is None else float(row[key]) * scale)


def _error(row: Row) -> str | None:
    errors = list((row.get("errors") or {}).values()) or [row.get("error")]
    return None if errors[0] is None else f"{max(errors):.1e}"


def _floor(row: Row) -> float | None:
    """In ms: of forward and backward, or of forward where there is no more."""
    return row.get("both_floor_ms") or row.get("forward_floor_ms")


def _of_floor(row: Row) -> float | None:
    found, floor = time_of(row), _floor(row)
    forward = row.get("both_floor_ms") is None
    return found[1] / floor if found and floor and (found[0] == "forward_ms") == forward else None


_NOTE = words("note")
_TIMES = (
    _value("forward ms", "forward_ms"),
    _value("fwd + bwd ms", "both_ms"),
    _value("spread", "spread_ms"),
    Column("runs", lambda row: row.get("runs") or None),
)


def _operator_columns(rows: Sequence[Row]) -> list[Column]:
    return [words("case"), words("variant"), words("dtype"), *_measured(rows)]


def _measured(rows: Sequence[Row]) -> list[Column]:
    ours = firsts(rows)
    floors = [Column("floor ms", _floor), Column("x floor", _of_floor)]
    relative = Column("x ours", lambda row: ratio(row, ours.get(same_case(row))))
    return [Column("error", _error), *_TIMES, *floors, relative, _value("extra MB", "extra_mb"), _NOTE]


def _vpa_columns(rows: Sequence[Row]) -> list[Column]:
    def of(row: Row) -> tuple[Any, ...]:
        return (*series_of(row), width_of(row), bool(facts_of(row).get("projections")), row.get("variant"))

    pyramids = {of(row): row for row in rows if facts_of(row)["form"] == "pyramid"}

    def more_work(row: Row) -> float | None:
        pyramid = pyramids.get(of(row))
        return None if pyramid is None else facts_of(row)["flops"] / facts_of(pyramid)["flops"]

    def fact(heading: str, key: str) -> Column:
        return Column(heading, lambda row: facts_of(row).get(key))

    def count(heading: str, key: str, unit: str = "") -> Column:
        return Column(heading, lambda row: amount(facts_of(row)[key], unit) if facts_of(row).get(key) else None)

    return [
        Column("axes, window", lambda row: "{}D, {}".format(*series_of(row)), words=True),
        fact("width", "width"),
        Column("form", lambda row: _form(row), words=True),
        words("variant"),
        count("FLOP", "flops"),
        count("counted", "counted"),
        Column("FLOP x pyramid", more_work),
        count("exponentials", "exponentials"),
        *_measured(rows)[:-1],
        Column("time x pyramid", lambda row: ratio(row, pyramids.get(of(row)))),
        _NOTE,
    ]


def _form(row: Row) -> str:
    facts = facts_of(row)
    form = f"pyramid of {facts['levels']}" if facts["form"] == "pyramid" else "direct"
    return form + (", projections" if facts.get("projections") else "")


def _step_columns(rows: Sequence[Row]) -> list[Column]:
    ours = firsts(rows)

    def more_memory(row: Row) -> float | None:
        first = ours.get(same_case(row), {})
        both = time_of(row) and time_of(first) and row.get("peak_mb") and first.get("peak_mb")
        return row["peak_mb"] / first["peak_mb"] if both else None

    def how(row: Row) -> str:
        return " ".join([row.get("precision", ""), row.get("layout", ""), "compiled" if row.get("compiled") else ""])

    return [
        words("preset"),
        words("variant"),
        Column("how", how, words=True),
        Column("error", _error),
        _value("ms a step", "step_ms"),
        _value("spread", "spread_ms"),
        _value("images/s", "images_per_s"),
        _value("peak MB", "peak_mb"),
        _value("MFU %", "mfu", 100),
        Column("x ours", lambda row: ratio(row, ours.get(same_case(row)))),
        Column("memory x ours", more_memory),
        _NOTE,
    ]


def _data_columns(rows: Sequence[Row]) -> list[Column]:
    def extremes(row: Row) -> str:
        return "" if row.get("warm_spread") is None else "{:.0f} to {:.0f}".format(*row["warm_spread"])

    rates = [_value("crops/s warm", "warm"), Column("range", extremes), _value("cold", "cold")]
    sizes = [_value("disk/pixels", "stored"), _value("MB read a crop", "read"), _value("over chunks", "over")]
    return [words("problem"), words("way"), *rates, *sizes]


def _static_columns(rows: Sequence[Row]) -> list[Column]:
    from coverfast.bench.static import merged

    return [
        Column("kernel", lambda row: " ".join([row["kernel"], *row["flags"]]), words=True),
        words("target"),
        Column("levels", lambda row: merged(row["levels"]), words=True),
        *(_plain(key) for key in ("rows", "taps", "registers", "spills", "shared", "body")),
        _value("a tap", "a_tap"),
        _value("edges", "executed"),
        words("loads"),
    ]


def _plain_columns(rows: Sequence[Row]) -> list[Column]:
    """Every key."""
    texts = {key: any(isinstance(row.get(key), str | dict) for row in rows) for row in rows for key in row}
    return [_plain(key, words) for key, words in texts.items()]


_OPERATORS = ("mov", "warp", "compose", "fuse", "norm", "losses", "ncc", "views", "head")
_COLUMNS = dict.fromkeys(_OPERATORS, _operator_columns)
_COLUMNS |= {"vpa": _vpa_columns, "step": _step_columns, "data": _data_columns, "static": _static_columns}


def columns_of(bench: str, rows: Sequence[Row]) -> list[Column]:
    """What is shown of rows of a benchmark."""
    return _COLUMNS.get(bench, _plain_columns)(rows)
