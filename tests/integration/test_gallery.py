"""Galleries: build, add and identify with a network that has learned nothing, and files that are refused."""

from __future__ import annotations

import http.server
import io
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import animesion_training
from animesion.errors import UsageError
from animesion_training.cli.eval import eval_
from animesion_training.cli.gallery import gallery
from animesion_training.cli.identify import identify
from animesion_training.cli.predict import predict
from animesion_training.data import open_data
from animesion_training.distributed import DistributedContext
from animesion_training.eval import gallery as galleries
from animesion_training.eval import whitening
from animesion_training.models import create_model
from animesion_training.models.embedding import Embedder, Whitening
from animesion_training.models.pretrained import load_weights
from animesion_training.weights import load_model, save_model, write_weights
from tests.conftest import draw


def variants(folder: Path, seed: int, count: int) -> None:
    """Images of one pattern with different noise: a network that has learned nothing finds them alike."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    base = np.asarray(draw(seed).resize((64, 64)), np.float64)
    for i in range(count):
        pixels = np.clip(base + rng.normal(0, 12, base.shape), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, four characters in `faces/train`, two others in `faces/val` and `faces/test`, and five images of one."""
    root = tmp_path_factory.mktemp("world")
    for i, name in enumerate(("ann", "bea", "cia", "dot")):
        variants(root / "faces" / "train" / name, i, 4)
    for i, name in enumerate(("eve", "fay")):
        variants(root / "faces" / "val" / name, 10 + i, 4)
        variants(root / "faces" / "test" / name.upper(), 20 + i, 4)
    variants(root / "gil", 30, 5)
    torch.manual_seed(0)
    save_model(create_model("resnet18", 3, 64), root / "w.safetensors", ("x", "y", "z"))
    return root


def call(command: click.Command, *arguments: object, content: bytes | None = None) -> Result:
    return CliRunner().invoke(command, list(map(str, arguments)), input=content)


def built(world: Path, path: Path, *more: object) -> Path:
    given = ["--checkpoint", world / "w.safetensors", "--data", world / "faces", "--out", path, "--device", "cpu"]
    result = call(gallery, "build", *given, *more)
    assert result.exit_code == 0, (result.output, result.exception)
    return path


def names(result: Result) -> list[str | None]:
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return [json.loads(line).get("name") for line in result.stdout.splitlines()]


def test_images_are_named_and_others_are_unknown(world: Path, tmp_path: Path) -> None:
    path = built(world, tmp_path / "g")
    shown = call(gallery, "show", path, "--json")
    facts = json.loads(shown.output)
    assert facts["classes"] == {"ann": 4, "bea": 4, "cia": 4, "dot": 4}
    assert (facts["rule"], facts["fitted"]) == ("5.0% of images of unknown classes get a name", "val")
    found = call(identify, path, world / "faces" / "train", "--json", "--device", "cpu")
    assert found.exit_code == 0
    assert names(found) == [name for name in ("ann", "bea", "cia", "dot") for _ in range(4)]
    line = json.loads(found.stdout.splitlines()[0])
    assert line["matches"][0] == {
        "name": "ann", "similarity": pytest.approx(1, abs=0.05), "images": 4, "nearest": line["matches"][0]["nearest"],
    }  # fmt: skip
    assert line["matches"][0]["nearest"].endswith("0.png")
    # of the images that the threshold was fitted on, none is close enough to a known character
    assert names(call(identify, path, world / "faces" / "val", "--json", "--device", "cpu")) == [None] * 8
    said = call(identify, path, world / "gil" / "0.png", "--top", "2", "--device", "cpu").output
    assert "0.png: unknown (nearest: " in said
    assert said.count(",") == 1


def test_a_folder_of_five_images_adds_a_character(world: Path, tmp_path: Path) -> None:
    path = built(world, tmp_path / "g")
    result = call(gallery, "add", path, world / "gil", "--device", "cpu")
    assert result.exit_code == 0, result.exception
    assert "5 images added as 'gil', a new class; the gallery has 5 classes" in result.output
    variants(tmp_path / "more", 30, 9)
    assert names(call(identify, path, tmp_path / "more" / "8.png", "--json", "--device", "cpu")) == ["gil"]
    before = path.read_bytes()
    again = call(gallery, "add", path, world / "gil", "--name", "another", "--device", "cpu")
    assert isinstance(again.exception, UsageError)
    assert "0.png is in the gallery already, as 0.png of 'gil'" in str(again.exception)
    assert path.read_bytes() == before
    (tmp_path / "more" / "note.txt").write_text("no image")
    mixed = call(gallery, "add", path, tmp_path / "more", "--name", "hal", "--out", tmp_path / "h", "--device", "cpu")
    assert isinstance(mixed.exception, UsageError)  # five of them are there already
    (tmp_path / "only").mkdir()
    (tmp_path / "more" / "8.png").rename(tmp_path / "only" / "8.png")
    (tmp_path / "more" / "note.txt").rename(tmp_path / "only" / "note.txt")
    mixed = call(gallery, "add", path, tmp_path / "only", "--name", "gil", "--out", tmp_path / "h", "--device", "cpu")
    assert mixed.exit_code == 1
    assert "not added: " in mixed.output
    assert "note.txt: " in mixed.output
    assert "a class that had 5" in mixed.output
    assert galleries.load(tmp_path / "h").counts.tolist() == [4, 4, 4, 4, 6]


def test_functions_do_what_the_commands_do(world: Path, tmp_path: Path) -> None:
    path = built(world, tmp_path / "g")
    result = animesion_training.build_gallery(world / "w.safetensors", world / "faces", tmp_path / "h", device="cpu")
    assert (tmp_path / "h").read_bytes() == path.read_bytes()
    assert (result.path, result.added, result.problems) == (tmp_path / "h", 16, ())
    assert result.fit is not None
    assert result.fit.threshold.value == result.gallery.card.threshold
    call(gallery, "add", path, world / "gil", "--device", "cpu")
    grown = animesion_training.add_to_gallery(result.path, world / "gil", device="cpu")
    assert (tmp_path / "h").read_bytes() == path.read_bytes()
    assert (grown.added, grown.fit, grown.gallery.counts.tolist()) == (5, None, [4, 4, 4, 4, 5])
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    shown = call(identify, path, world / "gil", bad, "--top", "2", "--json", "--device", "cpu").stdout.splitlines()
    found = list(animesion_training.identify(path, [world / "gil", bad], top=2, device="cpu"))
    for line, each in zip(map(json.loads, shown), found, strict=True):
        assert line["path"] == each.piece.name
        assert line.get("problem", "") == each.problem
        assert line.get("name") == (each.matches[0].name if each.known else None)
        similar = [(one["name"], one["similarity"]) for one in line.get("matches", [])]
        assert similar == [(one.name, round(one.similarity, 6)) for one in each.matches]
    with pytest.raises(UsageError, match="for faces: name a detector"):
        next(animesion_training.identify(path, bad, margin=0.1))
    with pytest.raises(UsageError, match="nothing is fitted"):
        animesion_training.build_gallery(world / "w.safetensors", world / "faces", bad, threshold=0.5, fit_split="val")
    with pytest.raises(UsageError, match="would add other characters"):
        animesion_training.add_to_gallery(path, world / "gil", detector="center", all_faces=True)


def test_a_gallery_of_other_weights_is_refused(world: Path, tmp_path: Path) -> None:
    path = built(world, tmp_path / "g", "--threshold", "0.5")
    torch.manual_seed(1)
    save_model(create_model("resnet18", 3, 64), tmp_path / "other.safetensors", ("x", "y", "z"))
    result = call(identify, path, world / "gil", "--checkpoint", tmp_path / "other.safetensors", "--device", "cpu")
    assert "made with other weights (resnet18, " in str(result.exception)
    # the digest is of the weights and not of the file
    model, card = galleries_model(world)
    save_model(model, tmp_path / "copy.safetensors", card.classes, {"note": "another card"})
    result = call(identify, path, world / "gil", "--checkpoint", tmp_path / "copy.safetensors", "--device", "cpu")
    assert result.exit_code == 0
    moved = tmp_path / "far" / "g"
    moved.parent.mkdir()
    path.rename(moved)
    result = call(identify, moved, world / "gil", "--device", "cpu")
    assert "which are not there: give them with --checkpoint" in str(result.exception)


def galleries_model(world: Path) -> Any:
    from animesion_training.weights import load_model

    return load_model(world / "w.safetensors")


def test_the_threshold_can_be_fitted_on_the_gallery_itself(world: Path, tmp_path: Path) -> None:
    path = built(world, tmp_path / "g", "--split", "train", "--split", "val", "--false-accept", "0.25")
    found = galleries.load(path)
    assert found.card.fitted == "the gallery itself"
    prototypes = found.prototypes()
    nearest_other = []
    for vector, label in zip(found.vectors, found.labels, strict=True):
        scores = prototypes @ vector
        scores[label] = -2
        nearest_other.append(scores.max())
    assert (np.array(nearest_other) >= found.card.threshold).sum() == 6  # a quarter of 24
    result = call(
        gallery, "build", "--checkpoint", world / "w.safetensors", "--data", world / "faces" / "train" / "ann" / "..",
        "--fit-data", world / "faces", "--fit-split", "test", "--out", path, "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.exception
    assert galleries.load(path).card.fitted == "test"


def test_a_gallery_of_one_class_needs_a_threshold_or_other_data(world: Path, tmp_path: Path) -> None:
    variants(tmp_path / "one" / "ann", 1, 3)
    given = ["--checkpoint", world / "w.safetensors", "--data", tmp_path / "one", "--out", tmp_path / "g"]
    result = call(gallery, "build", *given, "--device", "cpu")
    assert "the gallery has no other: add a class, fit it on other data" in str(result.exception)
    assert call(gallery, "build", *given, "--threshold", "0.7", "--device", "cpu").exit_code == 0


@pytest.fixture
def served(world: Path) -> Iterator[str]:
    """The address of a server of one image, and of a page at other paths."""
    content = (world / "faces" / "train" / "bea" / "1.png").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = content if self.path == "/1.png" else b"<html>nothing here</html>"
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_images_come_from_urls_and_standard_input(world: Path, tmp_path: Path, served: str) -> None:
    path = built(world, tmp_path / "g")
    content = (world / "faces" / "train" / "cia" / "2.png").read_bytes()
    assert names(call(identify, path, "-", "--json", "--device", "cpu", content=content)) == ["cia"]
    url, contact = f"http://{served}/1.png", ("--contact", "me@example.org")
    allowed = ("--allow-private", served)
    assert names(call(identify, path, url, *contact, *allowed, "--json", "--device", "cpu")) == ["bea"]
    # an address of this machine is not asked unless it is named, and a page is no image
    for place, more in ((url, ()), (f"http://{served}/page", allowed)):
        refused = call(identify, path, place, *contact, *more, "--json", "--device", "cpu")
        assert refused.exit_code == 1
        assert json.loads(refused.stdout)["problem"]
    assert "needs --contact" in str(call(identify, path, url, "--device", "cpu").exception)
    assert "is no image: give a path, a URL" in str(call(identify, path, "ftp://a/b", "--device", "cpu").exception)
    # `predict` reads the same places
    weights = ("--checkpoint", world / "w.safetensors")
    guessed = call(predict, url, "-", *weights, *contact, *allowed, "--json", "--device", "cpu", content=content)
    lines = [json.loads(line) for line in guessed.stdout.splitlines()]
    assert [line["path"] for line in lines] == [url, "-"]
    assert all(len(line["guesses"]) == 3 for line in lines)
    broken = call(identify, path, "-", "--device", "cpu", content=b"")
    assert broken.exit_code == 1
    assert "-: not identified (no bytes)" in broken.output


def test_embeddings_are_evaluated_on_classes_without_training(world: Path, tmp_path: Path) -> None:
    tasks = ("retrieval", "verification", "open-set")
    given = ["--checkpoint", world / "w.safetensors", "--data", world / "faces", "--shots", "2", "--device", "cpu"]
    chosen = [part for task in tasks for part in ("--task", task)]
    result = call(eval_, *given, *chosen, "--report", tmp_path / "report", "--json")
    assert result.exit_code == 0, result.exception
    found = json.loads(result.output)
    assert found["retrieval"]["r_at_1"] == 1
    assert found["verification"]["threshold"]["split"] == "val"
    assert found["open_set"]["unknown"] == 1
    written = json.loads((tmp_path / "report" / "similarity.json").read_text())
    assert written == found
    assert "Verification: 12 pairs of one class, 16 of two" in call(eval_, *given, "--task", "verification").output
    same = call(eval_, *given, "--task", "verification", "--fit-split", "test")
    assert "thresholds are fitted on 'test', which is the split that is evaluated" in str(same.exception)


# -- hostile files ---------------------------------------------------------------------------------------------------


def small() -> galleries.Gallery:
    card = galleries.GalleryCard(
        "resnet18", "0" * 64, "w.safetensors", 64, 1.0, "none", ("a", "b"), ("1", "2", "3"), 0.5, "given", ""
    )
    return galleries.Gallery(card, np.eye(3, dtype=np.float32), np.array([0, 1, 1]))


def changed(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    """Write the small gallery with a changed header and card."""
    galleries.save(small(), path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    card = json.loads(header["__metadata__"]["animesion_gallery"])
    change(header, card)
    header["__metadata__"]["animesion_gallery"] = json.dumps(card)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def test_a_gallery_is_read_as_it_was_written(tmp_path: Path) -> None:
    galleries.save(small(), tmp_path / "g")
    found = galleries.load(tmp_path / "g")
    assert found.card == small().card
    assert np.array_equal(found.vectors, small().vectors)
    assert np.array_equal(found.labels, small().labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, c: c.update(format=9), "of format '9', and this version reads 1"),
        (lambda h, c: c.update(classes=["a\x1b[2J", "b"]), "is no name: up to 1000 printable characters"),
        (lambda h, c: c.update(classes=["a", "a"]), "two have the same"),
        (lambda h, c: c.update(classes=["a", "b", "c"]), "its images and its 3 classes do not fit together"),
        (lambda h, c: c.update(images=["1"]), "its tensors are not those of 1 images"),
        (lambda h, c: c.update(threshold=float("nan")), "threshold is nan"),
        (lambda h, c: c.update(threshold="0.5"), "threshold in its card is no float"),
        (lambda h, c: c.update(digest="zz"), "no SHA-256"),
        (lambda h, c: c.update(views="all"), "views are 'all'"),
        (lambda h, c: c.update(more=1), "its card has 'more'"),
        (lambda h, c: h["vectors"].update(shape=[3, 1 << 40]), "no embeddings of 1 to"),
        (lambda h, c: h["vectors"].update(dtype="F64"), "its tensors are not those of 3 images"),
        (lambda h, c: h.update(code={"dtype": "U8", "shape": [0], "data_offsets": [60, 60]}), "are not those of 3"),
    ],
)
def test_galleries_that_contradict_themselves_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    changed(tmp_path / "g", change)
    with pytest.raises(UsageError, match=r"is (damaged|a gallery)") as caught:
        galleries.load(tmp_path / "g")
    assert message in str(caught.value)


@pytest.mark.parametrize("label", [-1, 2, 1 << 60])
def test_a_label_without_a_class_is_refused(label: int, tmp_path: Path) -> None:
    galleries.save(small(), tmp_path / "g")
    content = (tmp_path / "g").read_bytes()
    (tmp_path / "g").write_bytes(content[:-8] + label.to_bytes(8, "little", signed=True))
    with pytest.raises(UsageError, match="its images and its 2 classes do not fit together"):
        galleries.load(tmp_path / "g")


def test_other_files_are_no_galleries(world: Path, tmp_path: Path) -> None:
    galleries.save(small(), tmp_path / "g")
    whole = (tmp_path / "g").read_bytes()
    files = {
        "empty": b"", "pickle": b"\x80\x04" + b"c" * 40, "cut": whole[:-4], "long": whole + b"\0",
        "deep": (b"[" * 200_000).join((200_000 .to_bytes(8, "little"), b"")), "huge": b"\xff" * 64,
        "weights": (world / "w.safetensors").read_bytes(),
    }  # fmt: skip
    buffer = io.BytesIO()
    np.savez(buffer, vectors=np.eye(3))
    files["npz"] = buffer.getvalue()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=r"is not a gallery|is damaged"):
            galleries.load(tmp_path / name)
    with pytest.raises(UsageError, match="no such file"):
        galleries.load(tmp_path / "missing")
    with pytest.raises(UsageError, match=r"is not a gallery, but a folder"):
        galleries.load(tmp_path)


def test_vectors_of_another_length_are_refused(tmp_path: Path) -> None:
    for vectors in (2 * np.eye(3), np.full((3, 3), np.nan)):
        galleries.save(replace(small(), vectors=vectors.astype(np.float32)), tmp_path / "g")
        with pytest.raises(UsageError, match="do not all have length 1"):
            galleries.load(tmp_path / "g")


def test_whitened_weights_name_images_and_keep_their_logits(world: Path, tmp_path: Path) -> None:
    weights = tmp_path / "white.safetensors"
    given = ["--data", world / "faces", "--device", "cpu", "--out", weights]
    made = call(gallery, "whiten", "--checkpoint", world / "w.safetensors", *given)
    assert made.exit_code == 0, (made.output, made.exception)
    assert "whitened on 16 images of the split train" in made.output
    model, card = load_model(weights)
    before, _ = load_model(world / "w.safetensors")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model(images), before(images))
    assert card.facts["whitening"] == {
        "data": "faces", "split": "train", "images": 16, "views": "flip", "power": 0.25, "shrinkage": 0.1
    }  # fmt: skip
    plain, white = Embedder(before)(images), Embedder(model)(images)
    assert torch.allclose(model.whitening(plain), white, atol=1e-6)
    assert not torch.allclose(plain, white, atol=0.1)
    path = built(world, tmp_path / "g", "--checkpoint", weights)
    found = call(identify, path, world / "faces" / "train" / "bea", "--json", "--device", "cpu")
    assert names(found) == ["bea"] * 4
    # embeddings of the two are not comparable
    other = call(identify, path, world / "gil", "--checkpoint", world / "w.safetensors", "--device", "cpu")
    assert "made with other weights" in str(other.exception)
    again = call(gallery, "whiten", "--checkpoint", weights, *given[:-1], tmp_path / "twice")
    assert isinstance(again.exception, UsageError)
    assert "whitened embeddings already" in str(again.exception)
    fresh = create_model("resnet18", 3, 64)
    assert "the whitening of its embeddings was left out" in load_weights(fresh, weights)
    assert torch.equal(fresh.eval()(images), before(images))


def test_whitening_makes_classes_vary_alike_in_all_directions() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(6), 50)
    spread = np.array([3.0, 1.0, 0.5, 0.2])
    vectors = rng.normal(0, 1, (6, 4))[labels] + 0.05 * spread * rng.normal(0, 1, (300, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = whitening.fitted(vectors.astype(np.float32), labels, power=1.0, shrinkage=1e-9)
    mapped = (torch.from_numpy(vectors) - found.mean.double()) @ found.matrix.double()
    within = np.concatenate([np.cov(mapped[labels == c].numpy().T, bias=True)[None] for c in range(6)]).mean(0)
    assert np.allclose(within / within[0, 0], np.eye(4), atol=1e-3)
    # by hand: a power of a half of (0.36, -0.64) is (0.6, -0.8), and no map follows
    one = Whitening(2)
    one.power.fill_(0.5)
    one.matrix.copy_(torch.eye(2))
    values = torch.nn.functional.normalize(torch.tensor([[0.36, -0.64]]), dim=1)
    assert torch.allclose(one(values), torch.tensor([[0.6, -0.8]]), atol=1e-6)
    with pytest.raises(UsageError, match="no class has two that differ"):
        whitening.fitted(np.eye(3, dtype=np.float32), np.arange(3))


@pytest.mark.parametrize("shape", [(3, 3), (512, 511), (512,)])
def test_a_whitening_that_does_not_fit_is_refused(world: Path, tmp_path: Path, shape: tuple[int, ...]) -> None:
    model, card = load_model(world / "w.safetensors")
    tensors = {**model.state_dict(), "whitening.power": torch.ones(()), "whitening.mean": torch.zeros(512)}
    write_weights(tmp_path / "w", card, tensors | {"whitening.matrix": torch.zeros(shape)})
    with pytest.raises(UsageError, match="no weights called whitening"):
        load_model(tmp_path / "w")


def test_several_processes_whiten_nothing(world: Path, tmp_path: Path) -> None:
    context = DistributedContext(0, 2, torch.device("cpu"))
    with pytest.raises(UsageError, match="by one process"):
        whitening.whiten(
            world / "w.safetensors", open_data(world / "faces"), "train", tmp_path / "w.safetensors", context
        )
    assert not (tmp_path / "w.safetensors").exists()
