"""A build whose output is a URL: finished files go there from the build's work folder, while the build goes on.

The place is claimed by `recipe.toml`, which is sent first. Each shard is sent when it is packed and read back; a
receipt in the work folder remembers the proof, so that a build that carries on reads nothing twice. `dataset.json` and
`SHA256SUMS` are taken away before anything changes and sent last: what a reader finds complete is complete.
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
from animesion.publishing import LAST, File, destination
from animesion.publishing.object_store import ObjectStore
from animesion.storage import checksums, stores
from animesion.storage.checksums import SEALS
from animesion.storage.workspace import Workspace, sha256_file

CODE = "sent-1"
#: Files on their way at once: one is sent while another is read back.
_THREADS = 2
_RECIPE = "recipe.toml"


def work_folder(url: str) -> Path:
    """The folder in the user's cache where the dataset of a URL is built."""
    url = url.rstrip("/")
    folder = stores.cache_folder(url, "builds")
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", url.rpartition("/")[2])[:40]
    return folder.with_name(f"{readable}-{folder.name}")


class Upload:
    """The way of a build's files to a store; a context manager, which ends its threads.

    Args:
        url: where to, such as `s3://bucket/prefix`.
        workspace: the build.
        recipe_toml: the resolved recipe.
        replace: take the place although another recipe's dataset lies there.

    Raises:
        UsageError: no such store, or something else lies there.
        AnimesionError: it cannot be reached.
    """

    def __init__(self, url: str, workspace: Workspace, recipe_toml: str, *, replace: bool = False) -> None:
        if url.startswith("hf://"):
            raise UsageError(
                f"--out {stores.shown(url)}: the Hub takes a dataset as one commit; build into a folder, then "
                "`animesion publish FOLDER --to` it"
            )
        destination(url)  # refuses what is no address at all
        self.sent: list[str] = []
        self._store = ObjectStore(url, replace=True)
        self._workspace = workspace
        self._params = params_digest(self._store.url)
        self._ours = self._is_ours(recipe_toml, replace=replace)
        self._open = False  # whether it was made ready to be changed
        self._opening = threading.Lock()
        self._pool = ThreadPoolExecutor(_THREADS, "animesion-upload")
        self._shards: dict[File, Future[None]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for what is on its way; what is not yet, stays."""
        self._pool.shutdown(cancel_futures=True)

    @property
    def url(self) -> str:
        """Where to."""
        return self._store.url

    def claim(self) -> None:
        """Send the recipe to a place where nothing lies yet; tells early whether anything can be sent there."""
        if not self._ours and not self._store.names():
            self._make_ready()

    def shard(self, name: str) -> None:
        """Send a finished shard in the background.

        Raises:
            AnimesionError: one that was sent before did not arrive.
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
            AnimesionError: one did not.
        """
        for number, (file, future) in enumerate(self._shards.items(), 1):
            progress.status(f"{file.name}, {number:,} of {len(self._shards):,}")
            future.result()

    def finish(self, progress: Progress) -> None:
        """Send what publish wrote, take old shards away, and last of all what says that the dataset is whole.

        Raises:
            AnimesionError: something did not arrive.
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
        if not all(self._is_there(file) for file in seals):
            self._make_ready()  # takes away the one that is there
        for file in seals:
            self._deliver(file)

    def _files(self) -> list[File]:
        """All files of the finished dataset in the order in which they are sent, by the digests that publish took."""
        digests = checksums.read(self._workspace.root)
        digests[LAST[-1]] = sha256_file(self._workspace.path(LAST[-1]))
        names: Sequence[str] = [*sorted(digests.keys() - set(LAST)), *LAST]
        paths = {name: self._workspace.path(name) for name in names}
        return [File(name, path, path.stat().st_size, digests[name]) for name, path in paths.items()]

    def _is_ours(self, recipe_toml: str, *, replace: bool) -> bool:
        """Whether this recipe's dataset, or a part of it, lies there; False too for an empty place."""
        due = recipe_toml.encode()
        there = self._store.content(_RECIPE, len(due) + 1)
        if there == due:
            return True
        if there is None and self._store.names():
            raise UsageError(f"{self.url} is not empty and holds no dataset: give another place with --out")
        if there is not None and not replace:
            raise UsageError(
                f"{self.url} was written by another recipe (see its recipe.toml): "
                "give another place with --out, or add --replace to rebuild it"
            )
        return False

    def _make_ready(self) -> None:
        """Before the first change: nothing there says any more that it is whole, and it is this recipe's."""
        with self._opening:
            if self._open:
                return
            self._store.unseal()
            path = self._workspace.path(_RECIPE)
            recipe = File(_RECIPE, path, path.stat().st_size, sha256_file(path))
            if self._fault(recipe):
                self._send(recipe)
            self._open = True

    def _deliver(self, file: File) -> None:
        """Send a file unless it is there, and prove that it is."""
        if not self._is_there(file):
            self._make_ready()
            self._send(file)

    def _is_there(self, file: File) -> bool:
        """Whether a file is there; nothing is read that was proved before and not written since."""
        proof = self._workspace.done(_unit(file), CODE, self._params, {"sha256": file.sha256})
        known = proof is not None and proof.facts["version"] == self._store.version(file.name)
        return known or not self._fault(file)

    def _send(self, file: File) -> None:
        self._store.put(file)
        if fault := self._fault(file):
            raise AnimesionError(f"{self.url}: {fault} after it was sent: run the same command again")
        self.sent.append(file.name)

    def _fault(self, file: File) -> str:
        """What is wrong with the copy; one that is whole is remembered by what the store says of it."""
        version = self._store.version(file.name)  # before the bytes are read: who writes meanwhile changes it
        fault = self._store.fault(file)
        if not fault:
            inputs = {"sha256": file.sha256}
            self._workspace.commit(_unit(file), CODE, self._params, inputs, {}, {"version": version})
        return fault


def _unit(file: File) -> str:
    return f"sent/{file.name}"
