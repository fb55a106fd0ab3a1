"""`animesion` commands in the process of the tests: one of their own would load torch again, for seconds."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import subprocess
import traceback
from collections.abc import Iterator, Mapping
from unittest import mock

import huggingface_hub

from animesion.cli import main


def run_here(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command, in an environment of its own if one is given; returns what `subprocess.run` does for a process."""
    with in_environment(env) if env is not None else contextlib.nullcontext():
        return _run_here(*arguments)


@contextlib.contextmanager
def in_environment(env: Mapping[str, str]) -> Iterator[None]:
    """The environment of this process meanwhile, also for the Hub's client, which reads it when it is imported."""
    hub = vars(huggingface_hub.constants)
    with mock.patch.dict(os.environ, env, clear=True), mock.patch.dict(hub, _hub_settings()):
        _forget_clients()
        try:
            yield
        finally:
            _forget_clients()


def _hub_settings() -> dict[str, object]:
    """The constants of the Hub's client that depend on the environment, and the others."""
    spec = importlib.util.find_spec("huggingface_hub.constants")
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    return {name: value for name, value in vars(again).items() if name.isupper()}


def _forget_clients() -> None:
    """Clients keep to the server and the account that they were made for."""
    huggingface_hub.close_session()
    with contextlib.suppress(ImportError):
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()


def _run_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    out, err = io.StringIO(), io.StringIO()
    status: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as end:
            status = end.code
        except Exception:
            traceback.print_exc()
            status = 1
    if isinstance(status, str):  # as the interpreter would do at its end
        err.write(f"{status}\n")
    code = status if isinstance(status, int) else int(status is not None)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
