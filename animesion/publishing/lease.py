"""A lease on a destination, so that only one process at a time writes there, although buckets have no locks.

The object `lease.json` names its owner. It is created and replaced on a condition, where the store checks any;
otherwise it is written, and read back after a pause. The owner writes it again every five minutes, and reads it before
each file: if another process has taken it, the owner stops. A lease that was not written for twenty minutes is stale,
and anybody's. Its age is by the time that the store gives the object, so the clocks of the writers do not matter to
each other; S3 refuses requests of machines whose clock differs from its own by fifteen minutes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from animesion.errors import AnimesionError, BusyError
from animesion.storage import stores
from animesion.wording import amount

NAME = "lease.json"

_RENEWED = 300.0
"""Seconds between two writes of a lease."""

_STALE = 1200.0
"""Seconds without a write after which a lease is anybody's."""

_SETTLED = 2.0
"""Seconds after which a lease is read back, where the store checks no conditions: others may have written it too."""

_TRIES = 5
_MOST = 4096
_REFUSED = {errno.EEXIST, errno.EINVAL}  # s3fs has EINVAL for a condition that is not met
_UNKNOWN = {errno.ENOSYS, errno.EOPNOTSUPP}


@dataclass(frozen=True)
class _Found:
    id: str
    owner: str
    place: str
    process: int
    version: str
    age: float


class Lease:
    """A lease on a destination; a context manager that takes and releases it.

    Args:
        system: file system of the destination.
        root: path of the destination in it.
        url: the destination, for messages.
    """

    def __init__(self, system: Any, root: str, url: str) -> None:
        self._fs = system
        self._path = f"{root}/{NAME}"
        self._url = url
        self._local = url.startswith("file://")
        self._id = secrets.token_hex(16)
        self._held = False
        self._taking = threading.Lock()
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def refuse_others(self) -> None:
        """Check that no other process has the lease, without taking it.

        Raises:
            BusyError: one has.
        """
        self._taken_by_none()

    def _taken_by_none(self) -> _Found | None:
        """The lease that is there, if it is stale or ours."""
        found = self._read()
        if found is not None and found.id != self._id and not _is_stale(found):
            raise BusyError(
                f"{self._url} is being written by {found.owner}, {_ago(found.age)}: wait for it, choose another "
                f"destination, or remove {NAME} there if that process no longer runs"
            )
        return found

    def take(self) -> None:
        """Take the lease, if this process does not have it yet.

        Raises:
            BusyError: another process has it.
        """
        with self._taking:
            for _ in range(0 if self._held else _TRIES):
                found = self._taken_by_none()
                version = found.version if found else None
                if not self._write(version):
                    continue
                if self._write(version):  # the same condition cannot be met twice: the store checks none
                    time.sleep(_SETTLED)
                if self._is_ours():
                    self._held = True
                    self._ended.clear()
                    threading.Thread(target=self._renew, daemon=True, name="animesion-lease").start()
                    break
            if not self._held:
                raise BusyError(f"{self._url} is being written by several processes: run the same command again")

    def check(self) -> None:
        """Check that the lease is still this process's, if it was taken.

        Raises:
            BusyError: another process has taken it, or removed it.
        """
        if self._held and not self._is_ours():
            found = self._read()
            now = f"is being written by {found.owner}" if found else "has lost the lease of this process"
            raise BusyError(f"{self._url} {now}, so this process stops: run the same command again later, it resumes")

    def release(self) -> None:
        """Give the lease back; one that cannot be removed goes stale."""
        self._ended.set()
        with self._taking, contextlib.suppress(AnimesionError, OSError):
            if self._held and self._is_ours():
                self._fs.rm_file(self._path)
            self._held = False

    def _renew(self) -> None:
        while not self._ended.wait(_RENEWED):
            with contextlib.suppress(AnimesionError, OSError), self._taking:  # or at the next time
                found = self._read()
                if self._held and not self._ended.is_set() and found and found.id == self._id:
                    self._write(found.version)

    def _is_ours(self) -> bool:
        found = self._read()
        return found is not None and found.id == self._id

    def _read(self) -> _Found | None:
        """The lease that is there."""
        with stores.clear_errors(self._url):
            try:
                version = self._version()
                with self._fs.open(self._path, "rb", block_size=_MOST) as file:
                    content = file.read(_MOST)
                age = (datetime.now(UTC) - self._fs.modified(self._path)).total_seconds()
            except FileNotFoundError:
                return None
        try:
            stated = json.loads(content)
            known = {name: str(stated[name]) for name in ("id", "owner", "place")}
            process = int(stated["process"])
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):  # of another program, or damaged
            known, process = {"id": "", "owner": "an unknown process", "place": ""}, 0
        known["owner"] = stores.shown(known["owner"])
        return _Found(**known, process=process, version=version, age=age)

    def _version(self) -> str:
        facts = self._fs.info(self._path)
        return str(facts.get("ETag", ""))

    def _write(self, version: str | None) -> bool:
        """Write the lease on the condition that it is still of this version, or that there is none.

        Returns:
            False if the store refused because of the condition; True does not prove that it checks any.
        """
        place = _place()
        owner = f"{platform.node() or 'an unnamed machine'}, process {os.getpid()}"
        document = {"owner": owner, "place": place, "process": os.getpid(), "id": self._id}
        content = json.dumps(document).encode()
        with stores.clear_errors(self._url):
            if self._local:
                return self._write_file(content, new=version is None)
            condition = {"mode": "create"} if version is None else {"IfMatch": version} if version else {}
            return self._accepted(lambda more: self._fs.pipe_file(self._path, content, **more), condition)

    def _write_file(self, content: bytes, *, new: bool) -> bool:
        path = Path(self._path)
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_name(f"{NAME}.{self._id}.sending")  # so that nobody reads half of it
        whole.write_bytes(content)
        try:
            os.link(whole, path) if new else whole.replace(path)
        except FileExistsError:
            return False
        finally:
            whole.unlink(missing_ok=True)
        return True

    def _accepted(self, write: Callable[[dict[str, str]], object], condition: dict[str, str]) -> bool:
        try:
            write(condition)
        except FileNotFoundError:
            if "IfMatch" not in condition:
                raise AnimesionError(f"{self._url}: the bucket does not exist; create it, or check its name") from None
            return False  # it was removed meanwhile
        except OSError as error:
            if condition and error.errno in _UNKNOWN:  # a store without conditions
                write({})
            elif isinstance(error, FileExistsError) or (condition and error.errno in _REFUSED):
                return False
            else:
                raise
        return True


def _is_stale(found: _Found) -> bool:
    """Whether the owner of a lease has ended, as far as can be known from here."""
    if found.age > _STALE:
        return True
    return found.place != "" and found.place == _place() and not _is_running(found.process)


def _place() -> str:
    """Digest of what makes process numbers comparable: the machine since its start, and the container; empty elsewhere.

    Two containers of a machine have other numbers for the same process.
    """
    try:
        parts = [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    except OSError:
        return ""
    return hashlib.sha256(" ".join([platform.node(), *parts]).encode()).hexdigest()[:32]


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _ago(seconds: float) -> str:
    minutes = max(0, int(seconds // 60))
    return f"seen {amount(minutes, 'minute')} ago"
