"""The command line: parse, call the library, print."""

from coverfast.cli.main import main

__all__ = ["main"]
