"""The `coverfast` command: its groups, and what a refusal looks like."""

from __future__ import annotations

import sys

import typer

from coverfast.checks import InputError
from coverfast.cli import shards

app = typer.Typer(
    name="coverfast",
    help="Pixel-wise self-supervised pretraining of 2D and 3D medical images by vector contrastive learning (COVER).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(shards.app, name="shards")


def main() -> None:
    """Run the command line; a refusal prints one sentence and exits with code 2."""
    try:
        app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
