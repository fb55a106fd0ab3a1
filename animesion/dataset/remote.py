"""Copy a published dataset behind a URL to this machine, as far as a command reads it.

Copies are stored in the user's cache, one folder per URL, without any check of their content, which is up to
`animesion.verification.checks`. A file is copied again if it changed in the store. Shards are streamed into training by
`animesion_training.data.remote`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from animesion.errors import UsageError
from animesion.progress import Progress
from animesion.storage import checksums, names, stores
from animesion.storage.checksums import CHECKSUMS
from animesion.storage.workspace import Workspace, atomic_file, write_atomic

CODE = "copy-1"
_CHUNK = 8 << 20
#: A line has about a hundred bytes, so this is far more than any dataset needs.
_MAX_CHECKSUMS_BYTES = 64 << 20
_SHARD = re.compile(names.SHARD)


def local(place: Path | str, *, shards: bool = False, progress: Progress | None = None) -> Path:
    """The folder of a dataset: the path itself, or the local copy of a dataset behind a URL.

    Args:
        place: a path, or a URL such as `s3://bucket/prefix`.
        shards: copy shards too, in addition to tables and text files.
        progress: receives the name of each file that is copied.

    Raises:
        UsageError: there is no finished dataset at the URL.
        AnimesionError: the store cannot be reached, or access is denied.
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
                sums = file.read(_MAX_CHECKSUMS_BYTES + 1)
        except FileNotFoundError:
            raise UsageError(
                f"{url} has no finished dataset: {CHECKSUMS} not found; give the URL that `animesion build` or "
                "`animesion publish` sent one to"
            ) from None
    if len(sums) > _MAX_CHECKSUMS_BYTES:
        raise UsageError(f"{url}/{CHECKSUMS} is too large for the checksums of a dataset")
    write_atomic(folder / CHECKSUMS, sums)
    wanted = {name for name in checksums.read(folder) if shards or not _SHARD.fullmatch(name)}
    if shards:
        # Shards without a checksum too: readers would load them, so verify has to report them.
        wanted |= _shards(system, root, url)
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
    """Paths of all shards in the store, listed in the checksums or not."""
    with stores.clear_errors(url):
        try:
            paths = system.ls(f"{root}/data", detail=False)
        except FileNotFoundError:
            return set()
    names = {f"data/{str(path).rpartition('/')[2]}" for path in paths}
    return {name for name in names if _SHARD.fullmatch(name)}


def _copy(system: Any, source: str, to: Workspace, name: str) -> None:
    """Copy a file, unless the local copy is of the store's current version."""
    inputs = {"version": str(system.ukey(source))}
    if to.done(f"copies/{name}", CODE, "", inputs):
        return
    with system.open(source, "rb", block_size=_CHUNK) as remote, atomic_file(to.path(name)) as out:
        while block := remote.read(_CHUNK):
            out.write(block)
    to.commit(f"copies/{name}", CODE, "", inputs, {name: out.sha256})
