"""The command line. Data on stdout, talk and progress on stderr.

Exit codes: 0 done, 1 a check failed, 2 the caller's mistake, 3 the store failed, 70 a fault of Kvilt's own,
130 stopped by Ctrl-C, 141 nobody reads stdout any more."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence

FAILED, USER, STORE, FAULT, STOPPED, UNREAD = 1, 2, 3, 70, 130, 141


def main() -> None:
    """Run the command line of this process."""
    shut = _open_streams()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries; Kvilt says what it has to say itself
    if "stdout" in shut:
        print("error: standard output is closed, so nothing could be shown.", file=sys.stderr)
        sys.exit(USER)
    signal.signal(
        signal.SIGINT, _stop_at_once
    )  # until work begins that can be stopped in an orderly way (`talk.meter`)
    sys.exit(run(sys.argv[1:]))


def _stop_at_once(*_: object) -> None:
    """Ctrl-C while libraries are imported, which swallow a KeyboardInterrupt now and then."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os.write(2, b"error: stopped.\n")
    os._exit(STOPPED)


def run(arguments: Sequence[str]) -> int:
    """Run one command; its exit code. Whatever goes wrong is one line on stderr."""
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be flushed at exit
        return UNREAD
    except KeyboardInterrupt as error:
        print(f"error: stopped. {error}".strip(), file=sys.stderr)
        return STOPPED


def _run(arguments: Sequence[str]) -> int:
    from typer import Exit
    from typer.main import get_command

    from kvilt.cli import talk
    from kvilt.cli.app import app
    from kvilt.errors import StoreError, UserError

    try:
        with get_command(app).make_context("kvilt", list(arguments) or ["--help"]) as context:
            return context.command.invoke(context) or 0
    except Exit as end:
        return end.exit_code
    except (UserError, StoreError) as error:
        talk.fail(error)
        return USER if isinstance(error, UserError) else STORE
    except (BrokenPipeError, KeyboardInterrupt):
        raise
    except OSError as error:
        talk.fail(f"{error.filename}: {error.strerror}." if error.filename else f"{error}.")
        return USER
    except Exception as error:
        if told := getattr(error, "format_message", None):  # the command line's own: an unknown option, a wrong number
            talk.fail(f"{told()} See: {error.ctx.command_path if error.ctx else 'kvilt'} --help")  # type: ignore[attr-defined]
            return USER
        if "--verbose" in arguments or "-v" in arguments:
            raise
        talk.fail(f"a fault of Kvilt's own: {type(error).__name__}: {error}. Please report what --verbose says.")
        return FAULT


def _open_streams() -> list[str]:
    """Make the three streams usable whatever the shell closed; the names of those that were shut."""
    shut = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    while shut and (taken := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # so that no file of ours gets a number that libraries write their messages to
    if shut:
        os.close(taken)
    for name in shut:
        setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115 - open as long as we run
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # an answer must not fail on a terminal without its letters
    return shut
