"""A published dataset behind a URL, copied to this machine as far as a command reads it.

Copies lie in the user's cache, one folder a URL, as they came: what is wrong with them is for `animesion.verification.checks` to
say. A file is fetched again when the store says that it was written since. Streaming shards into training is the
business of `animesion_training.data.remote`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from animesion.errors import UsageError
from animesion.progress import Progress
from animesion.storage import checksums, stores
from animesion.storage.checksums import CHECKSUMS
from animesion.storage.workspace import Workspace, atomic_file, write_atomic

CODE = "copy-1"
_CHUNK = 8 << 20
#: A line is about a hundred bytes: larger lists are not ours to load.
_MAX_SUMS = 64 << 20
_SHARD = re.compile(r"data/[A-Za-z0-9_-]{1,100}\.tar")


def local(place: Path | str, *, shards: bool = False, progress: Progress | None = None) -> Path:
    """The folder of a dataset: a path as it is, the local copy of one behind a URL.

    Args:
        place: a path, or a URL such as `s3://bucket/prefix`.
        shards: copy shards too, and not just the tables and texts.
        progress: told which file is on its way.

    Raises:
        UsageError: there is no finished dataset at the URL.
        AnimesionError: it cannot be reached, or does not let us in.
    """
    url = str(place).rstrip("/")
    if not stores.is_url(url):
        return Path(place)
    progress = progress or Progress()
    system, root = stores.connect(url)
    folder = stores.cache_folder(url, "datasets")
    with stores.clear_errors(url):
        try:
            with system.open(f"{root}/{CHECKSUMS}", "rb") as file:
                sums = file.read(_MAX_SUMS + 1)
        except FileNotFoundError:
            raise UsageError(
                f"{url} holds no finished dataset: it has no {CHECKSUMS}; give the URL that `animesion build` or "
                "`animesion publish` sent one to"
            ) from None
    if len(sums) > _MAX_SUMS:
        raise UsageError(f"{url}/{CHECKSUMS} is too large to be the list of a dataset's files")
    write_atomic(folder / CHECKSUMS, sums)
    wanted = {name for name in checksums.read(folder) if shards or not _SHARD.fullmatch(name)}
    if shards:
        wanted |= _shards(system, root, url)  # readers would load also those that are not listed: verify says so
        for path in sorted(folder.glob("data/*.tar")):
            if f"data/{path.name}" not in wanted:
                path.unlink()
    progress.started("copy", None)
    for name in sorted(wanted):
        progress.status(name)
        with stores.clear_errors(url):
            try:
                _copy(system, f"{root}/{name}", Workspace(folder), name)
            except FileNotFoundError:
                (folder / name).unlink(missing_ok=True)
    progress.finished("copy")
    return folder


def _shards(system: Any, root: str, url: str) -> set[str]:
    with stores.clear_errors(url):
        try:
            found = system.ls(f"{root}/data", detail=False)
        except FileNotFoundError:
            return set()
    names = {f"data/{str(path).rpartition('/')[2]}" for path in found}
    return {name for name in names if _SHARD.fullmatch(name)}


def _copy(system: Any, source: str, to: Workspace, name: str) -> None:
    """Copy a file unless the copy is of what is there now."""
    inputs = {"version": str(system.ukey(source))}
    if to.done(f"copies/{name}", CODE, "", inputs):
        return
    with system.open(source, "rb", block_size=_CHUNK) as remote, atomic_file(to.path(name)) as out:
        while block := remote.read(_CHUNK):
            out.write(block)
    to.commit(f"copies/{name}", CODE, "", inputs, {name: out.sha256})
