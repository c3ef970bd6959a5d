"""Verbs of other parts of the package, imported only when they are used: `kvilt --help` stays fast."""

from __future__ import annotations

import importlib

import typer

PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}


def add(app: typer.Typer, name: str, module: str, summary: str) -> None:
    """Add `kvilt NAME`: arguments go to the typer `app` of the module, or to its function NAME."""

    @app.command(name, help=summary, add_help_option=False, context_settings=PASSED_ON)
    def run(ctx: typer.Context) -> int:
        with typer.main.get_command(_shell(name, module)).make_context("kvilt", [name, *ctx.args]) as inner:
            return inner.command.invoke(inner) or 0


def _shell(name: str, module: str) -> typer.Typer:
    """An app that holds this verb alone, so that its usage reads `kvilt NAME ...`."""
    part = importlib.import_module(module)
    shell = typer.Typer(add_completion=False, rich_markup_mode=None)
    if hasattr(part, "app"):
        shell.add_typer(part.app, name=name)
    else:
        shell.command(name)(getattr(part, name))
        shell.callback()(lambda: None)  # keeps a single command from losing its name
    return shell
