"""What a run of fine-tuning shows: its curves, and predictions of a few cases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from coverfast.disk import explained
from coverfast.downstream.metrics import dice_per_class
from coverfast.downstream.network import Network
from coverfast.downstream.validation import case_image
from coverfast.downstream.windows import predict_windows
from coverfast.report.cases import CaseView, case_sheet, write_page
from coverfast.report.curves import curves_sheet
from coverfast.report.metrics import last_figures, load_metrics, meaning
from coverfast.report.sheet import Sheet, need_matplotlib
from coverfast.shard_set import ShardSet
from coverfast.training.runs import Run

#: Cases that are shown.
_SHOWN = 2


def write_run_page(
    run: Run, network: Network, shards: ShardSet, about: Mapping[str, object], *, held_out: bool
) -> Path:
    """Write `report/index.html` of a run: its curves and, of a segmentation, the first cases of `shards`.

    `InputError`: matplotlib is not installed, or a file cannot be written.
    """
    need_matplotlib()
    with explained(run.report):
        run.report.mkdir(parents=True, exist_ok=True)
    metrics = load_metrics(run.metrics)
    pictures: list[tuple[str, str, Sheet]] = []
    for index in range(min(_SHOWN, len(shards)) if network.task == "segmentation" else 0):
        image, truth = case_image(shards, index), shards.labels(index)[0]
        found = predict_windows(network, image).numpy().argmax(0).astype(np.uint8)
        dsc = float(dice_per_class(found, truth, len(network.names)).mean())
        source = shards.source(index)
        view = CaseView(source, image.numpy(), shards.read(index).spacing, found, truth, f"DSC {dsc:.3f}")
        said = f"{source}, " + ("held out" if held_out else "learned from") + f": DSC {dsc:.3f}"
        pictures.append((f"case-{index + 1}", said, case_sheet(view, network.names)))
    if sheet := curves_sheet(metrics):
        pictures.append(("curves", "Thin or shaded: every iteration; bold: the running mean.", sheet))
    rows = [
        (name, f"{last:.4g}", f"{mean:.4g}", str(at), meaning(name)) for name, last, mean, at in last_figures(metrics)
    ]
    table = ("figure", "last", "mean of last 50", "iteration", "what it is"), rows
    return write_page(run.report, f"{run.folder.name}: {network.task}", about, table, pictures)
