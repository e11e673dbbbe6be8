"""`coverfast bench all`: everything, in one command."""

from __future__ import annotations

import shlex
from math import inf
from pathlib import Path
from typing import Annotated, Any

import typer

from coverfast.cli.tables import DTYPES, Against, Device, Sizes, check_axes, device_named, print_table


def all_(
    only: Annotated[list[str], typer.Option(help="stages, by name; repeats; default every one")] = [],  # noqa: B006
    sizes: Sizes = [],  # noqa: B006
    against: Against = [],  # noqa: B006
    device: Device = "auto",
    dtype: Annotated[str | None, typer.Option(help="of what has it; default bfloat16 on a GPU")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="in which to stay: what is left is skipped; default 8 on a GPU")
    ] = None,
    save: Annotated[Path, typer.Option(help="folder; results go to one inside, named after the device")] = Path(
        "bench/results"
    ),
) -> None:
    """Every benchmark in turn, each in a process of its own, at the paper's sizes on a GPU and small ones on a CPU.

    Their results lie under `bench/results/DEVICE/` afterwards; `coverfast bench report` makes pages and pictures.
    """
    from coverfast.bench.provenance import folder_of, provenance
    from coverfast.bench.suite import commands, run
    from coverfast.checks import check_choice, require
    from coverfast.kernels import INTERPRETED

    require(not INTERPRETED, "bench times kernels and cannot with TRITON_INTERPRET set; unset it")
    device = device_named(device)
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
    check_axes(sizes)
    stages = commands(device, dtype, sizes, against)
    for name in only:
        check_choice("only", name, tuple(stages))
    stages = {name: words for name, words in stages.items() if not only or name in only}
    limit = minutes if minutes is not None else 8.0 if device == "cuda" else inf
    folder, done = save / folder_of(provenance(device)), list[Any]()

    def tell(name: str) -> None:
        print(f"[{len(done) + 1}/{len(stages)}] coverfast bench {shlex.join(stages[name])}", flush=True)

    for outcome in run(stages, folder, limit, tell):
        done.append(outcome)
    rows = [(o.name, o.how, f"{o.seconds:.0f}", str(o.file or "-")) for o in done]
    print_table(f"Everything on {device}", ("stage", "how it ended", "seconds", "results"), rows, text=2)
    print(f"coverfast bench report {save}  # pages and pictures of these")
    if failed := [o.name for o in done if o.how != "done"]:
        print(f"{len(failed)} of {len(done)} stages are not done: {', '.join(failed)}")
        raise typer.Exit(1)
