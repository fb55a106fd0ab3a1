"""Parts of paths with slashes, as `PurePosixPath` has them, without an object for each of a million paths."""

from __future__ import annotations

from pathlib import PurePosixPath


def parts_of(path: str) -> tuple[str, ...]:
    """The folders and the name."""
    return tuple(path.split("/")) if _is_plain(path) else PurePosixPath(path).parts


def stem_of(path: str) -> str:
    """The name without its suffix."""
    if not _is_plain(path):
        return PurePosixPath(path).stem
    name = path[path.rfind("/") + 1 :]
    return name[:dot] if (dot := name.rfind(".")) > 0 else name


def suffix_of(path: str) -> str:
    """The suffix of the name with its dot; empty for none."""
    if not _is_plain(path):
        return PurePosixPath(path).suffix
    name = path[path.rfind("/") + 1 :]
    return name[dot:] if (dot := name.rfind(".")) > 0 else ""


def _is_plain(path: str) -> bool:
    """Whether a path has no empty part, and none that begins with a dot, and the name ends in no dot or slash."""
    return bool(path) and path[0] not in "/." and path[-1] not in "/." and "//" not in path and "/." not in path
