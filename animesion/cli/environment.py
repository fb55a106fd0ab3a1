"""What is installed and what works on this machine: for `animesion --version` and `animesion doctor`.

Versions are read from package metadata, so that nothing heavy is imported to tell them. A check tries the thing itself.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec
from pathlib import Path

#: Extra -> what it is for.
EXTRAS = {
    "train": "train, eval, predict, study, profile and export models",
    "export": "write ONNX files",
    "detect": "find faces with OpenCV's cascade or a YOLO file",
    "hub": "publish to the Hugging Face Hub",
    "cloud": "read and write s3:// and gs://",
    "ray": "build on several machines",
}

_KEY = ("pillow", "numpy", "pyarrow", "torch", "timm", "webdataset", "huggingface_hub")
_FREE_BYTES = 1 << 30


@dataclass(frozen=True)
class CheckResult:
    """One thing that was looked at.

    Attributes:
        what: what it is.
        state: `ok`, `missing` for something optional, or `broken` for something that every build needs.
        told: version or reason, one sentence at most.
        mend: the one command or step that puts it right, empty when nothing is wrong.
    """

    what: str
    state: str
    told: str = ""
    mend: str = ""


def described() -> str:
    """Version, Python, platform and key libraries, as a bug report wants them."""
    python = f"Python {platform.python_version()} ({platform.python_implementation()})"
    lines = [f"animesion {version('animesion')}", f"{python}, {platform.system()} {platform.release()} {_machine()}"]
    return "\n".join([*lines, ", ".join(f"{name} {_version(name) or 'not installed'}" for name in _KEY)])


def examine() -> list[CheckResult]:
    """Look at everything; takes some seconds, needs no network and leaves nothing behind."""
    found = [CheckResult("Python", "ok", f"{platform.python_version()} on {platform.system()} {_machine()}")]
    found += _packages()
    found += [_tried(what, check) for what, check in _CHECKS.items()]
    return [*found, _accelerator(), _hub_token()]


def requirements(extra: str = "") -> dict[str, str]:
    """Distribution name -> version range that animesion, or one of its extras, asks for."""
    found = {}
    for line in requires("animesion") or []:
        text, _, marker = line.partition(";")
        named = re.search(r"extra\s*==\s*['\"]([^'\"]+)", marker)
        parts = re.match(r"\s*([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*\(?([^)]*)\)?", text)
        if parts and (named[1] if named else "") == extra:
            found[parts[1]] = parts[2].strip()
    return found


def _packages() -> list[CheckResult]:
    found = []
    lacking = _lacking("")
    count = len(requirements())
    if lacking:
        found.append(CheckResult("base packages", "broken", ", ".join(lacking), "pip install --upgrade animesion"))
    else:
        found.append(CheckResult("base packages", "ok", f"all {count} installed"))
    for extra, purpose in EXTRAS.items():
        if extra not in (metadata("animesion").get_all("Provides-Extra") or []):
            continue
        lacking = _lacking(extra)
        told = f"{purpose}: lacks {', '.join(lacking)}" if lacking else purpose
        mend = f"pip install 'animesion[{extra}]'" if lacking else ""
        found.append(CheckResult(f"extra {extra}", "missing" if lacking else "ok", told, mend))
    return found


def _lacking(extra: str) -> list[str]:
    """What is not installed, or is in a version that is not asked for."""
    lacking = []
    for name, wanted in requirements(extra).items():
        installed = _version(name)
        if not installed:
            lacking.append(name)
        elif not _satisfies(installed, wanted):
            lacking.append(f"{name} {wanted} (installed is {installed})")
    return lacking


def _satisfies(installed: str, wanted: str) -> bool:
    for part in filter(None, (each.strip() for each in wanted.split(","))):
        bound = re.fullmatch(r"(>=|<)\s*([0-9.]+)", part)
        if bound and (_numbers(installed) >= _numbers(bound[2])) != (bound[1] == ">="):
            return False
    return True


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:4])


def _tried(what: str, check: Callable[[], CheckResult | str]) -> CheckResult:
    try:
        found = check()
    except Exception as error:  # whatever is wrong here is what is asked for
        text = " ".join(str(error).split())[:200]
        return CheckResult(what, "broken", f"{type(error).__name__}: {text}", "pip install --force-reinstall animesion")
    return found if isinstance(found, CheckResult) else CheckResult(what, "ok", found)


def _codecs() -> str:
    import io

    from PIL import Image

    image = Image.linear_gradient("L").convert("RGB")
    for kind in ("jpeg", "png", "webp"):
        out = io.BytesIO()
        image.save(out, kind)
        Image.open(out).load()
    return "JPEG, PNG and WebP are written and read"


def _compiled_pass() -> CheckResult | str:
    from animesion.images import features

    what, why = "compiled pass over pixels", features.lacking()
    if not why:
        return "in use"
    mend = "install a C compiler and Python's headers, then animesion again"
    return CheckResult(what, "missing", f"{why}, so inspecting takes about twice as long", mend)


def _workers() -> CheckResult | str:
    from animesion.executors import cores

    # as the engine starts them: a process of its own that imports what it needs
    done = subprocess.run([sys.executable, "-c", "import animesion.executors.local"], capture_output=True, timeout=60)
    if done.returncode:
        return CheckResult("worker processes", "broken", "a second Python does not start", "pip install animesion")
    return f"{cores()} cores to use"


def _disk() -> CheckResult | str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "written"
        with path.open("wb") as file:
            file.write(b"x")
            os.fsync(file.fileno())
    free = shutil.disk_usage(Path.cwd()).free
    told = f"{free / 1e9:,.1f} GB free in this folder"
    if free < _FREE_BYTES:
        return CheckResult("disk", "missing", told, "free some space, or work in another folder")
    return told


def _plugins() -> str:
    from animesion import detectors, sources

    for name in sources.names():
        sources.source_class(name)
    for name in detectors.names():
        detectors.summary(name)
    return f"{len(sources.names())} sources and {len(detectors.names())} detectors load"


def _recipes() -> str:
    from animesion.config import recipe

    names = recipe.builtin_names()
    for name in names:
        recipe.load(name)
    return f"{len(names)} built-in recipes read"


_CHECKS: dict[str, Callable[[], CheckResult | str]] = {
    "codecs": _codecs,
    "compiled pass over pixels": _compiled_pass,
    "worker processes": _workers,
    "disk": _disk,
    "sources and detectors": _plugins,
    "recipes": _recipes,
}


def _accelerator() -> CheckResult:
    if find_spec("torch") is None:
        return CheckResult("accelerator", "missing", "PyTorch is not installed", "pip install 'animesion[train]'")
    try:
        import torch

        if torch.cuda.is_available():
            return CheckResult("accelerator", "ok", f"{torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}")
    except Exception as error:  # a driver that does not fit raises anything
        return CheckResult("accelerator", "missing", f"PyTorch fails: {' '.join(str(error).split())[:150]}",
                       "pip install --force-reinstall torch")  # fmt: skip
    return CheckResult("accelerator", "missing", "no CUDA device: training runs on the processor")


def _hub_token() -> CheckResult:
    if find_spec("huggingface_hub") is None:
        return CheckResult("Hub login", "missing", "the Hub's client is not installed", "pip install 'animesion[hub]'")
    from huggingface_hub import get_token

    if get_token():
        return CheckResult("Hub login", "ok", "a token is set; it is neither shown nor tried")
    return CheckResult("Hub login", "missing", "no token, so nothing can be published to hf://", "hf auth login")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _machine() -> str:
    return platform.machine() or "unknown"
