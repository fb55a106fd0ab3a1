"""Datasets that several tests look at; tests that change one work on a copy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch and NumPy are loaded, and for every process that a test starts: the tests run in one worker per core
# (pytest-xdist), whose threads would only get in each other's way.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # where a test takes more threads, they do not spin while they wait

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import animesion
from animesion.executors import local
from animesion.stats import plots
from animesion.storage.workspace import write_atomic
from animesion_sample import server
from tests import workers
from tests.sharing import made_once
from tests.workers import FORKS, KeptWorkers

#: Class folder -> its images; names need quoting, escaping and more than ASCII.
CLASSES = {"初音ミク": 14, "crème_brûlée": 12, "plain (blue) & co": 11}


def draw(seed: int, side: int = 64) -> Image.Image:
    """A soft random pattern, unlike that of any other seed even to a perceptual hash."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side + 8 * (seed % 3)), Image.Resampling.BICUBIC)


def draw_folders(root: Path) -> Path:
    """Class folders of RGB JPEG, PNG with and without alpha, and grey images."""
    seed = 0
    for name, count in CLASSES.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            image, path = draw(seed), root / name / f"image {i}"
            if i % 4 == 0:
                image.putalpha(Image.linear_gradient("L").resize(image.size))
                image.save(path.with_suffix(".png"))
            elif i % 4 == 1:
                image.convert("L").save(path.with_suffix(".jpg"))
            elif i % 4 == 2:
                image.save(path.with_suffix(".png"))
            else:
                image.save(path.with_suffix(".jpg"), quality=92)
            seed += 1
    return root


@pytest.fixture(scope="session", autouse=True)
def fast_builds() -> Iterator[None]:
    """Builds in this process start workers and sample servers fast, wait for no disk, and draw equal plots once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "LocalExecutor", KeptWorkers)
        patch.setattr(server, "CONTEXT", FORKS)
        patch.setattr("os.fsync", workers.no_fsync)
        patch.setattr(plots, "write_plots", drawn_once(plots.write_plots))
        yield
    workers.stop()


def drawn_once(write: Callable[[Path, npt.ArrayLike, str], list[Path]]) -> Callable[..., list[Path]]:
    """`write_plots`, which remembers the files of each title and counts."""
    known: dict[tuple[str, bytes], dict[str, bytes]] = {}

    def write_plots(folder: Path, counts: npt.ArrayLike, title: str) -> list[Path]:
        key = title, np.asarray(counts, np.int64).tobytes()
        if key not in known:
            written = write(folder, counts, title)
            known[key] = {path.name: path.read_bytes() for path in written}
            return written
        for name, content in known[key].items():
            write_atomic(folder / name, content)
        return [folder / name for name in known[key]]

    return write_plots


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    """37 drawn images of three classes, one folder each."""
    return draw_folders(tmp_path / "images")


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 drawn images of three classes, in several shards of train and one of val and of test."""

    def make(folder: Path) -> None:
        source = draw_folders(folder / "images" / "world")
        settings = [f'source.path="{source}"', "pack.shard_samples=10", "split.train=70", "split.test=20"]
        animesion.build(animesion.load_recipe("folder", settings), folder / "small", workers=1)

    return made_once(tmp_path_factory, "small-dataset", make) / "small"
