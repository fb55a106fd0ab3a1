"""Publish a built dataset: check its faults, send the files that the destination lacks, verify them, tag the revision.

These steps are the same for all destinations. `base` has the shared types, `hub` (Hugging Face) and `object_store`
(folders and buckets) implement the destinations.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from animesion.config.settings import nearest
from animesion.dataset.dataset import Dataset
from animesion.errors import AnimesionError, UsageError
from animesion.progress import Progress
from animesion.publishing.base import LAST, Destination, File, Gate, Publication
from animesion.storage import checksums, names, stores
from animesion.storage.stores import shown
from animesion.storage.workspace import sha256_file
from animesion.verification.checks import CHECKS, Report
from animesion.wording import amount

__all__ = ["Destination", "File", "Publication", "destination", "files_of", "judge", "publish"]

TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def destination(url: str, *, private: bool = False, gate: Gate = "off") -> Destination:
    """Create the destination for a URL.

    Args:
        url: `hf://user/name`, `s3://bucket/prefix`, `gs://bucket/prefix` or `file:///folder`.
        private: whether the Hub repository must be private.
        gate: `card.gate.access` of the recipe, for the Hub repository.

    Raises:
        UsageError: the URL is not supported, or a package that it needs is not installed.
    """
    scheme, found, rest = url.partition("://")
    if not found and url and not url.startswith("-"):
        raise UsageError(f"{shown(url)} is not a destination: for a folder give {shown(Path(url).absolute().as_uri())}")
    if not found or scheme not in ("hf", *stores.SCHEMES):
        raise UsageError(
            f"{shown(url)} is not a destination: give hf://user/name, s3://bucket/prefix or file:///folder"
        )
    stores.refuse_secrets(url)
    if scheme == "hf":
        from animesion.publishing.hub import Hub

        return Hub(rest, private=private, gate=gate)
    if private:
        raise UsageError(f"--private is for hf:// destinations: set the access to {shown(url)} in its own settings")
    from animesion.publishing.object_store import ObjectStore

    return ObjectStore(url)


def files_of(folder: Path) -> list[File]:
    """The files that a folder's `SHA256SUMS` lists, and that file, in the order in which they are sent.

    Raises:
        UsageError: a file is missing, or there is a link in the folder.
    """
    names.refuse_links(folder)
    found = []
    for name in [*sorted(checksums.read(folder).keys() - set(LAST)), *LAST]:
        path = folder / name
        if not path.is_file():
            if name in LAST and name == "dataset.json" and (folder / "urls").is_dir():
                continue  # tables of URLs have no dataset.json
            raise UsageError(f"{path} is missing: run `animesion build` again")
        found.append(File(name, path, path.stat().st_size, sha256_file(path)))
    return found


def check_names(force: Collection[str]) -> None:
    """Refuse names of checks that do not exist.

    Raises:
        UsageError: there is such a name.
    """
    for name in force:
        if name not in CHECKS:
            known = f"; checks are {', '.join(CHECKS)}"
            raise UsageError(f"there is no check '{shown(name)}'{nearest(name, CHECKS) or known}")


def judge(report: Report, force: Collection[str]) -> dict[str, int]:
    """Refuse a dataset with faults.

    Args:
        report: result of `animesion.verification.checks.verify`.
        force: names of checks whose faults are ignored.

    Returns:
        Number of ignored faults, by check.

    Raises:
        AnimesionError: the dataset has other faults.
    """
    blocking = {check: faults for check, faults in report.faults.items() if faults and check not in force}
    if blocking:
        summary = "; ".join(
            f"{check}: {amount(len(faults), 'fault')}, such as {shown(faults[0].text, 300)}"
            for check, faults in blocking.items()
        )
        forces = " ".join(f"--force {check}" for check in blocking)
        raise AnimesionError(
            f"{report.name} was not sent ({summary}): fix the faults (`animesion verify` lists all), or publish it "
            f"as it is with {forces}"
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
    """Send the files that a destination lacks, read all files back, and tag the revision. Resumes an interrupted run.

    Args:
        dataset: the dataset; check its faults with `judge` first.
        files: the files of the dataset, see `files_of`.
        to: the destination.
        forced: ignored faults from `judge`; the message of the publication lists them.
        tag: tag for the revision; empty for none.
        dry_run: send and change nothing.
        progress: receives the stages and their status.

    Returns:
        What was sent, or what would be sent in a dry run.

    Raises:
        UsageError: the destination refuses the publication, or the tag is invalid.
        AnimesionError: a file did not arrive.
    """
    progress = progress or Progress()
    if tag and not TAG.fullmatch(tag):
        raise UsageError(f"--tag {shown(tag)} is not a valid tag: use letters, digits, '.', '_' and '-'")
    done = Publication(to.url, list(files), to.present(files), to.stale(files), dict(forced or {}), tag)
    if refusal := to.refusal(tag, bool(done.sent or done.stale)):
        raise UsageError(refusal)
    if dry_run:
        return done
    message = f"{dataset.name}: {len(dataset):,} samples, {len(dataset.classes):,} classes"
    if done.forced:
        ignored = ", ".join(f"{count:,} of {check}" for check, count in done.forced.items())
        message += f" (ignored faults: {ignored})"
    to.prepare()
    progress.started("send", None)
    if done.sent or done.stale:
        to.send(done.sent, done.stale, message, progress)
    progress.finished("send")
    progress.started("read back", None)
    if faults := to.faults(files):
        raise AnimesionError(
            f"{len(faults):,} of {len(files):,} files did not arrive intact at {to.url} ({faults[0]}): "
            "run the same command again, it sends only the files that differ"
        )
    progress.finished("read back")
    if tag:
        to.tag(tag)
    return done
