"""The pages that people read: links lead somewhere, and what is made from results is made from those that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(p.relative_to(ROOT).as_posix() for folder in ("", "docs", "bench") for p in (ROOT / folder).glob("*.md"))


def places(text: str) -> list[str]:
    """Where the links of a page lead, but for other sites."""
    found = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    return [place for place in found if "://" not in place]


def test_links_are_found():
    text = "[a](b.md), ![c](d/e.png) and [f](https://example.org) [g](h.md#i) [j](#k)"
    assert places(text) == ["b.md", "d/e.png", "h.md"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    file = ROOT / page
    missing = [place for place in places(file.read_text()) if not (file.parent / place).exists()]
    assert missing == []


def test_pages_are_what_the_saved_results_give():
    """After new results: coverfast bench report."""
    pytest.importorskip("matplotlib")
    from coverfast.bench.report import out_of_date

    assert out_of_date(ROOT / "bench/results") == []
