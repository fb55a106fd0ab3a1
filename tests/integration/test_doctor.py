"""`animesion doctor`, `--version` and shell completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner

from animesion.cli import cli, environment
from animesion.cli.doctor import doctor


def findings() -> dict[str, dict[str, str]]:
    result = CliRunner().invoke(doctor, ["--json"], catch_exceptions=False)
    return {each["what"]: each for each in json.loads(result.stdout)["findings"]}


def test_a_whole_installation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_" + "doctorSecret")
    result = CliRunner().invoke(doctor, catch_exceptions=False)
    assert result.exit_code == 0
    assert "broken" not in result.stdout
    assert "doctorSecret" not in result.stdout
    assert findings()["Hub login"]["state"] == "ok"
    assert findings()["codecs"]["state"] == "ok"


def test_missing_packages_and_the_commands_that_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    real = environment._version
    monkeypatch.setattr(environment, "_version", lambda name: "" if name == "timm" else real(name))
    extra = findings()["extra train"]
    assert (extra["state"], extra["mend"]) == ("missing", "pip install 'animesion[train]'")
    assert "lacks timm" in extra["detail"]
    monkeypatch.setattr(environment, "_version", lambda name: "0.1" if name == "pillow" else real(name))
    result = CliRunner().invoke(doctor, catch_exceptions=False)
    assert result.exit_code == 1
    assert "installed is 0.1" in result.stdout


@pytest.mark.parametrize(
    ("installed", "wanted", "fits"),
    [("4.13.0", ">=4.10,<5", True), ("5.0.0", "<5,>=4.10", False), ("4.9", ">=4.10", False),
     ("2.15.0+cpu", ">=2.6", True),
     ("12.0.0", ">=12.0", True), ("3.1.5", ">=3.1.6", False)],
)  # fmt: skip
def test_versions_are_compared_by_number(installed: str, wanted: str, fits: bool) -> None:
    assert environment._satisfies(installed, wanted) is fits


def test_version_names_the_environment() -> None:
    result = CliRunner().invoke(cli, ["--version"], catch_exceptions=False)
    first, machine, libraries = result.stdout.splitlines()
    assert first == f"animesion {version('animesion')}"
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in machine
    assert f"pillow {version('pillow')}" in libraries


def test_the_shell_completes_commands_and_options() -> None:
    script = "import sys; sys.argv[0] = 'animesion'; from animesion.cli import main; main()"

    def completed(words: str) -> str:
        env = {**os.environ, "_ANIMESION_COMPLETE": "bash_complete", "COMP_WORDS": words}
        env["COMP_CWORD"] = str(len(words.split()) - 1)
        return subprocess.run(
            [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
        ).stdout

    assert "plain,publish" in completed("animesion pub")
    assert "plain,--urls-only" in completed("animesion publish --url")
