"""Crash-safe storage of a build: the output folder, atomic files, receipts and the lock.

A file becomes visible only when it is complete (temporary name, fsync, rename). A unit of work is committed by its
receipt, which is written last and has the digests of inputs, parameters and outputs. Stages skip work whose receipt is
still valid. Nothing here depends on images.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from animesion.errors import AnimesionError, BusyError, FullDiskError, UsageError
from animesion.storage import names, receipts
from animesion.storage.receipts import Receipt

STAGES = ("fetch", "inspect", "curate", "pack", "finalize")

_BUFFER = 1 << 18
#: Start of the name of a file or folder that is being written.
TEMPORARY = ".tmp-"
_MARKER = ".receipts/recipe.json"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Workspace:
    """The output folder of one build.

    Args:
        root: path of the folder, which need not exist.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        #: whether this object has committed a unit; worker processes have objects of their own
        self.changed = False
        self._receipts: dict[str, tuple[tuple[int, int, int], Receipt | None]] = {}

    def __reduce__(self) -> tuple[type[Workspace], tuple[Path]]:
        return Workspace, (self.root,)

    def path(self, *parts: str) -> Path:
        """A path inside the output folder."""
        return self.root.joinpath(*parts)

    # -- receipts ------------------------------------------------------------------------------------------------

    def receipt(self, unit: str) -> Receipt | None:
        """The receipt of a unit, or None if it does not exist, cannot be read or is not of the form of its stage."""
        path = self._receipt_path(unit)
        try:
            status = os.stat(path)
            # Stages ask for the receipts of earlier ones several times; a file is replaced and never changed.
            state = (status.st_ino, status.st_mtime_ns, status.st_size)
            known = self._receipts.get(unit)
            if known is None or known[0] != state:
                known = state, receipts.parse(unit, path.read_bytes()) if stat.S_ISREG(status.st_mode) else None
                self._receipts[unit] = known
            return known[1]
        except OSError:
            return None

    def done(self, unit: str, code: str, params: str, inputs: Mapping[str, str]) -> Receipt | None:
        """The unit's receipt if it is valid: same code, parameters and inputs, and unchanged outputs."""
        receipt = self.receipt(unit)
        if receipt is None or (receipt.code, receipt.params, receipt.inputs) != (code, params, dict(inputs)):
            return None
        return receipt if self.intact(receipt) else None

    def intact(self, receipt: Receipt) -> bool:
        """Whether every output of a receipt exists with the recorded digest."""
        return all(self.has(name, known) for name, known in receipt.outputs.items())

    def has(self, name: str, known: Mapping[str, Any]) -> bool:
        """Whether a file exists with the digest that a receipt records among its outputs."""
        path = os.path.join(self.root, name)
        try:
            status = os.lstat(path)
        except OSError:
            return False
        if not stat.S_ISREG(status.st_mode) or status.st_size != known["bytes"]:
            return False
        # Equal size and time are trusted. A copied folder has other times, so its bytes are compared.
        return bool(status.st_mtime_ns == known["mtime_ns"] or sha256_file(Path(path)) == known["sha256"])

    def commit(
        self,
        unit: str,
        code: str,
        params: str,
        inputs: Mapping[str, str],
        outputs: Mapping[str, str],
        facts: Mapping[str, Any] | None = None,
    ) -> Receipt:
        """Write the receipt of a finished unit.

        Args:
            unit: name of the unit.
            code: version of the code.
            params: digest of the parameters.
            inputs: digest of each input by name.
            outputs: sha256 by path relative to the output folder.
            facts: small JSON-ready results.
        """
        described = {}
        for name, digest in sorted(outputs.items()):
            status = self.path(name).stat()
            described[name] = {"sha256": digest, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
        receipt = Receipt(unit, code, params, dict(inputs), described, dict(facts or {}))
        # Outputs are on disk by now; with the receipt as the last file, a crash never leaves a receipt without outputs.
        path = self._receipt_path(unit)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(asdict(receipt), indent=1).encode())
        self.changed = True
        return receipt

    def forget(self, prefix: str, keep: set[str]) -> None:
        """Remove the receipts and outputs of units under `prefix` that are not in `keep`."""
        folder = self.path(".receipts", prefix)
        for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
            unit = f"{prefix}/{path.stem}"
            if unit in keep:
                continue
            receipt = self.receipt(unit)
            path.unlink(missing_ok=True)  # first, for the same reason as it is written last
            for name in receipt.outputs if receipt else ():
                with contextlib.suppress(OSError):
                    self.path(name).unlink()

    def _receipt_path(self, unit: str) -> Path:
        return self.path(".receipts", f"{unit}.json")

    # -- claim ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def claim(self, recipe_toml: str, digest: str, *, replace: bool = False) -> Iterator[None]:
        """Reserve the output folder for one build.

        Args:
            recipe_toml: the resolved recipe, written into the folder.
            digest: digest of the recipe.
            replace: continue although another recipe wrote the folder.

        Raises:
            BusyError: another build uses the folder.
            UsageError: the folder belongs to another recipe, or is not empty and not a build.
        """
        self.check(digest, replace=replace)
        with full_disk_is_clear(self.root):
            self.path(".receipts").mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path(".receipts", "lock"))
        try:
            with full_disk_is_clear(self.root):
                lock.acquire(timeout=0)
        except Timeout:
            raise BusyError(
                f"the output folder {self.root} is in use by another build: wait for it, or give another with --out"
            ) from None
        try:
            self.check(digest, replace=replace)  # again: another build may have written since, before the lock
            with full_disk_is_clear(self.root):
                sweep(self.root)
                _write_new(self.path("recipe.toml"), recipe_toml.encode())
                _write_new(self.path(_MARKER), json.dumps({"digest": digest}).encode())
            yield
        finally:
            sweep(self.root)  # a stopped worker leaves its temporary file
            lock.release()

    def check(self, digest: str, *, replace: bool = False) -> None:
        """Check that a build of this recipe may write here, without changing anything.

        Raises:
            UsageError: the folder belongs to another recipe, is not empty and not a build, or has a link in it.
        """
        if self.root.exists() and not self.root.is_dir():
            raise UsageError(f"the output {self.root} is a file; give a folder with --out")
        if self.root.is_dir():
            names.refuse_links(self.root)
        if self.path(".removal/moves.json").exists():
            raise UsageError(f"{self.root} has an interrupted removal: run its `animesion remove` again")
        receipts = self.path(".receipts")
        if self.root.is_dir() and not receipts.is_dir() and any(self.root.iterdir()):
            raise UsageError(f"the output folder {self.root} is not empty and is not a build: give another with --out")
        # A folder with nothing but the marker has no work to protect, so any recipe may use it.
        begun = receipts.is_dir() and any(path != self.path(_MARKER) for path in receipts.rglob("*.json"))
        try:
            known = json.loads(self.path(_MARKER).read_bytes())["digest"]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            known = ""
        if begun and known != digest and not replace:
            raise UsageError(
                f"the output folder {self.root} was written by another recipe (see its recipe.toml): "
                "give another with --out, or add --replace to rebuild it"
            )


class _Hashing:
    """A binary file for writing that computes the SHA-256 of its content; has the methods that pyarrow calls."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._digest = hashlib.sha256()
        self.position = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        self._raw.write(data)
        self._digest.update(data)
        self.position += len(data)
        return len(data)

    def tell(self) -> int:
        return self.position

    def flush(self) -> None:
        self._raw.flush()

    def seekable(self) -> bool:
        return False

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    closed = False

    def close(self) -> None:
        self.flush()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def sweep(root: Path, *, deep: bool = True) -> None:
    """Remove the temporary files that a killed process left in a folder and, if `deep`, in the folders in it.

    Nothing else may write there meanwhile.
    """
    for folder, folders, files in os.walk(root):
        for name in [name for name in folders if name.startswith(TEMPORARY)]:
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
            folders.remove(name)
        for name in files:
            if name.startswith(TEMPORARY):
                Path(folder, name).unlink(missing_ok=True)
        if not deep:
            return


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[_Hashing]:
    """Write a file that appears under its name only when it is complete and on disk.

    Yields:
        The file, with its `sha256` and `position`.

    Raises:
        FullDiskError: no space, quota or file-size limit; the temporary file is removed.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    with full_disk_is_clear(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb", _BUFFER) as raw:
                writer = _Hashing(raw)
                yield writer
                raw.flush()
                os.fsync(raw.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def _write_new(path: Path, content: bytes) -> None:
    """Write a file atomically, unless it has this content."""
    with contextlib.suppress(OSError):
        if path.read_bytes() == content:
            return
    write_atomic(path, content)


def write_atomic(path: Path, content: bytes | memoryview) -> str:
    """Write a whole file atomically; returns its SHA-256 as hex."""
    with atomic_file(path) as file:
        file.write(content)
    return file.sha256


@contextlib.contextmanager
def full_disk_is_clear(path: Path | str) -> Iterator[None]:
    """Turn the errors of a full disk, of a read-only folder and of a file in place of one into one sentence.

    Raises:
        FullDiskError: no space, quota or file-size limit.
        AnimesionError: no permission to write, or a part of the path is a file.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise FullDiskError(
                f"no space to write {path} ({os.strerror(error.errno or 0).lower()}): "
                "free some space and run the same command again, it resumes"
            ) from None
        if error.errno in {errno.EACCES, errno.EROFS, errno.EPERM}:
            raise AnimesionError(f"cannot write {path}: {os.strerror(error.errno or 0).lower()}") from None
        if error.errno in {errno.ENOTDIR, errno.EEXIST, errno.EISDIR}:
            raise UsageError(f"cannot write {path}: {_in_the_way(error)}: remove it, or choose another place") from None
        raise


def _in_the_way(error: OSError) -> str:
    """What is where a folder, or a file, has to be."""
    if error.errno == errno.EISDIR:
        return "a folder is there"
    place = Path(os.fsdecode(error.filename)) if error.filename else Path()
    files = [part for part in (place, *place.parents) if part.is_file()]
    return f"{files[0]} is a file" if files else "a part of the path is a file"


def sha256_file(path: Path) -> str:
    """SHA-256 of a file as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder durable: without this fsync, a power failure may undo it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
