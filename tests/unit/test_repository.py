"""The repository itself: generated pages are current, promises of the README hold, imports run one way."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import animesion
from animesion.config import recipe

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("build", "recipes", "sources", "detectors", "stats", "verify", "diff", "card", "publish", "doctor")
PAPERS = ("2101.08674", "2407.12891", "2501.00243", "2409.11051", "2507.12157")
#: Images of the README have absolute addresses, so that a package index shows them.
IMAGES = "https://raw.githubusercontent.com/animesion/animesion/main/"
HEAVY = ("torch", "pandas", "pyarrow", "PIL", "numpy", "matplotlib", "aiohttp", "requests")
#: Most processor time of a quick answer, as a multiple of what its libraries take to load on this machine.
TIMES = 2
LIBRARIES = "import click, rich.console, rich.table, pydantic; type('M', (pydantic.BaseModel,), {})"
MEASURED = """
import os, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], capture_output=True, text=True, stdin=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(done.returncode, used.ru_utime + used.ru_stime)
sys.stdout.write(done.stdout + done.stderr)
"""


def run(*arguments: str) -> tuple[int, float, str]:
    """Exit status, seconds of processor time and output of an `animesion` command.

    It is measured in a process of its own, so that nothing else that this one waits for is counted.
    """
    return measured("from animesion.cli import main; main()", *arguments)


@functools.cache
def quick() -> float:
    """Most seconds of processor time of a quick answer on this machine; the slower of two measurements counts."""
    return TIMES * max(measured(LIBRARIES)[1] for _ in range(2))


def measured(script: str, *arguments: str) -> tuple[int, float, str]:
    """Exit status, seconds of processor time and output of a script."""
    command = [sys.executable, "-c", MEASURED, sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    first, _, output = done.stdout.partition("\n")
    status, seconds = first.split()
    return int(status), float(seconds), output


def files() -> list[Path]:
    """Files of the repository that are tracked or could be."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-coz", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    return [path for name in listed if name and (path := ROOT / os.fsdecode(name)).is_file()]


# -- documentation ---------------------------------------------------------------------------------------------------


def test_reference_pages_are_current() -> None:
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, text in module.render().items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, f"run docs/make_reference.py: {name} is old"


def test_cards_of_published_sets_are_current() -> None:
    from click.testing import CliRunner

    from animesion.cli.recipes import recipes
    from animesion.sources.published_facts import PUBLISHED

    for name in PUBLISHED:
        printed = CliRunner().invoke(recipes, [name, "--card"])
        assert printed.exit_code == 0, printed.output
        committed = (ROOT / "dataset_cards" / name / "README.md").read_text(encoding="utf-8")
        assert printed.stdout == committed, f"animesion recipes {name} --card > dataset_cards/{name}/README.md"
        assert f"({name}/README.md)" in (ROOT / "dataset_cards" / "README.md").read_text(encoding="utf-8")


def test_readme_has_both_commands() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert 'pip install -e ".[train,detect]" && animesion build daf-re --sample' in lines
    assert 'pip install -e ".[dev]" && pytest' in lines


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "dataset_cards/README.md"])
def test_what_the_texts_point_at_is_there(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    found = [link.removeprefix(IMAGES) for link in re.findall(r"\]\(([^)]+)\)", text)]
    links = {link.partition("#")[0] for link in found if "://" not in link}
    missing = {link for link in links if link and not (ROOT / name).parent.joinpath(link).exists()}
    named = set(re.findall(r"`((?:tests|docs|animesion|\.github|\.ci)/[\w./-]+\w)`", text))
    assert not missing | {path for path in named if not (ROOT / path).exists()}


@pytest.mark.parametrize("name", ["README.md", "dataset_cards/README.md"])
def test_sections_that_the_texts_link_to_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    missing = []
    for page, anchor in re.findall(r"\]\(([^):#]+\.md)#([^)]+)\)", text):
        headings = re.findall(r"(?m)^#+ (.+)$", (ROOT / name).parent.joinpath(page).read_text(encoding="utf-8"))
        anchors = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
        if anchor not in anchors:
            missing.append(f"{page}#{anchor}")
    assert not missing


def test_images_of_the_readme_show_on_a_package_index() -> None:
    images = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert images
    assert not [image for image in images if not image.startswith(f"{IMAGES}docs/images/")]
    assert not [image for image in images if not (ROOT / image.removeprefix(IMAGES)).is_file()]


def test_citation_names_the_five_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["title"] == "Animesion"
    found = [each["value"] for paper in citation["references"] for each in paper["identifiers"]]
    assert found == [f"arXiv:{number}" for number in PAPERS]
    assert all(paper["title"] and paper["authors"] for paper in citation["references"])


def test_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == animesion.__version__


# -- quick answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=" ".join
)
def test_help_answers_at_once(arguments: list[str]) -> None:
    status, seconds, output = run(*arguments)
    assert status == 0, output
    assert seconds < quick()
    assert "Example" in output or arguments[0].startswith("--")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bild"], "bild"),
        (["build", "daf-re", "--sampel"], "--sampel"),
        (["build"], "RECIPE"),
        (["build", "dafre"], "did you mean 'daf-re'"),
        (["build", "daf-re", "--set", "split.strateg=single"], "did you mean 'split.strategy'"),
        (["build", "daf-re", "--set", "split.train=many"], "split.train"),
        (["build", "nowhere/mine.toml"], "nowhere/mine.toml"),
        (["build", "daf-re", "--until", "pak"], "pak"),
        (["verify", "no/such/folder"], "no/such/folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_answers_at_once(arguments: list[str], message: str) -> None:
    status, seconds, output = run(*arguments)
    assert status == 2, output
    assert message in output
    assert "Traceback" not in output
    if arguments[0] != "verify":  # it imports what it needs to open the folder
        assert seconds < quick()


def test_importing_the_package_is_light() -> None:
    script = f"import sys, json, animesion; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout) == []


# -- source ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe.builtin_names())
def test_every_builtin_recipe_loads_and_has_a_summary(name: str) -> None:
    loaded = recipe.load(name)
    assert loaded.name == name
    assert loaded.summary
    sample = recipe.load(name, sample=True)
    assert sample.name == f"{name}-sample"
    assert sample.source.kind in {"sample", "sample-files", "sample-urls"}


def test_no_file_names_a_machine_or_a_package_index() -> None:
    # written in pieces, as this file is looked at too
    forbidden = re.compile(
        "|".join(["/ho" "me/", "/ro" "ot/", "/Use" "rs/", "/tmp/" "venv", "/opt/py" "pi", "pypi" r"\.org",
                  "pytho" r"nhosted\.org", "index" "-url", "download\\.py" r"torch\.org"])
    )  # fmt: skip
    found = []
    for path in files():
        content = path.read_bytes()
        if b"\0" in content[:8192]:  # not text
            continue
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
            if match := forbidden.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")
    assert not found


def test_constraints_are_plain_pins() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", pin) for pin in pins)
