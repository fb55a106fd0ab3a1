"""Remove images from a built dataset on request: from its shards, its tables, and the files that describe it.

`removal_plan` finds out what goes, and `removal_files` writes the new files into a hidden folder inside the dataset.
Then a plan of the moves is written, and carried out here. So a process that is killed leaves the old dataset, or one
without `dataset.json`, which `finished` completes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from animesion.dataset.dataset import Dataset
from animesion.errors import BusyError, UsageError
from animesion.pipeline import removal_files
from animesion.pipeline.removal_plan import STAGE, Image, Plan, Request
from animesion.storage import checksums, names
from animesion.storage.workspace import full_disk_is_clear, write_atomic

#: The plan of the moves, which is written when all new files are there.
_MOVES = f"{STAGE}/moves.json"

_RECEIPT = re.compile(r"\.receipts/[a-z]+(?:/[A-Za-z0-9._-]+)?\.json")
_NOTE = 300


@dataclass(frozen=True)
class Finished:
    """A removal that had been interrupted: what it changed, and whether the same was asked for again."""

    plan: Plan
    repeated: bool


def finished(root: Path, what: Sequence[str] = (), authors: Sequence[str] = ()) -> Finished | None:
    """Complete a removal that was interrupted, or clear one that had changed nothing.

    Args:
        root: the dataset's folder.
        what: the images that are asked for now, see `remove`.
        authors: likewise.

    Returns:
        What was completed; None if nothing had to be.

    Raises:
        UsageError: the folder has a link in it, or a plan that no removal wrote.
        BusyError: another process uses the folder.
    """
    if not root.joinpath(STAGE).exists():
        return None
    names.refuse_links(root)
    with _locked(root):
        if not root.joinpath(_MOVES).is_file():
            shutil.rmtree(root / STAGE)
            return None
        moves = _read_moves(root)
        _move(root, moves)
        plan = Plan(**{**moves["plan"], "images": [Image(**each) for each in moves["plan"]["images"]]})
        return Finished(plan, moves["request"] == _request(what, authors))


def remove(
    root: Path, what: Sequence[str], authors: Sequence[str] = (), *, note: str = "", dry_run: bool = False
) -> Plan:
    """Remove images and their copies.

    Args:
        root: the output folder of a build, or a copy of a published dataset.
        what: keys, numbers at the source, URLs of pages or files, or digests.
        authors: authors, all of whose images go.
        note: a line for the log.
        dry_run: change nothing.

    Raises:
        UsageError: nothing is asked for; an image is unknown, or named by what several have in common; the dataset is
            damaged; or nothing would be left.
        BusyError: another process uses the folder.
        FullDiskError: no space is left; the dataset is as it was.
    """
    if not what and not authors:
        raise UsageError("nothing to remove: name images by id, URL or digest, or an author with --author")
    if len(note) > _NOTE or not names.is_text(note):
        raise UsageError(f"--note is for one line of up to {_NOTE} characters: shorten it")
    if root.joinpath(_MOVES).exists():
        raise UsageError(f"{root} has an interrupted removal: run the command again without --dry-run")
    dataset = Dataset(root)
    names.refuse_links(root)
    with contextlib.nullcontext() if dry_run else _locked(root):
        request = Request(dataset, what, authors)
        plan = request.plan()
        if dry_run:
            return plan
        try:
            with full_disk_is_clear(root):
                moves = removal_files.write(request, plan, note)
        except BaseException:
            shutil.rmtree(root / STAGE, ignore_errors=True)
            raise
        moves["request"] = _request(what, authors)
        write_atomic(root / _MOVES, json.dumps(moves).encode())
        _move(root, moves)
    return plan


def _move(root: Path, moves: Mapping[str, Any]) -> None:
    """Carry out the moves, or what is left of them: `dataset.json` and `SHA256SUMS` go first and come last."""
    for name in checksums.SEALS:
        if (root / removal_files.NEW / name).exists():  # else the new one is there already
            (root / name).unlink(missing_ok=True)
    last = [name for name in checksums.SEALS if name in moves["replace"]]
    for name in moves["delete"]:
        (root / name).unlink(missing_ok=True)
    for name in [*(name for name in moves["replace"] if name not in last), *last]:
        source = root / removal_files.NEW / name
        if source.exists():  # else it was moved before the interruption
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            source.replace(root / name)
    (root / _MOVES).unlink()
    shutil.rmtree(root / STAGE)


def _read_moves(root: Path) -> dict[str, Any]:
    """The plan of the moves.

    Raises:
        UsageError: it is not one that a removal writes.
    """
    path = root / _MOVES
    try:
        moves = json.loads(path.read_bytes())
        listed = [*moves["replace"], *moves["delete"]]
        proper = all(isinstance(name, str) and (names.is_path(name) or _RECEIPT.fullmatch(name)) for name in listed)
        Plan(**{**moves["plan"], "images": [Image(**each) for each in moves["plan"]["images"]]})
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        proper = False
    if not proper or not isinstance(moves.get("request"), str):
        raise UsageError(f"{path} is damaged: delete {path.parent}, and run `animesion build` again")
    return dict(moves)


def _request(what: Sequence[str], authors: Sequence[str]) -> str:
    """A digest of what is asked for, so that the plan on disk does not have it."""
    return hashlib.sha256(repr((sorted(what), sorted(authors))).encode()).hexdigest()


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Keep builds and other removals out of the folder.

    Raises:
        BusyError: another process is there.
    """
    made = not root.joinpath(".receipts").is_dir()
    folder = root if made else root / ".receipts"
    lock = FileLock(folder / ("." + STAGE[1:] + ".lock" if made else "lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError(f"{root} is in use by a build or another removal: wait for it") from None
    try:
        yield
    finally:
        lock.release()
        if made:
            Path(lock.lock_file).unlink(missing_ok=True)
