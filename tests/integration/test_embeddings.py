"""Duplicates by a timm model: found where hashes fail, reused between builds, and off by default."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import animesion
from animesion.dedup import search
from animesion.errors import UsageError
from tests.conftest import draw

torch = pytest.importorskip("torch", reason="the extra `train` is not installed")
pytest.importorskip("timm", reason="the extra `train` is not installed")

MODEL = "test_vit.r160_in1k"
TINY = (f'duplicates.embedding.model="{MODEL}"', 'duplicates.embedding.weights="random"')


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images, and of the first three a copy cut on two sides, that no pHash takes for the same."""
    root = tmp_path_factory.mktemp("images")
    (root / "miku").mkdir()
    for i in range(8):
        image = draw(3 * i, 96)
        image.save(root / "miku" / f"{i}.png")
        if i < 3:
            image.crop((4, 4, 96, 96)).save(root / "miku" / f"cut{i}.png")
    return root


def build(images: Path, out: Path, *overrides: str) -> dict[str, dict[str, str]]:
    animesion.build(animesion.load_recipe("folder", [f'source.path="{images}"', *overrides]), out, workers=1)
    return {Path(row["source_id"]).stem: row for row in pq.read_table(out / "curated.parquet").to_pylist()}


def least_cosine(out: Path, rows: dict[str, dict[str, str]]) -> tuple[float, float]:
    """The lowest cosine of an image and its cropped copy, and the highest cosine of two other images."""
    table = pq.read_table(out / "features" / "embeddings-part-00000.parquet")
    vectors = dict(zip(table["key"].to_pylist(), np.array(table["embedding"].to_pylist()), strict=True))
    of = {name: vectors[row["key"]] for name, row in rows.items()}
    names = sorted(of)
    copies = {(f"{i}", f"cut{i}") for i in range(3)}
    others = [float(of[a] @ of[b]) for a in names for b in names if a < b and (a, b) not in copies]
    return min(float(of[a] @ of[b]) for a, b in copies), max(others)


def test_cut_copies_are_found_by_a_model_and_only_by_it(images: Path, tmp_path: Path) -> None:
    plain = build(images, tmp_path / "plain")
    assert all(row["kept"] for row in plain.values())
    assert not list((tmp_path / "plain" / "features").glob("embeddings-*"))
    out = tmp_path / "out"
    rows = build(images, out, *TINY, "duplicates.embedding.threshold=1.0")
    assert all(row["kept"] for row in rows.values())
    copies, others = least_cosine(out, rows)
    assert copies > others  # random weights distinguish these drawings
    before = (out / ".receipts" / "embed" / "part-00000.json").read_bytes()
    overrides = [f'source.path="{images}"', *TINY, f"duplicates.embedding.threshold={(copies + others) / 2}"]
    animesion.build(animesion.load_recipe("folder", overrides), out, workers=1, replace=True)
    found = {Path(row["source_id"]).stem: row for row in pq.read_table(out / "curated.parquet").to_pylist()}
    for i in range(3):
        assert (found[f"cut{i}"]["reason"], found[f"cut{i}"]["keeper"]) == ("near duplicate", found[f"{i}"]["key"])
    assert sum(bool(row["kept"]) for row in found.values()) == 8
    assert (out / ".receipts" / "embed" / "part-00000.json").read_bytes() == before  # not embedded again


def test_the_same_images_give_the_same_embeddings(images: Path, tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        build(images, tmp_path / name, *TINY)
        files.append((tmp_path / name / "features" / "embeddings-part-00000.parquet").read_bytes())
    assert files[0] == files[1]


def test_weights_of_a_file_are_used(images: Path, tmp_path: Path) -> None:
    import timm

    torch.manual_seed(5)
    torch.save(timm.create_model(MODEL, num_classes=0).state_dict(), tmp_path / "weights.pth")
    chosen = f'duplicates.embedding.weights="{tmp_path / "weights.pth"}"'
    build(images, tmp_path / "out", TINY[0], chosen)
    build(images, tmp_path / "random", *TINY)
    name = "features/embeddings-part-00000.parquet"
    assert (tmp_path / "out" / name).read_bytes() != (tmp_path / "random" / name).read_bytes()


def test_weights_of_other_trainers_are_used_and_the_sentence_says_how(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import timm

    weights = timm.create_model(MODEL, num_classes=3).state_dict()
    torch.save(weights, tmp_path / "plain.pth")
    wrapped = {f"model.{name}": value for name, value in weights.items() if "num_batches_tracked" not in name}
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "last.ckpt")
    tables = []
    for name in ("plain.pth", "last.ckpt"):
        build(images, tmp_path / f"of-{name}", TINY[0], f'duplicates.embedding.weights="{tmp_path / name}"')
        tables.append(pq.read_table(tmp_path / f"of-{name}" / "features/embeddings-part-00000.parquet"))
    assert tables[0].equals(tables[1])
    assert "last.ckpt: weights under 'state_dict'; prefix 'model.' cut" in caplog.text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('duplicates.embedding.model="resnet18x"', "timm has no model named resnet18x"),
        ('duplicates.embedding.weights="no/such.pth"', "cannot read no/such.pth"),
        ('duplicates.embedding.weights="{here}/odd.pth"', "cannot be loaded into the model"),
        ('duplicates.embedding.weights="{here}/odd.safetensors"', "cannot be loaded into the model"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_one_sentence(
    override: str, message: str, images: Path, tmp_path: Path
) -> None:
    for name in ("odd.pth", "odd.safetensors"):
        (tmp_path / name).write_bytes(b"\x80\x04nothing")
    with pytest.raises(UsageError, match=message):
        build(images, tmp_path / "out", *TINY, override.format(here=tmp_path))


@pytest.mark.parametrize("installed", [True, False])
def test_pairs_by_cosine_are_those_of_all_with_all(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if installed:
        pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    else:
        monkeypatch.setitem(sys.modules, "faiss", None)
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(300, 16)).astype(np.float32)
    vectors[200:] = vectors[:100] + 0.2 * rng.normal(size=(100, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[7] = vectors[9] = 0  # no embedding
    exact = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    due = {(i, j) for i, j in np.argwhere(exact >= 0.9).tolist() if i < j}
    assert 40 < len(due) < 200
    assert [tuple(pair) for pair in search.cosine_pairs(vectors, 0.9).tolist()] == sorted(due)
