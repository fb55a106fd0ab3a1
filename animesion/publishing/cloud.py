"""Publishing into folders and object stores through fsspec: `file://`, `s3://`, `gs://`.

What is there is known by reading it: sizes first, then SHA-256 of the bytes. No store is trusted to have kept a digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from animesion import building
from animesion.errors import AnimesionError, FullDiskError, UsageError
from animesion.publishing import SHARD, File
from animesion.workspace import full_disk_is_clear

_CHUNK = 8 << 20
_PART = ".sending"
_FACTS = "dataset.json"


class Store:
    """A folder or a prefix of a bucket.

    Args:
        url: `file:///folder`, `s3://bucket/prefix` or `gs://bucket/prefix`.

    Raises:
        UsageError: no bucket, or the store's package is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        scheme, _, path = url.partition("://")
        if scheme == "file" and not path.startswith("/"):
            raise UsageError(f"--to {url}: a folder is given from the root on, as in file:///data/published")
        if not path.strip("/"):
            raise UsageError(f"--to {url} names no {'folder' if scheme == 'file' else 'bucket'}")
        try:
            import fsspec

            with self._clear():
                self._fs, root = fsspec.core.url_to_fs(self.url)
        except ImportError:
            raise UsageError(
                f"{scheme}:// needs a package that is not installed: pip install 'animesion[cloud]'"
            ) from None
        self._local = scheme == "file"
        self._root = str(root).rstrip("/")

    def refusal(self, tag: str, changes: bool) -> str:
        """Tags and old shards are refused: nothing here keeps what a reader would lose."""
        if tag:
            return f"--tag names a revision of a Hub repository: put {tag} into the prefix of {self.url} instead"
        return ""

    def prepare(self) -> None:
        """Folders are made as files are written; a bucket is not ours to make."""

    def present(self, files: Sequence[File]) -> set[str]:
        """Files of equal size and SHA-256; `dataset.json` counts only when all are there, because it goes first."""
        found = {file.name for file in files if not self._fault(file)}
        return found if len(found) == len(files) else found - {_FACTS}

    def stale(self, files: Sequence[File]) -> list[str]:
        """Nothing is taken away where no history keeps it.

        Raises:
            UsageError: shards of something else lie there.
        """
        names = {file.name for file in files}
        others = [name for name in self._shards() if name not in names]
        if others:
            raise UsageError(
                f"{self.url} holds {others[0]}{f' and {len(others) - 1:,} more shards' * (len(others) > 1)} of another "
                "dataset, which readers would load: give an empty place, or remove it there"
            )
        return []

    def send(self, files: Sequence[File], stale: Sequence[str], message: str, progress: building.Progress) -> None:
        """One after the other; a file has its name only when it is whole, and an older `dataset.json` goes first."""
        with self._clear():
            if files and self._fs.exists(self._at(_FACTS)):  # it does not describe what is about to lie there
                self._fs.rm_file(self._at(_FACTS))
        for file in files:
            progress.told(file.name)
            with self._clear():
                if self._local:
                    self._fs.makedirs(self._at(file.name).rpartition("/")[0], exist_ok=True)
                    self._fs.put_file(str(file.path), self._at(file.name) + _PART)
                    self._fs.mv(self._at(file.name) + _PART, self._at(file.name))
                else:
                    self._fs.put_file(str(file.path), self._at(file.name))

    def faults(self, files: Sequence[File]) -> list[str]:
        """Read every file back."""
        return [fault for file in files if (fault := self._fault(file))]

    def tag(self, name: str) -> None:
        """There are none.

        Raises:
            UsageError: always.
        """
        raise UsageError(self.refusal(name, changes=False))

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _fault(self, file: File) -> str:
        digest = hashlib.sha256()
        with self._clear():
            self._fs.invalidate_cache()
            try:
                size = self._fs.info(self._at(file.name))["size"]
                if size != file.bytes:
                    return f"{file.name} has {size:,} bytes there and {file.bytes:,} here"
                with self._fs.open(self._at(file.name), "rb", block_size=_CHUNK) as remote:
                    while block := remote.read(_CHUNK):
                        digest.update(block)
            except FileNotFoundError:
                return f"{file.name} is not there"
        if digest.hexdigest() != file.sha256:
            return f"{file.name} has another SHA-256 there than here"
        return ""

    def _shards(self) -> list[str]:
        with self._clear():
            try:
                listed: list[Any] = self._fs.ls(self._at("data"), detail=False)
            except FileNotFoundError:
                return []
        names = ["data/" + str(path).rstrip("/").rpartition("/")[2] for path in listed]
        return sorted(name for name in names if SHARD.fullmatch(name))

    @contextmanager
    def _clear(self) -> Iterator[None]:
        """Errors of the store in one sentence; those that its user looks for pass."""
        try:
            with full_disk_is_clear(Path(self.url)):
                yield
        except (ImportError, FileNotFoundError, FullDiskError, AnimesionError):
            raise
        except Exception as error:  # each store's client has errors of its own
            name = type(error).__name__
            if "Credentials" in name or isinstance(error, PermissionError):
                raise AnimesionError(
                    f"{self.url} does not let us in ({name}): check the credentials in the environment, "
                    "such as AWS_PROFILE or AWS_ACCESS_KEY_ID"
                ) from error
            text = " ".join(str(error).split())[:200] or name
            raise AnimesionError(
                f"{self.url} cannot be reached or refuses ({text}): run the same command again, it resumes"
            ) from error
