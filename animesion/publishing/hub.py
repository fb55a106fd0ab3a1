"""Publishing to a repository on the Hugging Face Hub, of a dataset or of a model, through `huggingface_hub`.

The client reads the token itself (`HF_TOKEN`, or `hf auth login`). This code never handles a token, and removes
anything that looks like one from error messages.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from animesion.errors import AnimesionError, UsageError
from animesion.progress import Progress
from animesion.publishing.base import LAST, SHARD, File, Gate
from animesion.storage.stores import shown
from animesion.storage.workspace import sha256_file
from animesion_scrapers.masking import mask

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_BATCH_FILES, _BATCH_BYTES = 50, 4 << 30
"""Most files and bytes per commit; a killed run loses at most the commit in progress."""


class Hub:
    """A repository.

    Args:
        path: `user/name`; of a dataset also `datasets/user/name`.
        kind: what it is of.
        private: whether the repository must be private.
        gate: `auto` or `manual` to close the repository to those who have not accepted its conditions, or whose request
            was not granted; any other text leaves its setting as it is.

    Raises:
        UsageError: the name is not valid, or the client is not installed.
    """

    def __init__(
        self, path: str, *, kind: Literal["dataset", "model"] = "dataset", private: bool = False, gate: Gate = "off"
    ) -> None:
        of_dataset = kind == "dataset"
        self._repo = path.removeprefix("datasets/" if of_dataset else "").rstrip("/")
        self.url = f"hf://{'datasets/' * of_dataset}{self._repo}"
        parts = self._repo.split("/")
        if len(parts) != 2 or not all(map(_NAME.fullmatch, parts)):
            scheme = "hf://" * of_dataset
            given = f"{'--to' if of_dataset else '--push'} {scheme}{path[:120]}"
            raise UsageError(f"{shown(given)} is not a repository: give {scheme}user/name")
        self._kind: Any = {"repo_type": kind}
        self._private = private
        self._gate = gate
        self._commit = ""
        try:
            from huggingface_hub import HfApi
            from huggingface_hub.utils.tqdm import disable_progress_bars
        except ImportError:
            raise UsageError("hf:// needs the Hub's client: pip install 'animesion[hub]'") from None
        disable_progress_bars()
        self._api = HfApi()

    def refusal(self, tag: str, changes: bool) -> str:
        """Refuses a public repository with `--private`, and a tag that names another revision."""
        found = self._info()
        if found is None:
            return ""
        if self._private and not found.private:
            return f"{self.url} is public: make it private on the Hub first, or omit --private"
        if tag:
            with self._clear():
                tags = {
                    each.name: each.target_commit for each in self._api.list_repo_refs(self._repo, **self._kind).tags
                }
            if tag in tags and (changes or tags[tag] != found.sha):
                return f"{self.url} already has a tag {tag} on another revision: choose another with --tag"
        return ""

    def prepare(self) -> None:
        """Create the repository if it does not exist, and close it before it has any file."""
        found = self._info()
        if found is None:
            with self._clear():
                self._api.create_repo(self._repo, private=self._private or None, exist_ok=True, **self._kind)
        if self._gate != "off" and (found is None or found.gated != self._gate):
            with self._clear():
                self._api.update_repo_settings(self._repo, gated=self._gate, **self._kind)

    def present(self, files: Sequence[File]) -> set[str]:
        """Compares the Hub's digests: SHA-256 of large files, git blob ids of small ones."""
        tree = self._tree()
        return {file.name for file in files if file.name in tree and not _difference(file, tree[file.name])}

    def stale(self, files: Sequence[File]) -> list[str]:
        """Shards of an earlier publication; removed ones stay in the repository's history."""
        names = {file.name for file in files}
        return sorted(name for name in self._tree() if SHARD.fullmatch(name) and name not in names)

    def send(self, files: Sequence[File], stale: Sequence[str], message: str, progress: Progress) -> None:
        """Send files in several commits; the last one adds the files of `LAST` and removes stale shards."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        batches = list(_batches(files))
        for number, batch in enumerate(batches, 1):
            progress.status(f"{number} of {len(batches)}: {batch[0].name}" if batch else "")
            operations: list[Any] = [CommitOperationAdd(file.name, str(file.path)) for file in batch]
            if number == len(batches):  # with the last files, so that readers never see two sets of shards as complete
                operations += [CommitOperationDelete(name) for name in stale]
            if not operations:
                continue
            part = f" ({number} of {len(batches)})" if len(batches) > 1 else ""
            with self._clear():
                done = self._api.create_commit(self._repo, operations, commit_message=message + part, **self._kind)
            self._commit = done.oid

    def faults(self, files: Sequence[File]) -> list[str]:
        """Compares the Hub's SHA-256 of large files; downloads small files and digests them."""
        tree = self._tree()
        found = []
        with tempfile.TemporaryDirectory() as folder:
            for file in files:
                if file.name not in tree:
                    found.append(f"{file.name} is missing")
                elif tree[file.name].lfs is not None:
                    found += [each for each in [_difference(file, tree[file.name])] if each]
                else:
                    with self._clear():
                        path = self._api.hf_hub_download(
                            self._repo, file.name, revision=self._head(), local_dir=folder, **self._kind
                        )
                    if sha256_file(Path(path)) != file.sha256:
                        found.append(f"{file.name} has another SHA-256 than the local file")
        return found

    def tag(self, name: str) -> None:
        """Tag the last commit; does nothing if it already has the tag."""
        with self._clear():
            self._api.create_tag(self._repo, tag=name, revision=self._head(), exist_ok=True, **self._kind)

    def _info(self) -> Any:
        from huggingface_hub.errors import RepositoryNotFoundError

        with self._clear():
            try:
                return self._api.repo_info(self._repo, **self._kind)
            except RepositoryNotFoundError:
                return None

    def _head(self) -> str:
        if not self._commit:
            found = self._info()
            self._commit = found.sha if found is not None else ""
        return self._commit

    def _tree(self) -> dict[str, Any]:
        from huggingface_hub.errors import RepositoryNotFoundError

        with self._clear():
            try:
                listed = list(self._api.list_repo_tree(self._repo, recursive=True, **self._kind))
            except RepositoryNotFoundError:
                return {}
        return {each.path: each for each in listed if hasattr(each, "blob_id")}

    @contextmanager
    def _clear(self) -> Iterator[None]:
        """Turn the client's errors into one sentence without tokens."""
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            yield
        except (AnimesionError, RepositoryNotFoundError):
            raise
        except Exception as error:  # the client lets errors of its HTTP library through
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in (401, 403):
                raise AnimesionError(
                    f"the Hub denies write access to {self._repo} ({status}): log in with `hf auth login`, "
                    "or set HF_TOKEN to a token with write access"
                ) from None
            text = mask(" ".join(str(error).split()))[:200] or type(error).__name__
            raise AnimesionError(f"{self.url} failed ({text}): run the same command again, it resumes") from None


def _batches(files: Sequence[File]) -> Iterator[list[File]]:
    """Files commit by commit; the files of `LAST` are the last batch, which exists even if it is empty."""
    batch: list[File] = []
    for file in (file for file in files if file.name not in LAST):
        if batch and (len(batch) == _BATCH_FILES or sum(each.bytes for each in batch) + file.bytes > _BATCH_BYTES):
            yield batch
            batch = []
        batch.append(file)
    if batch:
        yield batch
    yield [file for file in files if file.name in LAST]


def _difference(file: File, entry: Any) -> str:
    """How an entry of the repository's tree differs from a file, one sentence; empty if it does not."""
    if entry.size != file.bytes:
        return f"{file.name} has {entry.size:,} bytes instead of {file.bytes:,}"
    if entry.lfs is not None:
        same = entry.lfs.sha256 == file.sha256
    else:
        content = file.path.read_bytes()  # at most 10 MB: the Hub stores larger files in LFS
        same = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == entry.blob_id
    return "" if same else f"{file.name} has another digest than the local file"
