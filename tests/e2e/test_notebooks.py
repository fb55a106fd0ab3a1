"""The notebooks of the documentation run, and what they store is what they show."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .pages import ROOT

NOTEBOOK = ROOT / "docs" / "first-steps.ipynb"


def kinds(cell: dict[str, Any]) -> list[list[str]]:
    """The media types of each output of a cell."""
    return [sorted(output.get("data", {"text": None})) for output in cell.get("outputs", ())]


@pytest.mark.slow
def test_the_first_steps_run_and_show_what_is_stored(small_build: Path, tmp_path: Path) -> None:
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "daf-re-sample").symlink_to(small_build)
    copy = tmp_path / NOTEBOOK.name
    copy.write_bytes(NOTEBOOK.read_bytes())
    command = [sys.executable, str(ROOT / "docs" / "notebooks.py"), copy.name, "--write"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    stored, shown = (json.loads(path.read_bytes())["cells"] for path in (NOTEBOOK, copy))
    assert [kinds(cell) for cell in shown] == [kinds(cell) for cell in stored]

    text = {cell["id"]: "".join(o.get("text", [""])[0] for o in cell.get("outputs", ())) for cell in shown}
    printed = "".join("".join(o["text"]) for cell in shown for o in cell.get("outputs", ()) if "text" in o)
    assert any(text.values())
    assert "torch.Size([16, 3, 64, 64]) torch.float32" in printed
    assert re.search(r"[1-9][0-9]* steps, validation accuracy [0-9]+% after epoch [12]", printed)
    guesses = re.findall(r"^images/(?!broken).*: .* \d+%, .* \d+%, .* \d+%$", printed, re.MULTILINE)
    assert len(guesses) == 2
    [broken] = re.findall(r"^images/broken.jpg: (.*)$", printed, re.MULTILINE)
    assert "%" not in broken


def test_notebooks_are_small_and_hold_no_state() -> None:
    assert NOTEBOOK.stat().st_size < 300_000
    for cell in json.loads(NOTEBOOK.read_bytes())["cells"]:
        assert cell["metadata"] == {}
        assert cell.get("execution_count") is None
        if cell["cell_type"] == "code":
            assert "".join(cell["source"]).strip()
