"""Builds of the sample world that several end-to-end tests look at."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

import animesion
from tests.sharing import made_once

#: The flagship recipe over a small world: 300 posts hold every trouble at least once.
SMALL = ("source.posts=300", "classes.minimum=5")


@pytest.fixture(scope="session")
def small_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`animesion build daf-re --sample` over the small world, undisturbed, two workers."""
    recipe = animesion.load_recipe("daf-re", list(SMALL), sample=True)
    return made_once(tmp_path_factory, "undisturbed", lambda out: animesion.build(recipe, out, workers=2))


def shard_digests(out: Path) -> dict[str, str]:
    """SHA-256 of every shard by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("data/*.tar"))}
