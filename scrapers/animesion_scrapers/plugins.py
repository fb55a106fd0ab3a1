"""Entry points of installed packages, own and of others: commands, sources, sites and detectors.

Importing what an entry point stands for is left to the module that asks for it.
"""

from __future__ import annotations

import functools
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any


def points(group: str, name: str = "") -> list[EntryPoint]:
    """The entry points of a group, such as `animesion.sources`, in the order of their packages.

    Args:
        group: name of the group.
        name: only entry points of this name, if given.
    """
    return [point for point in _installed(tuple(sys.path)).select(group=group) if name in ("", point.name)]


@functools.lru_cache(maxsize=2)
def _installed(path: tuple[str, ...]) -> Any:
    """All entry points; finding them reads a file of each installed package, so only once for each `sys.path`."""
    return entry_points()
