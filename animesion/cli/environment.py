"""Versions and health checks of the installation, for `animesion --version` and `animesion doctor`.

Versions come from package metadata, so that nothing heavy is imported for them. A check uses the thing that it checks.
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

#: Extra -> its purpose.
EXTRAS = {
    "train": "train, eval, predict, study, profile and export models",
    "export": "write ONNX files",
    "detect": "find faces with OpenCV's cascade or a YOLO file",
    "hub": "publish to the Hugging Face Hub",
    "cloud": "read and write s3:// and gs://",
    "ray": "build on several machines",
    "formats": "read HEIC and JPEG XL",
    "search": "search near duplicates with faiss",
    "pandas": "open tables as data frames",
}

_KEY = ("pillow", "numpy", "pyarrow", "torch", "timm", "webdataset", "huggingface_hub")
_FREE_BYTES = 1 << 30


@dataclass(frozen=True)
class CheckResult:
    """Result of one check.

    Attributes:
        what: the part that was checked.
        state: `ok`, `missing` for something optional, or `broken` for something that every build needs.
        detail: version or reason, at most one sentence.
        mend: command or step that fixes it; empty if nothing is wrong.
    """

    what: str
    state: str
    detail: str = ""
    mend: str = ""


def version_info() -> str:
    """Version, Python, platform and key libraries, for bug reports; three lines."""
    python = f"Python {platform.python_version()} ({platform.python_implementation()})"
    lines = [f"animesion {version('animesion')}", f"{python}, {platform.system()} {platform.release()} {_machine()}"]
    return "\n".join([*lines, ", ".join(f"{name} {_version(name) or 'not installed'}" for name in _KEY)])


def examine() -> list[CheckResult]:
    """Run every check; takes some seconds, needs no network and leaves no files behind."""
    found = [CheckResult("Python", "ok", f"{platform.python_version()} on {platform.system()} {_machine()}")]
    found += _packages()
    found += [_run_check(what, check) for what, check in _CHECKS.items()]
    return [*found, _accelerator(), _hub_token()]


def requirements(extra: str = "") -> dict[str, str]:
    """Distribution name -> version range that animesion, or one of its extras, requires."""
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
    missing = _missing("")
    count = len(requirements())
    if missing:
        found.append(CheckResult("base packages", "broken", ", ".join(missing), "pip install --upgrade animesion"))
    else:
        found.append(CheckResult("base packages", "ok", f"all {count} installed"))
    for extra, purpose in EXTRAS.items():
        if extra not in (metadata("animesion").get_all("Provides-Extra") or []):
            continue
        missing = _missing(extra)
        detail = f"{purpose}: lacks {', '.join(missing)}" if missing else purpose
        mend = f"pip install 'animesion[{extra}]'" if missing else ""
        found.append(CheckResult(f"extra {extra}", "missing" if missing else "ok", detail, mend))
    return found


def _missing(extra: str) -> list[str]:
    """Required packages that are not installed, or installed in a version outside the required range."""
    missing = []
    for name, wanted in requirements(extra).items():
        installed = _version(name)
        if not installed:
            missing.append(name)
        elif not _satisfies(installed, wanted):
            missing.append(f"{name} {wanted} (installed is {installed})")
    return missing


def _satisfies(installed: str, wanted: str) -> bool:
    for part in filter(None, (each.strip() for each in wanted.split(","))):
        bound = re.fullmatch(r"(>=|<)\s*([0-9.]+)", part)
        if bound and (_numbers(installed) >= _numbers(bound[2])) != (bound[1] == ">="):
            return False
    return True


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:4])


def _run_check(what: str, check: Callable[[], CheckResult | str]) -> CheckResult:
    try:
        found = check()
    except Exception as error:  # any failure is a finding
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
    return "JPEG, PNG and WebP encode and decode"


def _compiled_pass() -> CheckResult | str:
    from animesion.images import features

    what, why = "compiled pixel pass", features.lacking()
    if not why:
        return "in use"
    mend = "install a C compiler and the Python headers, then reinstall animesion"
    return CheckResult(what, "missing", f"{why}, so inspecting takes about twice as long", mend)


def _compiled_joins() -> CheckResult | str:
    from animesion.dedup import joins

    if joins.compiled is not None:
        return "in use"
    mend = "install a C compiler and the Python headers, then reinstall animesion"
    why = "it was not compiled at installation, so copies take about ten times as long to find"
    return CheckResult("compiled search for copies", "missing", why, mend)


def _workers() -> CheckResult | str:
    from animesion.executors import cores

    # as the engine starts workers: a new process that imports what it needs
    done = subprocess.run([sys.executable, "-c", "import animesion.executors.local"], capture_output=True, timeout=60)
    if done.returncode:
        return CheckResult(
            "worker processes", "broken", "a child Python process does not start", "pip install animesion"
        )
    return f"{cores()} cores available"


def _disk() -> CheckResult | str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "written"
        with path.open("wb") as file:
            file.write(b"x")
            os.fsync(file.fileno())
    free = shutil.disk_usage(Path.cwd()).free
    detail = f"{free / 1e9:,.1f} GB free in this folder"
    if free < _FREE_BYTES:
        return CheckResult("disk", "missing", detail, "free some space, or work in another folder")
    return detail


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
    return f"{len(names)} built-in recipes load"


_CHECKS: dict[str, Callable[[], CheckResult | str]] = {
    "codecs": _codecs,
    "compiled pixel pass": _compiled_pass,
    "compiled search for copies": _compiled_joins,
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
    except Exception as error:  # a driver of the wrong version may raise anything
        return CheckResult("accelerator", "missing", f"PyTorch fails: {' '.join(str(error).split())[:150]}",
                       "pip install --force-reinstall torch")  # fmt: skip
    return CheckResult("accelerator", "missing", "no CUDA device: training runs on the CPU")


def _hub_token() -> CheckResult:
    if find_spec("huggingface_hub") is None:
        return CheckResult("Hub login", "missing", "the Hub's client is not installed", "pip install 'animesion[hub]'")
    from huggingface_hub import get_token

    if get_token():
        return CheckResult("Hub login", "ok", "a token is set (not shown, not tested)")
    return CheckResult("Hub login", "missing", "no token: publishing to hf:// needs one", "hf auth login")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _machine() -> str:
    return platform.machine() or "unknown"
