"""What the commands over `animesion_training` share: the sentences for what is not installed or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from animesion.errors import UsageError


@contextlib.contextmanager
def torch_required() -> Iterator[None]:
    """Turn the import error of a missing package into what to install.

    Torch's threads that wait are told to sleep rather than to spin, unless the environment says otherwise: on a CPU
    they share the cores with the threads that decode, and spinning takes a tenth to a half of the speed.

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
    """Refuse a local path that is not there before torch is loaded: that takes seconds, a typing error none.

    Raises:
        UsageError: it names the first that is missing; URLs are not looked at.
    """
    for path in paths:
        if "://" not in str(path) and not Path(path).exists():
            raise UsageError(f"there is no file or folder {path}")
