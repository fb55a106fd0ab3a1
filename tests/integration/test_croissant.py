"""`croissant.json` is valid Croissant, and its records are the samples that `animesion.open_dataset` reads."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import animesion

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("mlcroissant") is None, reason="mlcroissant is not installed"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


# mlcroissant keeps unpacked tars under their relative paths, so each dataset is read with a cache of its own
READ = """
import hashlib, json, sys
import mlcroissant
loaded = mlcroissant.Dataset(jsonld=sys.argv[1])
for row in loaded.records("samples"):
    pixels = hashlib.sha256(row["samples/image"].convert("RGB").tobytes()).hexdigest()
    print(json.dumps([row["samples/key"].decode(), row["samples/label"], row["samples/split"].decode(), pixels]))
for row in loaded.records("classes"):
    print(json.dumps([row["classes/id"], row["classes/name"].decode()]))
"""


def read(folder: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "CROISSANT_CACHE": str(cache)}
    command = [sys.executable, "-c", READ, str(folder / "croissant.json")]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_it_is_valid_and_complete(small_dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
    import mlcroissant as mlc

    with caplog.at_level(logging.WARNING):
        loaded = mlc.Dataset(jsonld=str(small_dataset / "croissant.json"))
    assert not loaded.metadata.ctx.issues.errors
    assert "not standard" not in caplog.text
    document = json.loads((small_dataset / "croissant.json").read_text(encoding="utf-8"))
    listed = {each["@id"]: each["sha256"] for each in document["distribution"] if each["@type"] == "cr:FileObject"}
    shards = {f"data/{path.name}" for path in (small_dataset / "data").glob("*.tar")}
    assert listed.keys() == shards | {"index.parquet", "classes.csv"}
    for name, digest in listed.items():
        assert hashlib.sha256((small_dataset / name).read_bytes()).hexdigest() == digest


def test_records_are_the_samples(small_dataset: Path, tmp_path: Path) -> None:
    dataset = animesion.open_dataset(small_dataset)
    done = read(small_dataset, tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    samples = {tuple(row) for row in rows if len(row) == 4}
    assert samples == {
        (sample.key, sample.label, sample.split, hashlib.sha256(sample.decode().tobytes()).hexdigest())
        for sample in dataset.samples()
    }
    assert len(rows) == len(dataset) + len(dataset.classes)
    assert [row for row in rows if len(row) == 2] == [[info.id, info.name] for info in dataset.classes]


def test_a_changed_shard_does_not_pass(small_dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(small_dataset, folder)
    index = folder / "index.parquet"
    index.write_bytes(index.read_bytes() + b" ")
    done = read(folder, tmp_path / "cache")
    assert done.returncode != 0
    assert "index.parquet" in done.stderr
