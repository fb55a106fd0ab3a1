"""`animesion` commands in the process of the tests: one of their own would load torch again, for seconds."""

from __future__ import annotations

import contextlib
import io
import subprocess

from animesion.cli import main


def run_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command; returns what `subprocess.run` returns for a process."""
    out, err = io.StringIO(), io.StringIO()
    status: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as end:
            status = end.code
    if isinstance(status, str):  # as the interpreter would do at its end
        err.write(f"{status}\n")
    code = status if isinstance(status, int) else int(status is not None)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
