"""Verbs of other parts of the package, imported only when they are used: `kvilt --help` stays fast."""

from __future__ import annotations

import importlib
from pathlib import Path

import typer

from kvilt.cli.options import exits

PACKAGE = Path(__file__).parents[1]
PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}


def add(app: typer.Typer, name: str, module: str, summary: str) -> None:
    """Add `kvilt NAME` if its module exists: arguments go to the typer `app` there, or to the function NAME."""
    if not PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py").is_file():
        return

    @app.command(name, help=summary, add_help_option=False, context_settings=PASSED_ON)
    def run(ctx: typer.Context) -> None:
        with exits():
            command = typer.main.get_command(_shell(name, module))
            code = command.main([name, *ctx.args], prog_name="kvilt", standalone_mode=False)
        if isinstance(code, int) and code:
            raise typer.Exit(code)


def _shell(name: str, module: str) -> typer.Typer:
    """An app that holds this verb alone, so that its usage reads `kvilt NAME ...`."""
    found = importlib.import_module(module)
    shell = typer.Typer(add_completion=False, rich_markup_mode=None)
    if hasattr(found, "app"):
        shell.add_typer(found.app, name=name)
    else:
        shell.command(name)(getattr(found, name))
        shell.callback()(lambda: None)  # keeps a single command from losing its name
    return shell
