"""Training of a network that reads tags: masked tags are learnt from pictures, and classes from both."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import animesion
from animesion.errors import UsageError
from animesion_training.engine import loop, lr_range
from animesion_training.engine.watcher import Watcher
from animesion_training.recipe import TrainRecipe, load
from animesion_training.weights import read_card
from tests.integration.test_training import losses
from tests.running import run_here

COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (210, 50, 40)}
TAGS = {"general": ["cold", "warm", "bright", "dark", "rare"], "character": ["blue", "green", "red"]}
NAMES = [name for names in TAGS.values() for name in names]
SMALL = (
    "model.name=vit_tiny_patch16", "model.img_size=32", "model.text=vilt",
    "model.options={depth = 2, embed_dim = 48, num_heads = 3}",
    "model.method_options.text={length = 6, dropout = 0.0}",
    "run.batch_size=20", "data.workers=0", "schedule.warmup_steps=2", "optimizer.name=adamw", "optimizer.lr=3e-3",
    "optimizer.weight_decay=0.0", "run.log_steps=1", "augment.scale=[0.9, 1.0]", "augment.color_jitter=0.0",
)  # fmt: skip


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built dataset of 120 pictures of three colours, each tagged with its class, temperature and brightness."""
    root = tmp_path_factory.mktemp("tagged")
    rng = np.random.default_rng(5)
    tags: dict[str, list[str]] = {}
    for name, colour in COLOURS.items():
        (root / "set" / name).mkdir(parents=True)
        for i in range(40):
            pixels = np.array(colour) * (1 if i % 2 else 0.4) + rng.normal(0, 20, (32, 32, 3))
            path = root / "set" / name / f"{i}.png"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
            found = [name, "cold" if name == "blue" else "warm", "bright" if i % 2 else "dark"]
            tags[f"{name}/{i}.png"] = found
    settings = [f"source.path={root / 'set'}", "split.train=60", "split.val=20", "split.test=20"]
    settings += ["duplicates.near=false"]
    animesion.build(animesion.load_recipe("folder", settings), root / "built", workers=1)
    write_tags(root / "built", tags)
    return root / "built"


def write_tags(folder: Path, tags: dict[str, list[str]]) -> None:
    """The files of a dataset whose samples carry tags, as docs/formats.md describes them."""
    index = pq.read_table(folder / "index.parquet")
    curated = pq.read_table(folder / "curated.parquet", columns=["key", "source_id"]).to_pydict()
    source_ids = dict(zip(curated["key"], curated["source_id"], strict=True))
    ids = [sorted(NAMES.index(name) for name in tags[source_ids[key]]) for key in index["key"].to_pylist()]
    columns = [index["key"], pa.array(ids, pa.list_(pa.int32()))]
    pq.write_table(pa.table(columns, names=["key", "tags"]), folder / "sample_tags.parquet")
    with (folder / "tags.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["tag_id", "name", "category", "train", "total"])
        for category, names in TAGS.items():
            for name in names:
                total = sum(NAMES.index(name) in each for each in ids)
                writer.writerow([NAMES.index(name), name, category, total, total])


def recipe(*overrides: str, epochs: int) -> TrainRecipe:
    return load("scratch", [*SMALL, f"schedule.epochs={epochs}", *overrides])


def terms(out: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line[f"loss_{name}"] for line in lines if line["kind"] == "step"]


def test_pretraining_on_tags_then_classes(tagged: Path, tmp_path: Path) -> None:
    alone = ["text.label_weight=0", "text.schedule=full", "data.val=", "data.test="]
    loop.train(recipe(*alone, epochs=25), tagged, tmp_path / "tags", device="cpu")
    tag_losses = terms(tmp_path / "tags", "tags")
    # two tags at two places in random order. The entropy of a place is log 2 = 0.69 if the picture tells both; with the
    # prior alone (a third cold, half bright) it is 0.69 + (0.64 + 0.69) / 2 = 1.36
    assert np.mean(tag_losses[:2]) > 1.3
    assert np.mean(tag_losses[-5:]) < 0.85
    assert max(terms(tmp_path / "tags", "label")) == 0
    card = read_card(tmp_path / "tags" / "last.safetensors")
    # in the order of the vocabulary, without the names of classes
    assert card.facts["text"] == {"names": ["cold", "warm", "bright", "dark", "rare"], "categories": ["general"]}

    start = [f"model.init={tmp_path / 'tags'}", "text.schedule=none", "text.unknown=0.3"]
    outcome = loop.train(recipe(*start, epochs=6), tagged, tmp_path / "classes", device="cpu")
    assert outcome.test is not None
    assert outcome.test.top_1 > 0.9


def test_a_class_that_the_picture_does_not_show_is_known_from_tags_alone(tagged: Path, tmp_path: Path) -> None:
    """Grey pictures: cold is blue, and warm is green or red. Without tags, a third is right by chance."""
    grey = ["augment.flip=0.0", "text.schedule=none", "text.weight=0"]
    data = grey_copy(tagged, tmp_path)
    scores = {}
    for evaluate in ("true", "false"):
        given = recipe(*grey, f"text.evaluate={evaluate}", epochs=8)
        outcome = loop.train(given, data, tmp_path / evaluate, device="cpu")
        assert outcome.test is not None
        scores[evaluate] = outcome.test.top_1
    assert scores["true"] > 0.55
    assert scores["false"] < 0.45
    # the command evaluates in either way
    command = ["eval", "--checkpoint", str(tmp_path / "true" / "best.safetensors"), "--data", str(data), "--json"]
    found = []
    for options in (["--tags"], []):
        result = run_here(*command, *options, "--device", "cpu")
        assert result.returncode == 0, result.stderr
        found.append(json.loads(result.stdout)["top_1"])
    assert found[0] == pytest.approx(scores["true"])
    assert found[1] < scores["true"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["text.categories=['artist']"], "no tags of the category 'artist'; it has general, character"),
        (["text.categories=['character']"], "no tags that are not names of classes"),
        (["model.method_options.text={vocab_size = 9}"], "follows from the vocabulary"),
        (["text.vocabulary=missing.txt"], "missing.txt cannot be read"),
        (["augment.mixup=0.5"], "reads the tags of single images"),
        (["objective.name=supcon", "data.images_per_class=2"], "reads the tags of single images"),
    ],
)
def test_a_run_that_cannot_read_tags_is_refused(tagged: Path, tmp_path: Path, changes: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        loop.train(recipe(*changes, epochs=1), tagged, tmp_path / "run", device="cpu")


def test_a_blend_is_refused(tagged: Path, tmp_path: Path) -> None:
    for name in COLOURS:
        (tmp_path / "more" / "train" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), COLOURS[name]).save(tmp_path / "more" / "train" / name / "one.png")
    blend = f'data.blend={{"{tmp_path / "more"}" = 1.0}}'
    with pytest.raises(UsageError, match="leave the others out"):
        loop.train(recipe(blend, epochs=1), tagged, tmp_path / "run", device="cpu")


def test_data_without_tags_are_refused(tagged: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="tags"):
        loop.train(recipe(epochs=1), tagged.parent / "set", tmp_path / "run", device="cpu")


def test_a_vocabulary_from_a_file_names_the_tags(tagged: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("dark\ncold\n")
    loop.train(recipe(f"text.vocabulary={names}", "data.val=", "data.test=", epochs=1), tagged, tmp_path / "run")
    assert read_card(tmp_path / "run" / "last.safetensors").facts["text"]["names"] == ["dark", "cold"]
    names.write_text("hat\nsword\n")
    with pytest.raises(UsageError, match="has a tag that the network knows"):
        loop.train(recipe(f"text.vocabulary={names}", epochs=1), tagged, tmp_path / "other", device="cpu")


def test_a_resumed_run_masks_the_same_tags(tagged: Path, tmp_path: Path) -> None:
    settings = ["data.val=", "data.test=", "run.save_steps=3"]
    loop.train(recipe(*settings, epochs=4), tagged, tmp_path / "whole", device="cpu")
    interrupted(recipe(*settings, epochs=4), tagged, tmp_path / "parts", after=6)
    loop.train(recipe(*settings, epochs=4), tagged, tmp_path / "parts", resume=True, device="cpu")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    shares = terms(tmp_path / "whole", "tags")
    assert shares[0] == 0  # the warm-up masks nothing
    assert min(shares[-4:]) > 0


def interrupted(given: TrainRecipe, data: Path, out: Path, *, after: int) -> None:
    """Train until a signal arrives in a step."""

    class Stop(Watcher):
        steps = 0

        def stepped(self, loss: float, rate: float, speed: float) -> None:
            self.steps += 1
            if self.steps == after:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        loop.train(given, data, out, device="cpu", watcher=Stop())


def test_pieces_of_a_batch_have_the_loss_and_the_gradient_of_the_whole(tagged: Path, tmp_path: Path) -> None:
    found = []
    for pieces in (1, 3):
        settings = ["data.val=", "data.test=", "text.schedule=bert", f"run.accumulate={pieces}"]
        loop.train(recipe(*settings, epochs=2), tagged, tmp_path / str(pieces), device="cpu")
        found.append(terms(tmp_path / str(pieces), "tags"))
    assert found[0] == pytest.approx(found[1], rel=1e-3)  # a mean over the tags of a piece would differ by more


def test_learning_rates_and_batch_sizes_are_tried_with_texts(tagged: Path) -> None:
    found = lr_range.find_lr(recipe("run.accumulate=2", epochs=1), tagged, device="cpu", count=8)
    assert len(found.losses) > 4


def grey_copy(tagged: Path, tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    tags = {}
    for name in COLOURS:
        (tmp_path / "grey" / name).mkdir(parents=True)
        for i in range(30):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "grey" / name / f"{i}.png")
            tags[f"{name}/{i}.png"] = ["cold" if name == "blue" else "warm"]
    settings = [f"source.path={tmp_path / 'grey'}", "split.train=60", "split.val=20", "split.test=20"]
    settings += ["duplicates.near=false"]
    animesion.build(animesion.load_recipe("folder", settings), tmp_path / "greys", workers=1)
    write_tags(tmp_path / "greys", tags)
    return tmp_path / "greys"
