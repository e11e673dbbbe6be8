"""`python -m coverfast`: the command line."""

from coverfast.cli import main

main()
