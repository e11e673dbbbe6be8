"""Whether pretraining helps: scratch against pretrained, fine-tuned and linear, by the number of labelled cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from coverfast.study.data import begun, gather
from coverfast.study.figures import Arm, Example, Gain, convergence_picture, example_picture, transfer_picture
from coverfast.study.folder import Study
from coverfast.study.progress import Watch, Work
from coverfast.study.runs import Runs, Scores, write_pictures, write_result
from coverfast.study.settings import TransferSettings
from coverfast.study.statistics import METHOD, apart, crossed_interval
from coverfast.study.tables import markdown, transfer_rows

MODES = ("fine-tuned", "linear")


class Trial(NamedTuple):
    """One training of a network with labels."""

    init: str
    mode: str
    cases: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.init}-{self.mode}-{self.cases}-cases-seed-{self.seed}"

    def flags(self, study: Study, init: Mapping[str, Any]) -> dict[str, Any]:
        """Its settings; init: those that say where the weights come from."""
        s = study.settings
        assert isinstance(s, TransferSettings)
        probes = self.mode == "linear"
        return {
            **init,
            "cases": self.cases,
            "case_seed": self.seed,
            "seed": self.seed,
            "train_modules": 0 if probes else -1,
            "iterations": (s.probe_iterations or 2 * s.iterations) if probes else s.iterations,
        }


def trials(s: TransferSettings) -> list[Trial]:
    """All of them, in the order they are made in: a whole seed before the next one."""
    seeds = range(s.seed, s.seed + s.seeds)
    return [Trial(init, mode, cases, k) for k, cases, mode, init in product(seeds, s.cases, MODES, s.inits)]


def pretrainings(s: TransferSettings) -> dict[str, str]:
    """Names of the pretrainings' folders by arm; none for a backbone that is there already."""
    if s.checkpoint:
        return {}
    return {init: "pretraining" if init == "pretrained" else f"pretraining-{init}" for init in s.pretrained}


def works(study: Study) -> list[Work]:
    """What is to be trained."""
    s = study.settings
    assert isinstance(s, TransferSettings)
    # Methods differ in how long an iteration takes: each is a kind of its own.
    first = [Work(name, name, s.pretrain_iterations) for name in pretrainings(s).values()]
    return first + [Work(t.name, t.mode, t.flags(study, {})["iterations"]) for t in trials(s)]


def transfer(study: Study, watch: Watch) -> dict[str, Any]:
    """Train and evaluate what is not done yet, and write transfer.json, transfer.md and pictures; return the former.

    Raises:
        InputError: see `Runs`.
    """
    s = study.settings
    assert isinstance(s, TransferSettings)
    with begun(study):
        return _transfer(study, s, Runs(study, gather(study, pretrains=not s.checkpoint, tell=watch.note), watch))


def _transfer(study: Study, s: TransferSettings, runs: Runs) -> dict[str, Any]:
    architecture = runs.architecture(s.checkpoint)
    scratch = [t.flags(study, architecture) for t in trials(s) if t.init == "scratch"]
    runs.rehearse(scratch, pretrains=not s.checkpoint)
    begins = {"scratch": architecture, "pretrained": {"init": s.checkpoint}}
    for init, name in pretrainings(s).items():
        begins[init] = {"init": str(runs.pretrain(name, s.pretrained[init], s.seed))}
    scores = {t: runs.finetune(t.name, t.flags(study, begins[t.init])) for t in trials(s)}
    arms, gains = compare(scores, s)
    curves = convergence({t: runs.validations(t.name) for t in trials(s)}, s)
    result = _result(study, scores, arms, gains, curves)
    headings, rows = transfer_rows(result)
    write_result(study.folder / "transfer", result, f"{markdown(headings, rows)}\n{METHOD}\n")
    trained = f"{s.made or Path(s.data[0]).name}, {s.preset}, {s.seeds} seed(s)"
    about, middle = f"{trained}, {len(runs.data.test)} test cases", f"{_middle(s)} labelled cases"

    def pictures() -> dict[str, bytes]:
        found = {
            "transfer.png": transfer_picture(arms, gains, f"{about}; bars: 95 % bootstrap intervals"),
            "example.png": example_picture(
                _example(runs, scores, s), runs.data.classes, f"{about}; {middle}, seed {s.seed}"
            ),
        }
        tuned = {init: curves[init, "fine-tuned", _middle(s)] for init in s.inits}
        if all(tuned.values()):
            found["convergence.png"] = convergence_picture(tuned, f"{trained}; fine-tuned, {middle}")
        return found

    write_pictures(study.folder, pictures, runs.watch.note)
    return result


def compare(scores: Mapping[Trial, Scores], s: TransferSettings) -> tuple[list[Arm], list[Gain]]:
    """Means with their intervals for each way to train, and each arm's difference to those before it."""
    groups = next(iter(scores.values())).groups
    seeds = range(s.seed, s.seed + s.seeds)
    arms, gains = [], []
    for mode, cases in product(MODES, s.cases):
        found = {i: np.stack([scores[Trial(i, mode, cases, k)].dsc for k in seeds]) for i in s.inits}
        intervals = {init: crossed_interval(values, groups) for init, values in found.items()}
        arms += [Arm(init, mode, cases, interval) for init, interval in intervals.items()]
        for minus, init in combinations(s.inits, 2):
            gain = crossed_interval(found[init] - found[minus], groups)
            gains.append(Gain(init, minus, mode, cases, gain, apart(intervals[minus], intervals[init])))
    return arms, gains


def convergence(
    found: Mapping[Trial, Mapping[int, float]], s: TransferSettings
) -> dict[tuple[str, str, int], dict[int, list[float]]]:
    """Validation DSC of all seeds by iteration, for each way to train; iterations that a seed lacks are left out."""
    curves = {}
    for init, mode, cases in product(s.inits, MODES, s.cases):
        mine = [found[Trial(init, mode, cases, k)] for k in range(s.seed, s.seed + s.seeds)]
        curves[init, mode, cases] = {i: [m[i] for m in mine] for i in sorted(set.intersection(*map(set, mine)))}
    return curves


def _result(
    study: Study,
    scores: Mapping[Trial, Scores],
    arms: Sequence[Arm],
    gains: Sequence[Gain],
    curves: Mapping[tuple[str, str, int], Mapping[int, Sequence[float]]],
) -> dict[str, Any]:
    s = study.settings
    assert isinstance(s, TransferSettings)
    seeds = range(s.seed, s.seed + s.seeds)

    def arm(a: Arm) -> dict[str, Any]:
        mine = [scores[Trial(a.init, a.mode, a.cases, k)] for k in seeds]
        return {
            **{"init": a.init, "mode": a.mode, "cases": a.cases, "dsc": a.dsc.plain()},
            "classes": {name: float(np.mean([m.classes[name] for m in mine])) for name in mine[0].classes},
            "by_seed": {str(k): float(m.dsc.mean()) for k, m in zip(seeds, mine, strict=True)},
            "scores": [m.dsc.tolist() for m in mine],
            "validation": {str(i): float(np.mean(dsc)) for i, dsc in curves[a.init, a.mode, a.cases].items()},
        }

    return {
        **study.about(),
        "interval": METHOD,
        "test_cases": next(iter(scores.values())).cases,
        "arms": [arm(a) for a in arms],
        "differences": [
            {
                **{"init": g.init, "minus": g.minus, "mode": g.mode, "cases": g.cases},
                **{"dsc": g.dsc.plain(), "intervals_apart": g.apart},
            }
            for g in gains
        ],
    }


def _middle(s: TransferSettings) -> int:
    return sorted(s.cases)[len(s.cases) // 2]


def _example(runs: Runs, scores: Mapping[Trial, Scores], s: TransferSettings) -> Example:
    """The test case that is the median of what all networks of the first seed score, and what they say of it."""
    networks = {(i, m): Trial(i, m, _middle(s), s.seed) for i, m in product(s.inits, MODES)}
    mean = np.mean([scores[t].dsc for t in networks.values()], axis=0)
    case = int(np.argsort(mean, kind="stable")[len(mean) // 2])
    seen = {arm: runs.predict(t.name, case) for arm, t in networks.items()}
    some = next(iter(seen.values()))
    predictions = {arm: (seen[arm].labels, float(scores[t].dsc[case])) for arm, t in networks.items()}
    return Example(some.name, some.image, some.truth, predictions)
