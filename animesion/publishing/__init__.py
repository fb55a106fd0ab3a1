"""Send a built dataset to where others load it from: what is sent, whether it may be, and the proof that it arrived.

What a destination can do stands in `hub` (Hugging Face) and `cloud` (folders and object stores); here is the course of
events that all have in common: judge, compare with what is there, send the rest, read back, tag.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from animesion.dataset.dataset import Dataset
from animesion.errors import AnimesionError, UsageError
from animesion.progress import Progress
from animesion.storage import checksums, stores
from animesion.storage.checksums import CHECKSUMS
from animesion.storage.stores import shown
from animesion.storage.workspace import sha256_file
from animesion.verification.checks import CHECKS, Report

#: Sent after everything else, in this order: a copy without them is no dataset, so half a copy is never taken for one.
LAST = ("README.md", "dataset.json", CHECKSUMS)

#: Names of shards as builds write them: a reader that is told `data/train-*.tar` loads all of these.
SHARD = re.compile(r"data/(?:train|val|test)-\d{5}\.tar")

TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class File:
    """One file that is sent.

    Attributes:
        name: path below the destination, with slashes.
        path: where it lies here.
        bytes: its size.
        sha256: of its content as it is now.
    """

    name: str
    path: Path
    bytes: int
    sha256: str


class Destination(Protocol):
    """A place that takes files."""

    #: the address, fit to be printed
    url: str

    def refusal(self, tag: str, changes: bool) -> str:
        """Why nothing may be sent there, one sentence; empty when it may. Changes nothing there.

        Args:
            tag: name that the revision is to get, empty for none.
            changes: whether something is to be sent or taken away.
        """

    def prepare(self) -> None:
        """Make the place if it is not there."""

    def present(self, files: Sequence[File]) -> set[str]:
        """Names of the files that are there already with the same bytes."""

    def stale(self, files: Sequence[File]) -> list[str]:
        """Names of shards that are there, are not among the files, and are taken away when the rest is sent."""

    def send(self, files: Sequence[File], stale: Sequence[str], message: str, progress: Progress) -> None:
        """Send files in their order; the last ones become visible last."""

    def faults(self, files: Sequence[File]) -> list[str]:
        """One sentence for each file that is not there with its size and SHA-256."""

    def tag(self, name: str) -> None:
        """Give what was sent a name that stays."""


@dataclass
class Publication:
    """What a publication did, or would do.

    Attributes:
        url: the destination.
        files: all of the dataset, in the order in which they are sent.
        present: names of those that were there already.
        stale: names of old shards that are taken away.
        forced: faults that were passed over, by check.
        tag: name of the revision, empty for none.
    """

    url: str
    files: list[File]
    present: set[str]
    stale: list[str]
    forced: dict[str, int] = field(default_factory=dict)
    tag: str = ""

    @property
    def sent(self) -> list[File]:
        """The files that were not there."""
        return [file for file in self.files if file.name not in self.present]


def destination(url: str, *, private: bool = False) -> Destination:
    """The destination of an address.

    Args:
        url: `hf://user/name`, `s3://bucket/prefix`, `gs://bucket/prefix` or `file:///folder`.
        private: on the Hub, a repository that only its owners see.

    Raises:
        UsageError: an address of no known kind, or what it needs is not installed.
    """
    scheme, found, rest = url.partition("://")
    if not found or scheme not in ("hf", *stores.SCHEMES):
        raise UsageError(f"{shown(url)} is no destination: give hf://user/name, s3://bucket/prefix or file:///folder")
    stores.refuse_secrets(url)
    if scheme == "hf":
        from animesion.publishing.hub import Hub

        return Hub(rest, private=private)
    if private:
        raise UsageError(f"--private is for hf:// destinations: who may read {shown(url)} is set where it lies")
    from animesion.publishing.object_store import ObjectStore

    return ObjectStore(url)


def files_of(folder: Path) -> list[File]:
    """The files of a folder that its `SHA256SUMS` lists, and that file, in the order in which they are sent.

    Raises:
        UsageError: a file is missing, or leads out of the folder.
    """
    root = folder.resolve()
    found = []
    for name in [*sorted(checksums.read(folder).keys() - set(LAST)), *LAST]:
        path = folder / name
        if not path.is_file():
            if name in LAST and name == "dataset.json" and (folder / "urls").is_dir():
                continue  # tables of URLs are no dataset to open
            raise UsageError(f"{path} is missing: run `animesion build` again")
        if not path.resolve().is_relative_to(root):
            raise UsageError(f"{path} is a link that leads out of the dataset: copy the file there instead")
        found.append(File(name, path, path.stat().st_size, sha256_file(path)))
    return found


def judge(report: Report, force: Collection[str]) -> dict[str, int]:
    """Whether a verified dataset may be sent.

    Args:
        report: of `animesion.verification.checks.verify`.
        force: names of checks whose faults are passed over.

    Returns:
        Number of faults passed over, by check.

    Raises:
        AnimesionError: it has other faults.
    """
    blocking = {check: faults for check, faults in report.faults.items() if faults and check not in force}
    if blocking:
        told = "; ".join(
            f"{check}: {len(faults):,} fault{'s' * (len(faults) != 1)}, such as {shown(faults[0].text, 300)}"
            for check, faults in blocking.items()
        )
        forces = " ".join(f"--force {check}" for check in blocking)
        raise AnimesionError(
            f"{report.name} is not sent ({told}): mend it (`animesion verify` lists all), or publish it as it is "
            f"with {forces}"
        )
    return {check: len(report.faults[check]) for check in CHECKS if check in force and report.faults.get(check)}


def publish(
    dataset: Dataset,
    files: Sequence[File],
    to: Destination,
    *,
    forced: dict[str, int] | None = None,
    tag: str = "",
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Publication:
    """Send what is not there yet, read back what is, tag it. A run that was killed goes on where it stopped.

    Args:
        dataset: what is published; its faults have been judged.
        files: what is sent, see `files_of`.
        to: where to.
        forced: see `judge`; the message of the publication says it.
        tag: name for the revision; empty for none.
        dry_run: send and change nothing.
        progress: told what happens.

    Raises:
        UsageError: the destination refuses the request as it is, or the tag is no name.
        AnimesionError: something did not arrive.
    """
    progress = progress or Progress()
    if tag and not TAG.fullmatch(tag):
        raise UsageError(f"--tag {shown(tag)} is no name of a revision: use letters, digits, '.', '_' and '-'")
    done = Publication(to.url, list(files), to.present(files), to.stale(files), dict(forced or {}), tag)
    if refusal := to.refusal(tag, bool(done.sent or done.stale)):
        raise UsageError(refusal)
    if dry_run:
        return done
    message = f"{dataset.name}: {len(dataset):,} samples, {len(dataset.classes):,} classes"
    if done.forced:
        passed = ", ".join(f"{count:,} of {check}" for check, count in done.forced.items())
        message += f" (faults passed over: {passed})"
    to.prepare()
    progress.started("send", None)
    if done.sent or done.stale:
        to.send(done.sent, done.stale, message, progress)
    progress.finished("send")
    progress.started("read back", None)
    if faults := to.faults(files):
        raise AnimesionError(
            f"{len(faults):,} of {len(files):,} files did not arrive whole at {to.url} ({faults[0]}): "
            "run the same command again, it sends only what differs"
        )
    progress.finished("read back")
    if tag:
        to.tag(tag)
    return done
