"""Files that detectors need and the package does not bring: where they lie, and how one is put there.

They lie in `ANIMESION_DETECTORS`, or else in `animesion/detectors` of the user's data folder (`XDG_DATA_HOME`).
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit
from xml.parsers import expat

from animesion.errors import AnimesionError, UsageError
from animesion.workspace import write_atomic


@dataclass(frozen=True)
class NeededFile:
    """A file that a detector needs.

    Attributes:
        name: its name in the folder.
        sha256: of the known version.
        largest: bytes that it may have.
    """

    name: str
    sha256: str
    largest: int


NEEDED = {
    "lbp": NeededFile(
        "lbpcascade_animeface.xml", "9376d30ac38db6bda2a68b88b3b76bbd7e6aa33af47f7f5c76bc88ca75f1ce30", 8 << 20
    )
}


def folder() -> Path:
    """Where the files lie."""
    if given := os.environ.get("ANIMESION_DETECTORS"):
        return Path(given).expanduser()
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "animesion" / "detectors"


def ready(name: str) -> bool:
    """Whether a detector has the file that it needs; true for one that needs none."""
    return name not in NEEDED or (folder() / NEEDED[name].name).is_file()


def how(name: str) -> str:
    """What to do about an absent file."""
    return f"install it with: animesion detectors install {name} --from FILE|URL"


def installed(name: str) -> Path:
    """The file of a detector.

    Raises:
        UsageError: it is not there.
    """
    path = folder() / NEEDED[name].name
    if not path.is_file():
        raise UsageError(f"the detector '{name}' needs the file {NEEDED[name].name}, which is not there; {how(name)}")
    return path


def install(name: str, source: str, sha256: str = "", *, contact: str = "", allow_private: bool = False) -> Path:
    """Check a file and put it where the detector looks for it.

    Args:
        name: the detector.
        source: a path, or an http(s) URL.
        sha256: the digest that the file must have, in place of the known one.
        contact: e-mail or URL for the User-Agent; needed for a URL.
        allow_private: whether the URL may lead to this machine or its network.

    Raises:
        UsageError: the detector needs no file, or the source cannot be read or is not what is needed.
        AnimesionError: the file cannot be written.
    """
    if name not in NEEDED:
        raise UsageError(f"the detector '{name}' needs no file; those that do: {', '.join(sorted(NEEDED))}")
    needed = NEEDED[name]
    expected = (sha256 or needed.sha256).lower()
    is_url = source.startswith(("http://", "https://"))
    content = _downloaded(source, needed, contact, allow_private) if is_url else _read(source, needed)
    if (digest := hashlib.sha256(content).hexdigest()) != expected:
        raise UsageError(
            f"{source} is not {needed.name}: its SHA-256 is {digest}, not {expected}; "
            "if you trust this file, give its digest with --sha256"
        )
    _check_cascade(content, source)
    path = folder() / needed.name
    write_atomic(path, content)
    return path


def _read(source: str, needed: NeededFile) -> bytes:
    try:
        with Path(source).expanduser().open("rb") as file:
            content = file.read(needed.largest + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{source} cannot be read: {reason.lower()}; give a file or an http(s) URL") from None
    if len(content) > needed.largest:
        raise UsageError(f"{source} is not {needed.name}: it has more than {needed.largest:,} bytes")
    return content


def _downloaded(url: str, needed: NeededFile, contact: str, allow_private: bool) -> bytes:
    from animesion_scrapers import Download, ScraperError, download_all

    if not contact:
        raise UsageError(f"downloading {needed.name} needs --contact: an e-mail or URL by which its host can reach you")
    try:
        [got] = download_all(
            [Download(needed.name, url)],
            user_agent=f"animesion/{version('animesion')} ({contact})",
            max_bytes=needed.largest,
            allow_private=allow_private,
        )
    except ScraperError as error:
        raise UsageError(f"{url}: {error}") from None
    if got.status != "ok":
        raise UsageError(f"{urlsplit(url).hostname}: {got.status} {got.detail}".rstrip() + f" ({needed.name})")
    return got.content


def _check_cascade(content: bytes, source: str) -> None:
    """Refuse what is no cascade; OpenCV reads it in a process of its own first, as its reader may not survive."""
    parser = expat.ParserCreate()
    names: list[str] = []
    parser.StartElementHandler = lambda name, _: names.append(name) if len(names) < 2 else None
    parser.StartDoctypeDeclHandler = _refuse_doctype
    try:
        parser.Parse(content, True)
    except (expat.ExpatError, ValueError) as error:
        raise UsageError(f"{source} is no OpenCV cascade: {error}") from None
    if names != ["opencv_storage", "cascade"]:
        raise UsageError(f"{source} is no OpenCV cascade: it holds <{'><'.join(names)}>")
    script = (
        "import sys, cv2; c = cv2.CascadeClassifier(); f = cv2.FileStorage(sys.stdin.read(), "
        "cv2.FILE_STORAGE_READ | cv2.FILE_STORAGE_MEMORY); sys.exit(0 if c.read(f.getFirstTopLevelNode()) else 3)"
    )
    done = subprocess.run([sys.executable, "-c", script], input=content, capture_output=True, timeout=120)
    if b"No module named 'cv2'" in done.stderr:
        raise AnimesionError("checking a cascade needs OpenCV; install it with: pip install 'animesion[detect]'")
    if done.returncode:
        raise UsageError(f"{source} is no cascade that OpenCV can read")


def _refuse_doctype(*_: object) -> None:
    raise ValueError("it declares a document type")
