"""Every block of code of the documentation runs, page by page, in order.

`pages` cuts the blocks out, `reader_world` draws what their paths and sites are, `reader` runs them. A new line that is
neither run nor listed here fails, and so does an entry of these tables that no line needs any more.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from animesion import executors, sources
from animesion.executors import base
from animesion.sources.crawled import CrawledSource
from animesion.storage import stores
from animesion_sample.source import HOST
from animesion_scrapers import RateLimiter
from animesion_scrapers.sites import SiteInfo
from animesion_scrapers.sites import load as load_site
from tests.answering import answering
from tests.cascades import BRIGHT
from tests.sharing import made_once

from .pages import Block, Step, blocks, pages, steps
from .reader import Reader, Tables
from .reader_world import Sites, prepare, sites, state_dict

#: The libraries that read datasets leave files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

#: Pages with many builds or trainings; their tests are marked `slow`.
LONG = (
    "CONTRIBUTING.md",
    "docs/benchmarks.md",
    "docs/build.md",
    "docs/cultivars.md",
    "docs/daf-re.md",
    "docs/duplicates.md",
    "docs/loading.md",
    "docs/publishing.md",
    "docs/recipes.md",
    "docs/scaling.md",
    "docs/sources.md",
    "docs/splits.md",
    "docs/study.md",
    "docs/tags.md",
    "docs/tgda.md",
    "docs/token-methods.md",
    "docs/training.md",
)

INSTALLS = "installs packages; .ci/run does it"
CHECKS = "a check of the repository; .ci/run does it"
BENCHMARK = "a benchmark, minutes long and with peers that are not installed"

TABLES = Tables(
    left_out={
        r"pip install ": INSTALLS,
        r"git clone ": "needs a repository to clone",
        r"cd animesion$": "the clone that is not made",
        r"python -m venv ": INSTALLS,
        r"\. \.venv/bin/activate$": INSTALLS,
        r"pre-commit install$": "changes the clone's hooks",
        r"pytest\b": "runs this test again",
        r"(ruff|mypy|mkdocs)\b": CHECKS,
        r"python tests/benchmarks/": BENCHMARK,
        r"animesion export .*--push ": "the Hub; tests/integration/test_publish.py pushes to one on loopback",
        r"animesion remove ": "names posts of the real site; tests/unit/test_removal.py removes images",
        r"python -m open_clip_train": "needs an old webdataset; tests/integration/test_readers.py uses its loader",
        r"torchrun ": "starts processes that load torch, which takes long; tests/integration/test_training.py does it",
        r"animesion build .*https://example.org/mirror": "a web server; tests/unit/test_indexed_tar_source.py has one",
        r"animesion build .*--engine ray": "needs Ray; tests/unit/test_ray.py does it where it is installed",
        r"animesion embedders install sscd": "needs the file of SSCD; tests/unit/test_sscd.py installs small ones",
        r"animesion build .*embedding\.model=sscd": "needs the file of SSCD; tests/unit/test_sscd.py builds with one",
        r"animesion detectors eval illustrations": "needs the illustrations, which are not distributed",
        r"animesion build folder .*faces-train-128": "needs the faces, which are not distributed",
        r"animesion train --data scenes ": "needs the faces and illustrations, which are not distributed",
        r"animesion train-detector ": "trains for minutes; tests/unit/test_detector_training.py runs the command",
        r"animesion build .*runs/detector": "needs the network of that training",
        r"python -m animesion_sample\.illustrations": "draws for minutes",
        r"animesion build .*detector=imgutils": "needs dghs-imgutils and the Hugging Face hub",
    },
    shorter=[
        (r"animesion (build|publish|verify) ", ["--workers", "1"]),
        (r"animesion build daf-re .*--sample", ["--set", "source.posts=300", "--set", "classes.minimum=5"]),
        (r"animesion build .*source\.faults", ["--set", "source.posts=200", "--set", "source.faults=0.05"]),
        (r"animesion build .*source\.(labels|kind=dump|kind=danbooru)", ["--set", "classes.minimum=1"]),
        (r"animesion build .*source\.kind=(danbooru|moebooru)", ["--set", "source.limit=60"]),
        (r"animesion build .*source\.kind=danbooru", ["--set", f"source.url=http://{HOST}"]),
        (r"animesion build .*source\.kind=moebooru", ["--set", "source.url=http://moebooru.invalid"]),
        (r"animesion build cultivar .*(category|wikidata)=", ["--set", "source.url=http://commons.invalid"]),
        (r"animesion build cultivar .*(category|wikidata)=", ["--set", "source.requests_per_second=10"]),
        (r"animesion build cultivar .*wikidata=", ["--set", "source.wikidata_url=http://query.invalid"]),
        (r"animesion build .*source\.kind=inaturalist", ["--set", "source.url=http://inaturalist.invalid"]),
        (r"animesion build (soy-ageing|daf-re-full-published) --sample", ["--set", "source.classes=2"]),
        # parts of the published sets
        (r"animesion build (soy|moeimouto|cub|stanford).*source\.path", ["--set", "source.incomplete=accept"]),
        (r"animesion detectors install lbp", ["--sha256", hashlib.sha256(BRIGHT).hexdigest()]),
        (r"animesion train ", ["--img-size", "32", "--epochs", "1", "--set", "data.train=val"]),
        (r"animesion train --recipe cal-teacher", ["--model", "vitfs_nano_patch16"]),
        (r"animesion train --recipe (clca-evit|glsim|ila|vilt)", ["--model", "vit_tiny_patch16", "--img-size", "64"]),
        (r"animesion train --recipe ila", ["--img-size", "96"]),  # its grid shrinks three times
        (r"animesion train --recipe (cal-teacher|clca-evit|glsim|ila|vilt)", ["--set", "model.pretrained=false"]),
        (r"animesion train --recipe tgda", ["--teacher-size", "32"]),
        (r"animesion profile ", ["--seconds", "0", "--batch-size", "2"]),
    ],
    statuses={
        r"animesion diff ": 1,  # they differ
        r"animesion verify datasets/daf-re-published": 1,  # it leaks, as the page says
    },
    edits=[
        ("docs/formats.md", "danbooru-10000", "danbooru-1012"),  # of the smaller sample
        ("docs/recipes.md", "minimum = 20", "minimum = 5"),
        ("docs/study.md", '"schedule.epochs" = 20', '"schedule.epochs" = 1\n"data.train" = "val"'),
        ("docs/study.md", '"run.seed" = [0, 1]', '"run.seed" = [0]'),
    ],
)


def all_blocks() -> list[Block]:
    return [block for page in pages() for block in blocks(page)]


def all_steps() -> list[Step]:
    return [step for block in all_blocks() if block.language == "bash" for step in steps(block)]


# -- the tables ------------------------------------------------------------------------------------------------------


def test_every_entry_of_the_tables_is_needed() -> None:
    texts = [step.text for step in all_steps()]
    patterns = [*TABLES.left_out, *(pattern for pattern, _ in TABLES.shorter), *TABLES.statuses]
    assert not [pattern for pattern in patterns if not any(re.match(pattern, text) for text in texts)]
    written = {page: path.read_text(encoding="utf-8") for page, path in pages().items()}
    assert not [(page, old) for page, old, _ in TABLES.edits if old not in written[page]]


def test_every_block_says_what_it_is() -> None:
    known = {"bash", "python", "toml", "text"}
    assert not [f"{block.place}: {block.language!r}" for block in all_blocks() if block.language not in known]


def test_a_line_that_is_neither_run_nor_listed_is_a_fault(tmp_path: Path) -> None:
    [step] = steps(Block("docs/x.md", 1, "bash", "make everything  # at once\n"))
    with pytest.raises(AssertionError, match=r"docs/x\.md:1: `make everything` is neither run nor listed"):
        Reader(tmp_path, TABLES, dict, lambda folder: None).run(step)


# -- the pages -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def template(small_build: Path, small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each page's reader begins with."""
    return made_once(tmp_path_factory, "template", lambda world: prepare(world, small_build, small_dataset))


@pytest.fixture(scope="module")
def internet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    with sites(tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture
def reached(internet: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources and crawlers that are made reach the servers, which nobody has to spare."""
    import animesion_scrapers

    original = sources.make

    def made(recipe: Any) -> Any:
        source: Any = original(recipe)
        if hasattr(source, "connect_to"):
            source.connect_to = internet.addresses(recipe.source.kind)
        return source

    class Danbooru(animesion_scrapers.Danbooru):
        def __init__(self, **settings: Any) -> None:
            super().__init__(f"http://{HOST}", connect_to={HOST: internet.booru}, **settings)

    class Crawler(animesion_scrapers.Crawler):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **{"connect_to": {HOST: internet.booru}, **settings})

    def pace(*_: Any, memory: Path | None = None, **__: Any) -> RateLimiter:
        return RateLimiter(math.inf, memory=memory)

    monkeypatch.setattr(sources, "make", made)
    monkeypatch.setattr(CrawledSource, "make_limiter", lambda self, memory: pace(memory=memory))
    monkeypatch.setattr(SiteInfo, "limiter", pace)
    monkeypatch.setattr(animesion_scrapers, "Danbooru", Danbooru)
    monkeypatch.setattr(animesion_scrapers, "Crawler", Crawler)


class InThisProcess(base.Executor):
    """Runs the jobs of builds here: dozens of interpreters would have to start else, which other tests do."""

    def __init__(self, workers: int = 1) -> None:
        super().__init__(1)
        self._job: base.Job | None = None

    def __exit__(self, *_: object) -> None:
        pass

    def _submit(self, job: base.Job) -> int:
        self._job = job
        return 0

    def _ended(self, handles: Sequence[int]) -> Iterator[tuple[int, base.Answer]]:
        assert self._job is not None
        yield 0, base.run_job(self._job)


@pytest.fixture
def at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing of this machine's own settings and caches; what is imported from the page's packages goes again."""
    import datasets

    monkeypatch.setenv("ANIMESION_DETECTORS", str(tmp_path / "detectors"))
    drawn = stores.cache_folder("", "sample").parent  # files of the sample world, the same for all
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache" / "animesion").mkdir(parents=True)
    (tmp_path / "cache" / "animesion" / "sample").symlink_to(drawn)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    importlib.invalidate_caches()


@pytest.mark.usefixtures("reached", "at_home")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page in LONG else [])
        for page in pages()
        if any(block.language != "text" for block in blocks(page))
    ],
)
def test_the_code_of_a_page_runs(
    page: str, template: Path, internet: Sites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = tmp_path / "world"
    shutil.copytree(template, world)
    if page != "CONTRIBUTING.md":  # whose packages the workers have to find
        monkeypatch.setattr(executors, "make", lambda *_args, **_options: InThisProcess())
    reader = Reader(world, TABLES, lambda: internet.accounts, monkeypatch.syspath_prepend)
    if page == "docs/tgda.md":
        reader.given["state_dict"] = state_dict()
    if page in ("docs/loading.md", "docs/scaling.md"):  # they read from a bucket, in this process
        for name, value in internet.accounts.items():
            if name.startswith("AWS_"):
                monkeypatch.setenv(name, value)
    if page == "docs/scaling.md":
        bucket, place = stores.connect("s3://bucket/faces")
        bucket.put(str(world / "faces"), place, recursive=True)
    for block in blocks(page):
        reader.begin()
        with contextlib.redirect_stdout(io.StringIO()):
            if block.language == "bash":
                for step in steps(block):
                    reader.run(step)
            elif block.language == "python":
                reader.execute(block)
            elif block.language == "toml":
                reader.take(block)
    os.chdir(tmp_path)


@pytest.mark.usefixtures("at_home")
def test_the_example_of_a_site_reads_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page only defines it: here it is asked for the posts of a booru that answers as the example says."""
    reader = Reader(tmp_path, TABLES, dict, monkeypatch.syspath_prepend)
    for block in blocks("docs/crawling.md"):
        if block.language == "python" and "class Example" in block.text:
            reader.execute(block)
        elif block.language == "toml":
            reader.take(block)
    entries = [{"id": number, "file": f"/files/{number}.jpg", "sha1": "a" * 40, "name": "rosa"} for number in (3, 8)]

    def answer(request: web.Request) -> web.Response:
        after = int(request.query.get("after", "0"))
        return web.json_response([entry for entry in entries if int(str(entry["id"])) > after])

    with answering(answer) as server:
        settings: dict[str, Any] = {
            "user_agent": "tests/1.0 (tests@example.org)",
            "connect_to": {"booru.invalid": server.address},
        }
        with load_site("example")("http://booru.invalid", requests_per_second=math.inf, **settings) as site:
            found = list(site.posts())
            assert list(site.posts(newer_than="3")) == found[1:]
            assert [post.id for post in site.posts_by_id(["8", "8", "5"])] == ["8"]
    assert [(post.id, post.tags["species"]) for post in found] == [("3", ("rosa",)), ("8", ("rosa",))]
    assert found[0].file_url == "http://booru.invalid/files/3.jpg"
