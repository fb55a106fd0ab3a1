"""Checks that the commands of `animesion_training` share: required packages and paths."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from animesion.errors import UsageError


@contextlib.contextmanager
def torch_required() -> Iterator[None]:
    """Import torch and other packages in this block: a missing one is an error that names the extra to install.

    Waiting threads of torch sleep instead of spinning, unless OMP_WAIT_POLICY is set: on a CPU they share the cores
    with the decoding threads, and spinning costs a tenth to a half of the speed.

    Raises:
        UsageError: a package of the `train` extra is missing.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is loaded
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0].startswith("animesion"):
            raise
        raise UsageError(f"this command needs {error.name}: pip install 'animesion[train]'") from None


def check_exists(*paths: Path | str) -> None:
    """Check that local paths exist, before seconds are spent on importing torch; URLs are not checked.

    Raises:
        UsageError: a path does not exist; the message names the first.
    """
    for path in paths:
        if "://" not in str(path) and not Path(path).exists():
            raise UsageError(f"file or folder {path} not found")
