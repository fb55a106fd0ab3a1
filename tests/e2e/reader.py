"""A reader who does what a page of the documentation says, block by block, in a folder of their own.

Commands run in this process; those that serve for ever, or read the environment only once, in one of their own. What is
not run, and what is made shorter, stands in the tables of `test_documentation`.
"""

from __future__ import annotations

import glob
import importlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click
import requests
from click.testing import CliRunner

import animesion
from animesion.cli import cli
from animesion.config import decisions

from .pages import ROOT, Block, Step

CLI = ("-c", "from animesion.cli import main; main()")
#: What stands for any dataset or folder of images, and what is there for it.
PLACEHOLDERS = {"DIR": "datasets/daf-re-sample", "FOLDER": "images"}
_TORCHRUN = ("-m", "animesion.cli")


@dataclass
class Tables:
    """What the reader does otherwise than the page says, by patterns of commands.

    Attributes:
        left_out: pattern of commands that are not run, and why.
        shorter: pattern of commands, and what is put behind those that match.
        statuses: pattern of commands, and their exit status where it is not 0.
        edits: what is written otherwise in blocks that are no commands: page, text, text in its stead.
    """

    left_out: Mapping[str, str]
    shorter: Sequence[tuple[str, Sequence[str]]]
    statuses: Mapping[str, int]
    edits: Sequence[tuple[str, str, str]]

    def reason(self, step: Step) -> str:
        """Why a command is not run; empty if it is."""
        return next((why for pattern, why in self.left_out.items() if re.match(pattern, step.text)), "")

    def more(self, step: Step) -> list[str]:
        """What is put behind a command."""
        return [word for pattern, words in self.shorter if re.match(pattern, step.text) for word in words]

    def status(self, step: Step) -> int:
        """The exit status of a command."""
        return next((status for pattern, status in self.statuses.items() if re.match(pattern, step.text)), 0)

    def edited(self, block: Block) -> str:
        """The text of a block."""
        text = block.text
        for page, old, new in self.edits:
            if page == block.page:
                text = text.replace(old, new)
        return text


@dataclass
class Reader:
    """One reader of one page.

    Attributes:
        world: the folder to work in, with the files that the pages name.
        tables: what is done otherwise.
        accounts: the environment of commands that reach the Hub or a bucket.
        put_on_path: makes a folder importable.
        given: names that the page's Python is told to have.
    """

    world: Path
    tables: Tables
    accounts: Callable[[], dict[str, str]]
    put_on_path: Callable[[str], None]
    given: dict[str, Any] = field(default_factory=dict)
    _folder: Path = field(init=False)
    _last_python: str = field(init=False, default="")
    _last_toml: str = field(init=False, default="")

    def __post_init__(self) -> None:
        self._folder = self.world
        self.given["__name__"] = "__main__"

    def begin(self) -> None:
        """Each block is read in the world's own folder."""
        self._go(self.world)

    def _go(self, folder: Path) -> None:
        assert folder.is_dir(), f"there is no folder {folder}"
        self._folder = folder
        os.chdir(folder)

    # -- commands ------------------------------------------------------------------------------------------------

    def run(self, step: Step) -> None:
        """Run a command, or check one that is not run as far as it can be."""
        if self.tables.reason(step):
            parsed(step)
            return
        program, *words = (PLACEHOLDERS.get(word, word) for word in step.words)
        if program == "cd":
            self._go(self._folder / words[0])
            return
        assert program in ("animesion", "hf"), f"{step.place}: `{step.text}` is neither run nor listed as left out"
        words = [name for word in words for name in (sorted(glob.glob(word)) if "*" in word else []) or [word]]
        words += self.tables.more(step)
        self._write_what_is_named(words)
        if program == "hf":
            said = self._apart(step, ["-m", "huggingface_hub.cli.hf", *words])
        elif words[0] == "browse":
            said = self._browse(words)
        elif words[0] == "publish":
            said = self._apart(step, [*CLI, *words])
        else:
            if words[0] in ("build", "train"):
                _clear_the_way(words)
            done = CliRunner().invoke(cli, words)
            status = getattr(done.exception, "exit_code", done.exit_code)
            problem = f"{step.place}: `{step.text}` ended with {status}: {done.exception}\n{done.output}"
            assert status == self.tables.status(step), problem
            said = done.stdout
        if step.into:
            Path(step.into).write_text(said, encoding="utf-8")

    def _apart(self, step: Step, command: Sequence[str]) -> str:
        done = subprocess.run(
            [sys.executable, *command], env=self.accounts(), capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"{step.place}: `{step.text}`\n{done.stdout}{done.stderr}"
        return done.stdout

    def _browse(self, words: Sequence[str]) -> str:
        process = subprocess.Popen([sys.executable, *CLI, *words], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            said = process.stdout.readline() + process.stdout.readline()
            page = requests.get(said.rpartition("open ")[2].partition("#")[0], timeout=10)
            assert page.status_code == 200
            assert "<title>" in page.text
        finally:
            process.terminate()
            process.wait(20)
            process.stdout.close()
        return said

    def _write_what_is_named(self, words: Sequence[str]) -> None:
        """A TOML file that a command names and that is not there is the page's last block of TOML."""
        for word in words:
            path = Path(word.rpartition("=")[2])
            if (
                path.suffix == ".toml"
                and not path.exists()
                and re.search("^(name|same) =", self._last_toml, re.MULTILINE)
            ):
                path.write_text(self._last_toml, encoding="utf-8")

    # -- Python --------------------------------------------------------------------------------------------------

    def execute(self, block: Block) -> None:
        """Run a block of Python among the names of those before it."""
        self._last_python = text = self.tables.edited(block)
        if "import mlcroissant" in text:  # it asks only once where its cache is
            env = {**os.environ, "CROISSANT_CACHE": str(self.world / "croissant")}
            done = subprocess.run([sys.executable, "-c", text], env=env, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{block.place}\n{done.stderr}"
            return
        try:
            exec(compile(text, block.place, "exec"), self.given)
        except Exception as error:
            raise AssertionError(f"{block.place}: {type(error).__name__}: {error}") from error

    # -- TOML ----------------------------------------------------------------------------------------------------

    def take(self, block: Block) -> None:
        """Use a block of TOML as what its keys say it is: a package's entry points, a study, decisions, a recipe."""
        self._last_toml = text = self.tables.edited(block)
        document = tomllib.loads(text)
        path = self.world / f"block-{block.line}.toml"
        path.write_text(text, encoding="utf-8")
        if "project" in document:
            self._install(block, document["project"]["entry-points"])
        elif "grid" in document or "variants" in document:
            from animesion_training.analysis import study

            assert study.load(path).name == document["name"]
        elif "data" in document:
            from animesion_training import recipe

            path.write_text('name = "part"\n' + text, encoding="utf-8")
            recipe.load(str(path))
        elif "same" in document:
            assert decisions.read(path)
        else:
            whole = {"name": "part", "source": {"kind": "folder", "path": "faces/"}} | document
            import tomli_w

            path.write_text(tomli_w.dumps(whole), encoding="utf-8")
            animesion.load_recipe(str(path))

    def _install(self, block: Block, groups: Mapping[str, Mapping[str, str]]) -> None:
        """Put the Python block before into a package of its own, with these entry points."""
        for group, points in groups.items():
            for name, value in points.items():
                module = value.partition(":")[0]
                site = self.world / "site" / name
                file = site.joinpath(*module.split(".")).with_suffix(".py")
                file.parent.mkdir(parents=True)
                file.write_text(self._last_python, encoding="utf-8")
                about = site / f"{name}_1-1.dist-info"
                about.mkdir()
                (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-1\nVersion: 1\n")
                (about / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
                self.put_on_path(str(site))
                importlib.invalidate_caches()
                [point] = entry_points(group=group, name=name)
                assert point.load()
                assert sys.modules[module].__file__ == str(file), f"{block.place}: {module} is another's"


def _clear_the_way(words: Sequence[str]) -> None:
    """Remove an output of another recipe, or of an earlier run: pages show several ways to one folder."""
    context = _context(words)
    out: Any = context.params.get("out")
    if words[0] == "train" and not context.params["resume"]:
        shutil.rmtree(out, ignore_errors=True)
    if words[0] == "build" and not context.params["replace"]:
        recipe = _recipe(context)
        out = Path(out or f"datasets/{recipe.name}")
        if (out / "recipe.toml").exists() and (out / "recipe.toml").read_text(encoding="utf-8") != recipe.to_toml():
            shutil.rmtree(out)


def _recipe(context: click.Context) -> Any:
    params = context.params
    overrides = next(list(value) for name, value in params.items() if name in ("set", "overrides", "settings"))
    return animesion.load_recipe(params["recipe"], overrides, sample=params["sample"])


def _context(words: Sequence[str]) -> click.Context:
    """What click makes of a command and its arguments."""
    command: click.Command = cli
    name, rest = "animesion", list(words)
    context: click.Context | None = None
    while True:
        context = command.make_context(name, rest, parent=context)
        rest = [*context._protected_args, *context.args]
        if not isinstance(command, click.Group) or not rest:
            return context
        found, chosen, rest = command.resolve_command(context, rest)
        assert chosen is not None
        name, command = found or "", chosen


def parsed(step: Step) -> None:
    """Check a command that is not run: options of `animesion` are parsed, scripts and their folders are there."""
    for word in step.words:
        if word.endswith(".py"):
            assert (ROOT / word).is_file(), f"{step.place}: there is no {word}"
    words = list(step.words)
    if words[0] == "animesion":
        words = words[1:]
    elif _TORCHRUN in itertools.pairwise(words):
        words = words[words.index(_TORCHRUN[1]) + 1 :]
    else:
        return
    context = _context(words)
    if context.info_name == "build":
        _recipe(context)
