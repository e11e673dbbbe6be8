"""The `coverfast` command: its groups, and what a refusal looks like."""

from __future__ import annotations

import sys

import typer

from coverfast.checks import InputError, printable
from coverfast.cli import bench, evaluate, export, finetune, import_cover, predict, pretrain, shards, study, visualize

app = typer.Typer(
    name="coverfast",
    help="Pixel-wise self-supervised pretraining of 2D and 3D medical images (COVER, GVSL).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(shards.app, name="shards")
app.command()(pretrain.pretrain)
app.command()(pretrain.config)
app.command()(pretrain.demo)
app.command()(finetune.finetune)
app.command()(finetune.probe)
app.command()(evaluate.evaluate)
app.command()(predict.predict)
app.command()(visualize.visualize)
app.command()(export.export)
app.command()(import_cover.import_cover)
app.add_typer(study.app, name="study")
app.add_typer(bench.app, name="bench")


def _version(show: bool) -> None:
    if show:
        import coverfast

        print(coverfast.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", help="print the version", callback=_version, is_eager=True),
) -> None:
    pass


def main() -> None:
    """Run the command line; a refusal prints one sentence and exits with code 2."""
    try:
        app()
    except InputError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output has gone: `coverfast config small-2d | head`
        sys.stderr.close()
        sys.exit(141)
