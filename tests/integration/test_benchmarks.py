"""The benchmarks still run: each loads, and those that need no data run on little. Their figures do not matter here."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SHARED = {"alterations", "metered"}  # what several benchmarks measure
NAMES = sorted({path.stem for path in FOLDER.glob("*.py")} - SHARED)


def test_there_are_benchmarks() -> None:
    assert {"curate_scale", "inspect_throughput", "pair_search"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_loads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))  # some share their images
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert callable(module.main)


@pytest.mark.parametrize(
    ("command", "printed"),
    [
        (("dump_listing.py", "--rows", "600", "--rounds", "1"), r"sha256 of the 2 plans: [0-9a-f]{64}"),
        (("curate_scale.py", "--images", "3000"), r"kept [\d,]+ of 3,000, clusters [1-9]"),
        (
            ("inspect_throughput.py", "--large", "1", "--rounds", "1", "--faces", "no-such.tar"),
            r"inspect: decode, hashes, quality +\d+ +\d\.\d\d\n",
        ),
    ],
)
def test_a_benchmark_runs(command: tuple[str, ...], printed: str) -> None:
    done = subprocess.run(
        [sys.executable, FOLDER / command[0], *command[1:]], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert re.search(printed, done.stdout), done.stdout
