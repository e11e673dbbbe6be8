"""The runs of a study: each is done once, goes on where it was stopped, and leaves a result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coverfast.backbone_names import kind_of
from coverfast.backbones.base import title
from coverfast.backbones.choosing import spelled
from coverfast.checks import InputError, require
from coverfast.disk import write_atomically
from coverfast.report.colours import grey
from coverfast.report.sheet import need_matplotlib
from coverfast.study.data import Data
from coverfast.study.folder import Study
from coverfast.study.progress import Watch
from coverfast.training.assembly import choose_device
from coverfast.training.runs import Run
from coverfast.training.settings import mirrored, resolve

#: Of runs by the dozen the newest checkpoint is enough.
_FRUGAL = {"keep_checkpoints": 1, "tensorboard": False}
#: Learning rates of runs that are short, whatever the preset.
_LR = {"finetune": 1e-3, "probe": 0.1}
#: Of a run at least, for its curve.
_VALIDATIONS = 4
#: How the notes of a run begin that are passed on.
_TOLD = ("warning", "skipped", "signal")


@dataclass(frozen=True)
class Scores:
    """Of one network on the test cases.

    cases: their names. groups: their patients, "" for none known. dsc: `(N,)` mean over foreground classes. classes: of
    each class.
    """

    cases: list[str]
    groups: list[str]
    dsc: NDArray[np.float64]
    classes: dict[str, NDArray[np.float64]]

    @classmethod
    def read(cls, path: Path) -> Scores:
        """Those of a run's result.json."""
        found = json.loads(path.read_text(encoding="utf-8"))
        classes = {name: np.asarray(values, np.float64) for name, values in found["classes"].items()}
        return cls(found["cases"], found["groups"], np.asarray(found["dsc"], np.float64), classes)


class Predicted(NamedTuple):
    """A plane of a test case: image `(H, W, 3)` in [0, 1], true and predicted class indices `(H, W)`."""

    name: str
    image: NDArray[Any]
    truth: NDArray[Any]
    labels: NDArray[Any]


@dataclass(frozen=True)
class Runs:
    """Trains and evaluates what a study asks for, in folders of its own below that of the study.

    All may raise InputError: for what cannot be trained with the settings or the data, for files that are damaged.
    """

    study: Study
    data: Data
    watch: Watch

    def folder(self, name: str) -> Path:
        """Where a run lies."""
        return self.study.folder / "runs" / name

    def result(self, name: str) -> Path:
        """The scores of a run; there is such a file once it is done."""
        return self.folder(name) / "result.json"

    def rehearse(self, trainings: Sequence[Mapping[str, Any]], *, pretrains: bool) -> None:
        """Refuse pretrainings and fine-tunings that could not be made, before hours go into what comes before them.

        Once anything is trained they are known to be fine: settings and content of the data cannot change.
        """
        from coverfast.downstream import plan as library
        from coverfast.training import plan as pretraining

        if self.folder("").exists():
            return
        nowhere, s = {"run": str(self.folder("none"))}, self.study.settings
        for method in s.pretrained.values() if pretrains else ():
            pretraining.plan({**self._unlabelled(method, s.seed), **nowhere})
        for flags in trainings:
            library.plan({**self._with_labels(flags), **nowhere}, rehearsal=True)

    @property
    def own(self) -> str | None:
        """The user's code that makes the backbone, if that is what makes it."""
        name = self.study.tables.get("pretrain", {}).get("backbone", "unet")
        return name if kind_of(name) == "own" else None

    def architecture(self, backbone: str) -> dict[str, Any]:
        """Settings of a network from scratch that is built like a backbone, "" for that of the pretraining to come."""
        if backbone:
            from coverfast.downstream.assembly import pretrained

            shards = self.data.test
            try:
                found = pretrained(backbone, shards.ndim, shards.channels, own=self.own).description
            except InputError as error:
                raise InputError(f"checkpoint does not fit: {error}") from None
            if found["kind"] != "unet":
                name = self.own if found["kind"] == "own" else title(found)
                return {"scratch": True, "backbone": name, "backbone_args": spelled(found["args"])}
            channels = tuple(found["channels"])
        else:
            s = self.study.settings
            settings, *others = (resolve(s.preset, self.study.pretraining(m)) for m in s.pretrained.values())
            if settings.backbone != "unet":
                return {"scratch": True, "backbone": settings.backbone, "backbone_args": settings.backbone_args}
            channels = settings.unet_channels()
            for other in others:  # of as many channels, groups may make another number of levels
                theirs = other.unet_channels()
                require(theirs == channels, f"channels must be the same for all methods, got {channels} and {theirs}")
        encoder = channels[: (len(channels) + 1) // 2]
        require(
            channels == mirrored(encoder),
            f"channels of the decoder must mirror those of the encoder, as in a network from scratch, got {channels}",
        )
        return {"scratch": True, "channels": encoder}

    # --- training ---

    def pretrain(self, name: str, method: str, seed: int) -> Path:
        """Pretrain, unless that is done; the backbone. method: "" for that of the table pretrain."""
        from coverfast.training import plan as library

        run = Run(self.folder(name))
        if run.backbone.exists():
            self.watch.passed(name)
        else:
            self._train(library, name, self._unlabelled(method, seed))
            self.watch.end(name)
        shutil.rmtree(run.checkpoints.folder, ignore_errors=True)
        return run.backbone

    def finetune(self, name: str, flags: Mapping[str, Any]) -> Scores:
        """Train with `flags` over the study's settings and evaluate on the test cases, unless that is done."""
        from coverfast.downstream import plan as library

        run, result = Run(self.folder(name)), self.result(name)
        if result.exists():
            self.watch.passed(name)
        else:
            if not _trained(run, int(flags["iterations"])):
                self._train(library, name, self._with_labels(flags))
            write_atomically(result, json.dumps(self._evaluate(run), indent=1) + "\n")
            self.watch.end(name)
        shutil.rmtree(run.checkpoints.folder, ignore_errors=True)
        return Scores.read(result)

    def _common(self) -> dict[str, Any]:
        s = self.study.settings
        return {**_FRUGAL, "preset": s.preset, "crop": s.crop, "device": s.device}

    def _unlabelled(self, method: str, seed: int) -> dict[str, Any]:
        data, iterations = list(map(str, self.data.unlabelled)), self.study.settings.pretrain_iterations
        own = {"data": data, "seed": seed, "iterations": iterations}
        return {**self._common(), **self.study.pretraining(method), **own}

    def _with_labels(self, flags: Mapping[str, Any]) -> dict[str, Any]:
        kind = "probe" if flags.get("train_modules") == 0 else "finetune"
        every = max(1, int(flags["iterations"]) // _VALIDATIONS)
        table = {"lr": _LR[kind], "report": False, "val_every": every, **self.study.tables[kind]}
        code = {"backbone": self.own} if self.own and "init" in flags else {}
        return {**self._common(), **table, **code, "task": "segmentation", **self.data.flags(), **flags}

    def _train(self, library: ModuleType, name: str, flags: Mapping[str, Any]) -> None:
        folder = self.folder(name)
        self.watch.begin(name)
        if Run(folder).checkpoints.paths():
            # The study may have been moved since.
            places = {name: flags[name] for name in ("data", "val", "device") if name in flags}
            ready = library.resume({**places, "run": str(folder)})
        else:
            shutil.rmtree(folder, ignore_errors=True)  # what a kill left before there was anything to go on from
            ready = library.plan({**flags, "run": str(folder)})

        def tell(note: str) -> None:
            if note.startswith(_TOLD):
                self.watch.note(f"{name}: {note}")

        for note in ready.notes:
            tell(note)
        ready.on_note = tell
        ready.start(on_step=lambda records: self.watch.step(name, records))

    # --- results ---

    def _evaluate(self, run: Run) -> dict[str, Any]:
        from coverfast.downstream.evaluation import predict_case
        from coverfast.downstream.metrics import dice_per_class
        from coverfast.downstream.network import load_network

        network, test = (
            load_network(run.network, own=self.own, tell=self.watch.note).to(choose_device(self.study.settings.device)),
            self.data.test,
        )
        names, groups, rows = [], [], []
        for index in range(len(test)):
            seen = predict_case(network, test, index)
            names.append(seen.source)
            groups.append(seen.group)
            rows.append(dice_per_class(seen.prediction, seen.truth, len(network.names)))
        scores = np.stack(rows)
        classes = dict(zip(network.names[1:], scores.T.tolist(), strict=True))
        return {"cases": names, "groups": groups, "dsc": scores.mean(axis=1).tolist(), "classes": classes}

    def validations(self, name: str) -> dict[int, float]:
        """DSC of a run on the validation images by iteration, as its metrics.jsonl says."""
        path = Run(self.folder(name)).metrics
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        records = map(json.loads, lines)
        return {r["iteration"]: r["val_dsc"] for r in records if r.get("val_dsc") is not None}

    def predict(self, name: str, case: int) -> Predicted:
        """What the network of a run says of a test case; of a volume the plane across z with most classes."""
        from coverfast.downstream.evaluation import predict_case
        from coverfast.downstream.network import load_network

        path, device = self.folder(name) / "network.safetensors", choose_device(self.study.settings.device)
        network = load_network(path, own=self.own, tell=self.watch.note).to(device)
        seen = predict_case(network, self.data.test, case)
        image, truth, labels = seen.image, seen.truth, seen.prediction
        if truth.ndim == 3:
            plane = max(range(len(truth)), key=lambda z: (len(np.unique(truth[z])), int((truth[z] > 0).sum())))
            image, truth, labels = image[:, plane], truth[plane], labels[plane]
        return Predicted(seen.source, grey(image), truth, labels)


def _trained(run: Run, iterations: int) -> bool:
    """Whether a run was stopped after its last iteration; a fine-tuning keeps its best network long before."""
    last = run.checkpoints.paths()[-1:]
    return run.network.exists() and bool(last) and last[0].stem == f"iteration-{iterations:08d}"


def write_result(path: Path, result: Mapping[str, Any], text: str) -> None:
    """A result as `path`.json and, for people, `path`.md."""
    write_atomically(path.with_suffix(".json"), json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_atomically(path.with_suffix(".md"), text)


def write_pictures(folder: Path, draw: Callable[[], Mapping[str, bytes]], note: Callable[[str], None]) -> None:
    """Pictures by file name; without matplotlib there are none, which `note` is told."""
    try:
        need_matplotlib()
    except InputError as error:
        note(f"no pictures: {error}")
        return
    for name, data in draw().items():
        write_atomically(folder / name, data)
