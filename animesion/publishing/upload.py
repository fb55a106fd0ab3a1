"""Upload of a build whose output is a URL: finished files are sent from the work folder while the build continues.

`recipe.toml` is sent first and claims the destination. Each shard is sent when it is packed, and then read back; a
receipt in the work folder records the verification, so that a resumed build reads no file twice. `dataset.json` and
`SHA256SUMS` are removed before anything changes and sent last, so that a copy with them is complete. From the first
change to the end, the process has the lease of the destination.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from animesion.config.settings import params_digest
from animesion.errors import AnimesionError, UsageError
from animesion.progress import Progress
from animesion.publishing import destination
from animesion.publishing.base import LAST, File
from animesion.publishing.object_store import ObjectStore
from animesion.storage import checksums, stores
from animesion.storage.checksums import SEALS
from animesion.storage.workspace import Workspace, sha256_file

CODE = "sent-1"
#: Concurrent uploads: one file is sent while another is read back.
_THREADS = 2
_RECIPE = "recipe.toml"


def work_folder(url: str) -> Path:
    """The folder in the user's cache in which the dataset of a URL is built."""
    url = url.rstrip("/")
    folder = stores.cache_folder(url, "builds")
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", url.rpartition("/")[2])[:40]
    return folder.with_name(f"{readable}-{folder.name}")


class Upload:
    """Uploads the files of a build to a store in background threads; a context manager, which ends the threads.

    Args:
        url: the destination, such as `s3://bucket/prefix`.
        workspace: the build.
        recipe_toml: the resolved recipe.
        replace: whether to replace a dataset of another recipe.

    Raises:
        UsageError: the URL is not supported, or the destination holds something else.
        AnimesionError: the store cannot be reached.
    """

    def __init__(self, url: str, workspace: Workspace, recipe_toml: str, *, replace: bool = False) -> None:
        if url.startswith("hf://"):
            raise UsageError(
                f"--out {stores.shown(url)}: the Hub takes a dataset as one commit; build into a folder, then "
                "run `animesion publish FOLDER --to` that URL"
            )
        destination(url)  # raises for an invalid URL
        self.sent: list[str] = []
        self._store = ObjectStore(url, replace=True)
        self._workspace = workspace
        self._params = params_digest(self._store.url)
        self._ours = self._is_ours(recipe_toml, replace=replace)
        self._open = False  # whether the destination is unsealed and holds this recipe
        self._opening = threading.Lock()
        self._pool = ThreadPoolExecutor(_THREADS, "animesion-upload")
        self._shards: dict[File, Future[None]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the uploads in progress and cancel the others; then release the lease."""
        self._pool.shutdown(cancel_futures=True)
        self._store.lease.release()

    @property
    def url(self) -> str:
        """URL of the destination."""
        return self._store.url

    def claim(self) -> None:
        """Send the recipe to an empty destination, which shows early whether it accepts files.

        Raises:
            BusyError: another process writes to the same place.
        """
        self._store.lease.refuse_others()
        if not self._ours and not self._store.names():
            self._make_ready()

    def shard(self, name: str) -> None:
        """Send a finished shard in the background.

        Args:
            name: path of the shard in the dataset, such as `data/train-00000.tar`.

        Raises:
            AnimesionError: an earlier shard did not arrive.
        """
        for future in self._shards.values():
            if future.done():
                future.result()
        receipt = self._workspace.receipt(f"shards/{name.removeprefix('data/').removesuffix('.tar')}")
        assert receipt is not None
        facts = receipt.outputs[name]
        file = File(name, self._workspace.path(name), facts["bytes"], facts["sha256"])
        if file not in self._shards:
            self._shards[file] = self._pool.submit(self._deliver, file)

    def wait(self, progress: Progress) -> None:
        """Wait until every shard has arrived.

        Raises:
            AnimesionError: a shard did not arrive.
        """
        for number, (file, future) in enumerate(self._shards.items(), 1):
            progress.status(f"{file.name}, {number:,} of {len(self._shards):,}")
            future.result()

    def finish(self, progress: Progress) -> None:
        """Send the remaining files, remove stale shards, and send the files of `SEALS` last.

        Raises:
            AnimesionError: a file did not arrive.
        """
        self.wait(progress)
        files = self._files()
        if stale := self._store.stale(files):
            self._make_ready()
            self._store.remove(stale)
        seals = [file for file in files if file.name in SEALS]
        for file in files:
            if file not in seals:
                progress.status(file.name)
                self._deliver(file)
        if not all(self._is_present(file) for file in seals):
            self._make_ready()  # removes the one that is present
        for file in seals:
            self._deliver(file)

    def _files(self) -> list[File]:
        """All files of the finished dataset in the order in which they are sent, with the digests of `SHA256SUMS`."""
        digests = checksums.read(self._workspace.root)
        digests[LAST[-1]] = sha256_file(self._workspace.path(LAST[-1]))
        names: Sequence[str] = [*sorted(digests.keys() - set(LAST)), *LAST]
        paths = {name: self._workspace.path(name) for name in names}
        return [File(name, path, path.stat().st_size, digests[name]) for name, path in paths.items()]

    def _is_ours(self, recipe_toml: str, *, replace: bool) -> bool:
        """Whether the destination holds this recipe's dataset or a part of it; False also if it is empty.

        Raises:
            UsageError: it holds a dataset of another recipe, or no dataset.
        """
        ours = recipe_toml.encode()
        found = self._store.content(_RECIPE, len(ours) + 1)
        if found == ours:
            return True
        if found is None and self._store.names():
            raise UsageError(f"{self.url} is not empty and holds no dataset: choose another --out")
        if found is not None and not replace:
            raise UsageError(
                f"{self.url} was written by another recipe (see its recipe.toml): "
                "choose another --out, or add --replace to rebuild it"
            )
        return False

    def _make_ready(self) -> None:
        """Before the first change: take the lease, remove the files of `SEALS` and send the recipe."""
        with self._opening:
            if self._open:
                return
            self._store.lease.take()
            self._store.unseal()
            path = self._workspace.path(_RECIPE)
            recipe = File(_RECIPE, path, path.stat().st_size, sha256_file(path))
            if self._fault(recipe):
                self._send(recipe)
            self._open = True

    def _deliver(self, file: File) -> None:
        """Send a file and verify it, unless it is already present."""
        if not self._is_present(file):
            self._make_ready()
            self._send(file)

    def _is_present(self, file: File) -> bool:
        """Whether the store has a file; reads it back only if it was written since its last verification."""
        receipt = self._workspace.done(_unit(file), CODE, self._params, {"sha256": file.sha256})
        verified = receipt is not None and receipt.facts["version"] == self._store.version(file.name)
        return verified or not self._fault(file)

    def _send(self, file: File) -> None:
        self._store.put(file)
        if fault := self._fault(file):
            raise AnimesionError(f"{self.url}: {fault} after the upload: run the same command again")
        self.sent.append(file.name)

    def _fault(self, file: File) -> str:
        """What is wrong with the copy; the store's version of an intact copy is recorded in a receipt."""
        version = self._store.version(file.name)  # before the read, so that a concurrent write invalidates the receipt
        fault = self._store.fault(file)
        if not fault:
            inputs = {"sha256": file.sha256}
            self._workspace.commit(_unit(file), CODE, self._params, inputs, {}, {"version": version})
        return fault


def _unit(file: File) -> str:
    return f"sent/{file.name}"
