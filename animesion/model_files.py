"""Model files that detectors and embedders need and the package does not include: where they are, how to install one.

Those of detectors are stored in `ANIMESION_DETECTORS`, or else in `animesion/detectors` in the user's data folder
(`XDG_DATA_HOME`); those of embedders in `ANIMESION_EMBEDDERS`, or else in `animesion/embedders`.
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
from typing import Any
from urllib.parse import urlsplit
from xml.parsers import expat

from animesion.errors import AnimesionError, UsageError
from animesion.storage.workspace import sha256_file, write_atomic


@dataclass(frozen=True)
class NeededFile:
    """A file that a detector or an embedder needs.

    Attributes:
        name: its name in the folder.
        largest: its maximum size in bytes.
        modules: the modules that read it; one is enough.
        extra: the extra of this package that installs them.
        reader: the class that is tested with it, `module:class`.
        sha256: digest of the known version; empty if users bring their own file.
        kind: what needs it, `detector` or `embedder`.
    """

    name: str
    largest: int
    modules: tuple[str, ...]
    extra: str
    reader: str
    sha256: str = ""
    kind: str = "detector"


NEEDED = {
    "lbp": NeededFile(
        "lbpcascade_animeface.xml",
        8 << 20,
        ("cv2",),
        "detect",
        "animesion.detectors.lbp:LbpCascade",
        "9376d30ac38db6bda2a68b88b3b76bbd7e6aa33af47f7f5c76bc88ca75f1ce30",
    ),
    "onnx": NeededFile("detector.onnx", 512 << 20, ("onnxruntime",), "detect", "animesion.detectors.onnx:OnnxDetector"),
    "sscd": NeededFile(
        "sscd.model", 512 << 20, ("torch", "onnxruntime"), "train", "animesion.pipeline.sscd:Sscd", kind="embedder"
    ),
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
    reader = getattr(importlib.import_module(module), name)()
    images = [Image.effect_noise((160, 120), 90).convert("RGB")]
    reader(images, [None]) if sys.argv[3] == "detector" else reader(images)
except AnimesionError as error:
    print(error)
    sys.exit(3)
"""


def folder(kind: str) -> Path:
    """The folder of the files of a kind, `detector` or `embedder`."""
    if given := os.environ.get(_variable(kind)):
        return Path(given).expanduser()
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "animesion" / f"{kind}s"


def _variable(kind: str) -> str:
    return f"ANIMESION_{kind.upper()}S"


def setup_hint(name: str) -> str:
    """What to install before a detector or an embedder can run, one sentence; empty if nothing is missing."""
    if name == "imgutils" and not _importable("imgutils"):
        return f"install dghs-imgutils with: {IMGUTILS}"
    if name not in NEEDED:
        return ""
    needed = NEEDED[name]
    if not any(map(_importable, needed.modules)):
        return f"install {' or '.join(needed.modules)} with: pip install 'animesion[{needed.extra}]'"
    return "" if (folder(needed.kind) / needed.name).is_file() else install_hint(name)


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # the module is blocked: `sys.modules[module]` is None
        return False


def install_hint(name: str) -> str:
    """How to replace a missing or damaged file, one sentence."""
    return f"install it with: animesion {NEEDED[name].kind}s install {name} --from FILE|URL"


def path_of(name: str) -> Path:
    """Path of the file of a detector or an embedder.

    Raises:
        UsageError: it is not installed.
    """
    needed = NEEDED[name]
    path = folder(needed.kind) / needed.name
    if not path.is_file():
        raise UsageError(
            f"the {needed.kind} '{name}' needs the file {needed.name}, which is not installed; {install_hint(name)}"
        )
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


def install(
    name: str,
    source: str,
    sha256: str = "",
    *,
    kind: str = "detector",
    contact: str = "",
    allow_private: bool = False,
) -> Path:
    """Check a file, test what needs it in a subprocess, and copy it to the folder of the files.

    Args:
        name: the detector or embedder.
        source: a path or an https URL.
        sha256: expected digest, instead of the known one; required for a URL if no digest is known.
        kind: `detector` or `embedder`.
        contact: e-mail or URL for the User-Agent; required for a URL.
        allow_private: whether the URL may point to this machine or its network, also over plain http.

    Returns:
        Path of the installed file.

    Raises:
        UsageError: none of that name needs a file, or the source cannot be read or is not the needed file.
        AnimesionError: the file cannot be written.
    """
    names = sorted(each for each, needed in NEEDED.items() if needed.kind == kind)
    if name not in names:
        raise UsageError(f"the {kind} '{name}' needs no file; those that do: {', '.join(names)}")
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
    path = folder(needed.kind) / needed.name
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
    """Run the detector or embedder on one image in a subprocess, as a damaged file may crash a native reader."""
    with tempfile.TemporaryDirectory(prefix="animesion-") as trial:
        path = Path(trial) / needed.name
        write_atomic(path, content)
        try:
            done = subprocess.run(
                [sys.executable, "-c", _TRIAL, needed.reader, str(_TRIAL_BYTES), needed.kind],
                env=os.environ | {_variable(needed.kind): trial},
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
        reader = " or ".join(needed.modules)
        raise UsageError(f"{source} cannot be used: {reader} failed on it (exit status {done.returncode})")


def onnx_session(path: Path, user: str, device: str = "cpu") -> Any:
    """Load a network in ONNX form.

    Args:
        path: the file.
        user: what needs it, such as `the detector 'onnx'`.
        device: `cpu` or `cuda`.

    Raises:
        UsageError: onnxruntime is missing, the file is not a network, or there is no GPU.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UsageError(
            f"{user} needs onnxruntime, which is not installed; install it with: pip install 'animesion[detect]'"
        ) from None
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1  # worker processes already use every core
    settings.log_severity_level = 4
    try:
        if provider in onnxruntime.get_available_providers():
            session = onnxruntime.InferenceSession(str(path), settings, providers=[provider])
            if provider in session.get_providers():  # without the CUDA libraries it silently falls back to the CPU
                return session
    except Exception as error:  # onnxruntime's own classes, which differ by version
        raise UsageError(f"{path} is not a network that onnxruntime can load: {first_line(error)}") from None
    raise UsageError(f"device 'cuda' of {user} needs a GPU and onnxruntime-gpu; leave the option out to use the CPU")


def first_line(error: Exception) -> str:
    """The first line of an error of another library, at most 300 characters."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]
