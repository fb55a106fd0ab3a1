"""What the commands over `animesion_training` share: the sentence for a package that is not installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from animesion.errors import UsageError


@contextlib.contextmanager
def training() -> Iterator[None]:
    """Turn the import error of a missing package into what to install.

    Raises:
        UsageError: a package of the `train` extra is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0].startswith("animesion"):
            raise
        raise UsageError(f"this command needs {error.name}: pip install 'animesion[train]'") from None
