"""The command line. Data on stdout, talk and progress on stderr.

Exit codes: 0 done, 1 a check failed, 2 the caller's mistake, 3 the store failed, 130 stopped by Ctrl-C."""

from __future__ import annotations

import sys
import warnings


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # an answer must not fail on a terminal without its letters
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries; Kvilt says what it has to say itself
    from kvilt.cli.app import app

    app(prog_name="kvilt")
