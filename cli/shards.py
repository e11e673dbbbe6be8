import typer
app = typer.Typer(help="Build, inspect and verify HDF5 shards.", no_args_is_help=True)
