"""Model files that detectors need and the package does not include: where they are stored and how to install one.

They are stored in `ANIMESION_DETECTORS`, or else in `animesion/detectors` in the user's data folder (`XDG_DATA_HOME`).
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit
from xml.parsers import expat

from animesion.errors import AnimesionError, UsageError
from animesion.storage.workspace import sha256_file, write_atomic


@dataclass(frozen=True)
class NeededFile:
    """A file that a detector needs.

    Attributes:
        name: its name in the folder.
        largest: its maximum size in bytes.
        module: the module that reads it.
        detector: the class that is tested with it, `module:class`.
        sha256: digest of the known version; empty if users bring their own file.
    """

    name: str
    largest: int
    module: str
    detector: str
    sha256: str = ""


NEEDED = {
    "lbp": NeededFile(
        "lbpcascade_animeface.xml",
        8 << 20,
        "cv2",
        "animesion.detectors.lbp:LbpCascade",
        "9376d30ac38db6bda2a68b88b3b76bbd7e6aa33af47f7f5c76bc88ca75f1ce30",
    ),
    "onnx": NeededFile("detector.onnx", 512 << 20, "onnxruntime", "animesion.detectors.onnx:OnnxDetector"),
}

#: Command that installs dghs-imgutils; `--no-deps` because it requires NumPy 1, although it runs with NumPy 2.
IMGUTILS = "pip install 'animesion[imgutils]' && pip install --no-deps 'dghs-imgutils>=0.19,<0.20'"

_TRIAL_SECONDS, _TRIAL_BYTES = 120, 8 << 30

_TRIAL = """
import importlib, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
from PIL import Image
from animesion.errors import AnimesionError
module, _, name = sys.argv[1].partition(":")
try:
    detector = getattr(importlib.import_module(module), name)()
    detector([Image.effect_noise((160, 120), 90).convert("RGB")], [None])
except AnimesionError as error:
    print(error)
    sys.exit(3)
"""


def folder() -> Path:
    """The folder of the files."""
    if given := os.environ.get("ANIMESION_DETECTORS"):
        return Path(given).expanduser()
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "animesion" / "detectors"


def setup_hint(name: str) -> str:
    """What to install before a detector can run, one sentence; empty if nothing is missing."""
    if name == "imgutils" and not _importable("imgutils"):
        return f"install dghs-imgutils with: {IMGUTILS}"
    if name not in NEEDED:
        return ""
    if not _importable(NEEDED[name].module):
        return f"install {NEEDED[name].module} with: pip install 'animesion[detect]'"
    return "" if (folder() / NEEDED[name].name).is_file() else install_hint(name)


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # the module is blocked: `sys.modules[module]` is None
        return False


def install_hint(name: str) -> str:
    """How to replace a missing or damaged file, one sentence."""
    return f"install it with: animesion detectors install {name} --from FILE|URL"


def path_of(name: str) -> Path:
    """Path of a detector's file.

    Raises:
        UsageError: it is not installed.
    """
    path = folder() / NEEDED[name].name
    if not path.is_file():
        needed = NEEDED[name].name
        raise UsageError(f"the detector '{name}' needs the file {needed}, which is not installed; {install_hint(name)}")
    return path


def digest(path: Path) -> str:
    """SHA-256 of a file as hex; cached until its size or modification time changes.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        known = path.stat()
        return _digest(path, known.st_size, known.st_mtime_ns)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from None


@lru_cache(maxsize=8)  # size and modification time are part of the key, so a replaced file is read again
def _digest(path: Path, size: int, changed: int) -> str:
    return sha256_file(path)


def install(name: str, source: str, sha256: str = "", *, contact: str = "", allow_private: bool = False) -> Path:
    """Check a file, test the detector with it in a subprocess, and copy it to the folder of the files.

    Args:
        name: the detector.
        source: a path or an https URL.
        sha256: expected digest, instead of the known one; required for a URL if no digest is known.
        contact: e-mail or URL for the User-Agent; required for a URL.
        allow_private: whether the URL may point to this machine or its network, also over plain http.

    Returns:
        Path of the installed file.

    Raises:
        UsageError: the detector needs no file, or the source cannot be read or is not the needed file.
        AnimesionError: the file cannot be written.
    """
    if name not in NEEDED:
        raise UsageError(f"the detector '{name}' needs no file; those that do: {', '.join(sorted(NEEDED))}")
    needed = NEEDED[name]
    if sha256 and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise UsageError(f"--sha256 takes the 64 hexadecimal digits of a SHA-256, not '{sha256:.80}'")
    expected = (sha256 or needed.sha256).lower()
    if re.match(r"(?i)[a-z][a-z0-9+.-]*://", source):
        content = _downloaded(source, needed, expected, contact, allow_private)
    else:
        content = _read(source, needed)
    if expected and (found := hashlib.sha256(content).hexdigest()) != expected:
        raise UsageError(
            f"{source} is not {needed.name}: its SHA-256 is {found}, not {expected}; "
            "if you trust this file, give its digest with --sha256"
        )
    if needed.name.endswith(".xml"):
        _check_xml(content, source)
    _test_run(needed, content, source)
    path = folder() / needed.name
    write_atomic(path, content)
    return path


def _read(source: str, needed: NeededFile) -> bytes:
    try:
        with Path(source).expanduser().open("rb") as file:
            content = file.read(needed.largest + 1)
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{source} cannot be read: {reason.lower()}; give a file or an https URL") from None
    if len(content) > needed.largest:
        raise UsageError(f"{source} is not {needed.name}: it has more than {needed.largest:,} bytes")
    return content


def _downloaded(url: str, needed: NeededFile, expected: str, contact: str, allow_private: bool) -> bytes:
    from animesion_scrapers import Download, ScraperError, download_all

    try:
        scheme, host = urlsplit(url).scheme, urlsplit(url).hostname
    except ValueError:
        raise UsageError(f"{url} is not a URL; give a file or an https URL") from None
    if scheme != "https" and not (scheme == "http" and allow_private):
        raise UsageError(f"{needed.name} is downloaded over https only, not from {url}")
    if not expected:
        raise UsageError(f"downloading {needed.name} needs --sha256: the digest that its publisher states")
    if not contact:
        raise UsageError(
            f"downloading {needed.name} needs --contact: an e-mail or URL under which its host can reach you"
        )
    try:
        [got] = download_all(
            [Download(needed.name, url)],
            user_agent=f"animesion/{version('animesion')} ({contact})",
            max_bytes=needed.largest,
            deadline=900.0,
            allow_private=allow_private,
        )
    except ScraperError as error:
        raise UsageError(f"{url}: {error}") from None
    if got.status != "ok":
        raise UsageError(f"{host}: {got.status} {got.detail}".rstrip() + f" ({needed.name})")
    return got.content


def _check_xml(content: bytes, source: str) -> None:
    """Refuse anything but a cascade, and any XML with a document type, before OpenCV reads it."""
    parser = expat.ParserCreate()
    names: list[str] = []
    parser.StartElementHandler = lambda name, _: names.append(name) if len(names) < 2 else None
    parser.StartDoctypeDeclHandler = _refuse_doctype
    try:
        parser.Parse(content, True)
    except (expat.ExpatError, ValueError) as error:
        raise UsageError(f"{source} is not an OpenCV cascade: {error}") from None
    if names != ["opencv_storage", "cascade"]:
        raise UsageError(f"{source} is not an OpenCV cascade: it holds <{'><'.join(names)}>")


def _refuse_doctype(*_: object) -> None:
    raise ValueError("it declares a document type")


def _test_run(needed: NeededFile, content: bytes, source: str) -> None:
    """Run the detector on one image in a subprocess, as a damaged file may crash a native reader."""
    with tempfile.TemporaryDirectory(prefix="animesion-") as trial:
        path = Path(trial) / needed.name
        write_atomic(path, content)
        try:
            done = subprocess.run(
                [sys.executable, "-c", _TRIAL, needed.detector, str(_TRIAL_BYTES)],
                env=os.environ | {"ANIMESION_DETECTORS": trial},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_TRIAL_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise UsageError(f"{source} cannot be used: one image took more than {_TRIAL_SECONDS} s") from None
        except OSError as error:
            raise AnimesionError(f"{source} cannot be tested: {(error.strerror or str(error)).lower()}") from None
    if done.returncode == 3:
        message = done.stdout.decode(errors="replace").strip()
        raise UsageError(message.replace(str(path), source))
    if done.returncode:
        raise UsageError(f"{source} cannot be used: {needed.module} failed on it (exit status {done.returncode})")
