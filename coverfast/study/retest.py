"""Whether a result comes again: two pretrainings and fine-tunings from different seeds (COVER Sec. D.1, Table 4)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coverfast.study.data import begun, gather
from coverfast.study.figures import retest_picture
from coverfast.study.folder import Study
from coverfast.study.progress import Watch, Work
from coverfast.study.runs import Runs, write_pictures, write_result
from coverfast.study.settings import RetestSettings
from coverfast.study.statistics import correlation, crossed_interval
from coverfast.study.tables import interval, markdown


def works(study: Study) -> list[Work]:
    """What is to be trained."""
    s = study.settings
    assert isinstance(s, RetestSettings)
    stages = (("pretraining", s.pretrain_iterations), ("fine-tuned", s.iterations))
    return [Work(f"{stage}-seed-{seed}", stage, length) for seed in s.two_seeds for stage, length in stages]


def retest(study: Study, watch: Watch) -> dict[str, Any]:
    """Train and evaluate what is not done yet, and write retest.json, retest.md and retest.png; return the former.

    Both runs have the same labelled cases and the same test cases; weights, order and views differ.

    Raises:
        InputError: see `Runs`.
    """
    with begun(study):
        return _retest(study, Runs(study, gather(study, pretrains=True, tell=watch.note), watch))


def _retest(study: Study, runs: Runs) -> dict[str, Any]:
    s = study.settings
    assert isinstance(s, RetestSettings)

    def flags(seed: int) -> dict[str, Any]:
        return {"seed": seed, "iterations": s.iterations}

    runs.rehearse([flags(s.seed) | runs.architecture("")], pretrains=True)
    both = []
    for seed in s.two_seeds:
        backbone = runs.pretrain(f"pretraining-seed-{seed}", "", seed)
        both.append(runs.finetune(f"fine-tuned-seed-{seed}", flags(seed) | {"init": str(backbone)}))
    a, b = both
    found = correlation(a.dsc, b.dsc)
    means = [crossed_interval(scores.dsc[None], scores.groups) for scores in both]
    result = {
        **study.about(),
        "pearson": found.r,
        "p": found.p,
        "test_cases": a.cases,
        "runs": [
            {"seed": seed, "dsc": mean.plain(), "scores": scores.dsc.tolist()}
            for seed, mean, scores in zip(s.two_seeds, means, both, strict=True)
        ],
    }
    rows = [[str(seed), interval(mean)] for seed, mean in zip(s.two_seeds, means, strict=True)]
    write_result(study.folder / "retest", result, f"{sentence(result)}\n\n{markdown(['seed', 'DSC %'], rows)}")
    about = f"{s.made or Path(s.data[0]).name}, {s.preset}, pretrained and fine-tuned twice"
    names = tuple(f"seed {seed}" for seed in s.two_seeds)
    write_pictures(
        study.folder,
        lambda: {"retest.png": retest_picture(a.dsc, b.dsc, (names[0], names[1]), found, about)},
        runs.watch.note,
    )
    return result


def sentence(result: dict[str, Any]) -> str:
    """What a retest says."""
    count = len(result["test_cases"])
    if result["pearson"] is None:
        return f"No correlation over {count} test cases: one of the runs scores all of them the same."
    return f"Pearson r = {result['pearson']:.3f}, p = {result['p']:.2g} over {count} test cases."
