"""Results as `--save` writes them, made up for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CPU = {
    "command": "coverfast bench x --save x.json",
    "commit": "0123456789ab",
    "torch": "2.13.0+cpu",
    "python": "3.11.7",
    "triton": "3.7.1",
    "device": "CPU x86_64 AVX2",
    "threads": 2,
}
GPU = {k: v for k, v in CPU.items() if k != "threads"} | {"device": "NVIDIA H200", "cuda": "13.0", "processors": 132}

Rows = list[dict[str, Any]]


def save(path: Path, bench: str, rows: Sequence[dict[str, Any]], facts: dict[str, Any] = CPU, **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"bench": bench, "provenance": facts, **more, "rows": rows}))
    return path


def mov_row(
    case: str, variant: str, both_ms: float | None, extra_mb: float | None = 10.0, **more: Any
) -> dict[str, Any]:
    """A row of an operator; without a time it says that it did not fit."""
    return {
        "case": case,
        "op": "mov",
        "facts": {"shape": [1, 8, 64, 64], "layout": "contiguous", "window": [5, 5]},
        "dtype": "float32",
        "variant": variant,
        "error": 1.2e-7,
        "forward_ms": None if both_ms is None else both_ms / 3,
        "both_ms": both_ms,
        "spread_ms": None if both_ms is None else both_ms / 100,
        "extra_mb": None if both_ms is None else extra_mb,
        "forward_floor_ms": None,
        "both_floor_ms": None,
        "note": "does not fit in 20.0 GB" if both_ms is None else "",
        **more,
    }


def mov_rows(slower: float = 1.0) -> Rows:
    """Two levels of two presets, three variants; eager B does not fit at the finest level of one."""
    rows = []
    for p, preset in enumerate(("paper-2d", "paper-3d")):
        for level in (3, 4):
            t = slower * 10.0 * 4**p * 4 ** (level - 3)
            case = f"{preset} level {level}"
            last = None if (p, level) == (1, 4) else 8 * t
            rows.append(mov_row(case, "coverfast torch", t, t))
            rows.append(mov_row(case, "eager A", 2.4 * t, 5.5 * t))
            rows.append(mov_row(case, "eager B", last, 44 * t))
    return rows


def vpa_rows() -> Rows:
    """Three series; times with projections; the widest direct templates of the eager forms do not fit."""
    rows = []
    for ndim, window, levels in ((2, 9, 4), (2, 5, 5), (3, 5, 4)):
        for m in range(1, levels + 1):
            width = 1 + (window - 1) * (2**m - 1)
            for form in ("pyramid", "direct"):
                taps = window**ndim * (1.4 if form == "pyramid" else (width / window) ** ndim)
                for projections in (True, False):
                    flops = 1e7 * taps + (5e8 if projections else 0)
                    facts = {"ndim": ndim, "window": window, "levels": m, "width": width, "form": form}
                    facts |= {"projections": projections, "flops": flops, "counted": flops, "exponentials": 1e5 * taps}
                    for variant, time, memory in (
                        ("coverfast torch", 1.0, 0.02),
                        ("eager A", 2.5, 0.6),
                        ("eager B", 6.0, 5.0),
                    ):
                        fits = memory * taps < 2500 and projections
                        case = f"{ndim}D window {window} {form} {width}"
                        ms = time * (flops / 1e8) if fits else None
                        row = mov_row(case, variant, ms, 20 + memory * taps, op="vpa", facts=facts)
                        rows.append(row if fits or projections else row | {"note": "counted only"})
    return rows


def step_rows() -> Rows:
    """Two presets, ours and published code, with parts; B of one does not fit."""
    rows = []
    for preset, crop, t in (("small-2d", [128, 128], 490.0), ("small-3d", [64, 64, 64], 1930.0)):
        for variant, x in (
            ("coverfast", 1.0),
            ("coverfast eager float32", 0.95),
            ("published A", 1.4),
            ("published B", 2),
        ):
            fits = (preset, variant) != ("small-3d", "published B")
            parts = {
                "data": 0.01,
                "views": 0.05,
                "backbone": 0.4,
                "pyramid": 0.4 * x,
                "losses": 0.08,
                "optimiser": 0.02,
            }
            row = {"preset": preset, "variant": variant, "batch": 4, "crop": crop, "precision": "float32"}
            row |= {"layout": "channels_last", "compiled": False, "errors": {"small": 8e-15}, "spread_ms": 5.0}
            row |= {"step_ms": t * x, "images_per_s": 4e3 / (t * x), "peak_mb": 300 * x, "mfu": 0.2 / x, "note": ""}
            row |= {"parts_ms": {name: t * share for name, share in parts.items()}}
            none = dict.fromkeys(("step_ms", "spread_ms", "images_per_s", "peak_mb", "mfu", "parts_ms"))
            rows.append(row if fits else {**row, **none, "note": "does not fit in 20.0 GB"})
    return rows


def data_rows() -> Rows:
    ways = {"shard, crops": 3860.0, "npy, mapped": 4960.0, "PNG a sample": 520.0}
    return [
        {"problem": "2D", "way": way, "warm": rate, "warm_spread": [0.95 * rate, 1.05 * rate], "cold": 0.8 * rate,
         "stored": 1.0, "read": 0.26, "over": 1.0, "default": way == "shard, crops"}
        for way, rate in ways.items()
    ]  # fmt: skip


def static_rows() -> Rows:
    return [
        {"op": "mov", "kernel": kernel, "flags": [], "target": "sm_90", "levels": ["paper-3d level 4"],
         "dtype": "bfloat16", "rows": 4, "taps": 4, "tile": 8, "lanes": 4, "warps": 1, "registers": 96, "spills": 0,
         "shared": 0, "body": 820, "a_tap": a_tap, "executed": a_tap + 3, "loads": "7 x 128"}
        for kernel, a_tap in (("mov_forward", 20.75), ("mov_dq", 26.5), ("mov_dk", 30.2))
    ]  # fmt: skip
