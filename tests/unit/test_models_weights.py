"""Weight files: saved models load again, and a file with a wrong card is refused before a model is built from it."""

from __future__ import annotations

import json
import resource
import time
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")

from safetensors.torch import save

from animesion.errors import UsageError
from animesion_training import create_model, load_model, save_model
from animesion_training.weights import read_card

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3}
CLASSES = ["初音ミク", "crème_brûlée", "plain"]


def write(path, card, tensors=None):
    """A weight file with any card, as this package would not write it."""
    tensors = {"weight": torch.zeros(2, 2)} if tensors is None else tensors
    text = card if isinstance(card, str) else json.dumps(card)
    path.write_bytes(save(tensors, {"animesion": text}))
    return path


@pytest.fixture(scope="module")
def good_card():
    return {"format": 1, "name": "vit_tiny_patch16", "num_classes": 3, "img_size": 32, "options": SMALL}


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (("resnet18", 3, 40), {}),
        (("vit_tiny_patch16", 3, (32, 48), "ifa"), {"norm_eps": 1e-12, "drop_path_rate": 0.1, **SMALL}),
        (("vit_tiny_patch16_ifa", 3, 32), SMALL),
        (("vit_tiny_patch16", 3, 32, "cosine"), {"head_options": {"scale": 30.0, "learn_scale": False}, **SMALL}),
    ],
)
def test_a_saved_model_loads_with_its_card(tmp_path, arguments, options):
    model = create_model(*arguments, **options).eval()
    written = save_model(model, tmp_path / "model.safetensors", CLASSES, {"epoch": 3}, mean=(0.1, 0.2, 0.3))
    again, card = load_model(tmp_path / "model.safetensors")
    assert card == written == read_card(tmp_path / "model.safetensors")
    assert card.classes == tuple(CLASSES)
    assert card.facts == {"epoch": 3}
    assert again.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    size = card.img_size if isinstance(card.img_size, tuple) else (card.img_size, card.img_size)
    images = torch.randn(2, 3, *size)
    assert torch.equal(model(images), again(images))
    assert not again.training
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_compiled_model_is_saved_without_its_wrapper(tmp_path):
    model = create_model("vit_tiny_patch16", 3, 32, **SMALL)
    save_model(torch.compile(model), tmp_path / "model.safetensors")
    again, _ = load_model(tmp_path / "model.safetensors")
    assert torch.equal(again.head.weight, model.head.weight)


def test_what_cannot_be_described_is_not_written(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(UsageError, match="2 class names for a model of 3 classes"):
        save_model(create_model("resnet18", 3), path, ["a", "b"])
    with pytest.raises(UsageError, match="not made by create_model"):
        save_model(torch.nn.Linear(2, 2), path)
    with pytest.raises(UsageError, match="cannot be described"):
        save_model(create_model("resnet18", 3), path, facts={"when": object()})
    assert not path.exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": 2}, "has format 2"),
        ({"format": None}, "has format None"),
        ({"colour": 1, "taste": 2}, "unknown keys: colour, taste"),
        ({"num_classes": 10**12}, "card's num_classes is invalid"),
        ({"num_classes": True}, "card's num_classes is invalid"),
        ({"num_classes": "3"}, "card's num_classes is invalid"),
        ({"img_size": [32, 32, 32]}, "card's img_size is invalid"),
        ({"img_size": 10**6}, "card's img_size is invalid"),
        ({"classes": ["a"]}, "1 class names for a model of 3"),
        ({"classes": [1, 2, 3]}, "card's classes is invalid"),
        ({"std": [0, 1, 1]}, "card's std is invalid"),
        ({"mean": "grey"}, "card's mean is invalid"),
        ({"options": {"depth": 10**9}}, "card's options is invalid"),
        ({"options": {"checkpoint_path": "/etc/passwd"}}, "checkpoint_path"),
        ({"options": {"pretrained": True}}, "pretrained"),
        ({"options": {"head_options": {}}}, "head_options"),
        ({"options": {"embed_dim": -5}}, "cannot be built"),
        ({"options": {"num_heads": 0}}, "cannot be built"),
        ({"options": [1]}, "card's options is invalid"),
        ({"name": "hf-hub:someone/model"}, "cannot be built"),
        ({"name": "local-dir:/tmp"}, "cannot be built"),
        ({"name": "nonsense"}, "cannot be built"),
        ({"head": "nonsense"}, "cannot be built"),
        ({"norm_eps": "small"}, "card's norm_eps is invalid"),
    ],
)
def test_wrong_cards_are_refused(tmp_path, good_card, change, sentence):
    with pytest.raises(UsageError, match=sentence):
        load_model(write(tmp_path / "model.safetensors", good_card | change))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16", {"depth": 16384}),
        ("vit_tiny_patch16", {"depth": 2000, "embed_dim": 16384, "num_heads": 16}),
        ("vit_tiny_patch16", {"embed_dim": 16384, "num_heads": 16, "depth": 4}),
        ("resnet50", {"layers": [16384] * 4}),
        ("resnet50", {"layers": [3, 3, 3, 3], "channels": [16384] * 4}),
        ("swin_tiny_patch4_window7_224", {"depths": [1000] * 8}),
        ("convnext_tiny", {"depths": [16384] * 4, "dims": [16384] * 4}),
    ],
)
def test_cards_of_models_larger_than_their_file_are_refused(tmp_path, good_card, name, options):
    card = good_card | {"name": name, "img_size": 224, "options": options}
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UsageError, match="it has more weights than the file"):
        load_model(write(tmp_path / "model.safetensors", card))
    assert time.monotonic() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path, good_card, value):
    model = create_model("vit_tiny_patch16", 3, 32, **SMALL)
    with torch.no_grad():
        model.head.bias[1] = value
    save_model(model, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"1 of its tensors have values that are not finite, such as head\.bias"):
        load_model(tmp_path / "model.safetensors")


def test_files_of_very_many_tensors_are_refused(tmp_path, good_card):
    tensors = {f"t{number}": torch.zeros(0) for number in range(20_001)}
    with pytest.raises(UsageError, match="it has 20,001 tensors, and no model has"):
        load_model(write(tmp_path / "model.safetensors", good_card, tensors))


def test_class_names_that_act_on_a_terminal_are_refused(tmp_path, good_card):
    with pytest.raises(UsageError, match="card's classes is invalid") as caught:
        load_model(write(tmp_path / "model.safetensors", good_card | {"classes": ["a", "b", "\x1b[31mc"]}))
    assert "\x1b" not in str(caught.value)


def test_a_card_is_needed_with_the_keys_that_build_a_model(tmp_path, good_card):
    (tmp_path / "bare.safetensors").write_bytes(save({"weight": torch.zeros(2)}))
    with pytest.raises(UsageError, match="without a card"):
        load_model(tmp_path / "bare.safetensors")
    for text in ("nonsense", "[1]", "[" * 100_000):
        with pytest.raises(UsageError, match="its card is"):
            load_model(write(tmp_path / "model.safetensors", text))
    del good_card["num_classes"]
    with pytest.raises(UsageError, match="card lacks num_classes"):
        load_model(write(tmp_path / "model.safetensors", good_card))


def test_weights_must_be_those_of_the_card(tmp_path):
    model = create_model("vit_tiny_patch16", 3, 32, **SMALL)
    save_model(model, tmp_path / "model.safetensors")
    card, weights = read_card(tmp_path / "model.safetensors").to_json(), model.state_dict()
    path = tmp_path / "other.safetensors"
    with pytest.raises(UsageError, match="no weights called extra"):
        load_model(write(path, card, weights | {"extra": torch.zeros(1)}))
    with pytest.raises(UsageError, match=r"missing: head\.bias"):
        load_model(write(path, card, {key: value for key, value in weights.items() if key != "head.bias"}))
    with pytest.raises(UsageError, match=r"head\.bias is \(4,\), its card's model has \(3,\)"):
        load_model(write(path, card, weights | {"head.bias": torch.zeros(4)}))


def test_a_card_of_a_giant_is_refused_without_building_it(tmp_path):
    card = {"format": 1, "name": "vit_giant_patch14_224", "num_classes": 1_000_000, "img_size": 8190}
    with pytest.raises(UsageError, match="it has more weights than the file"):
        load_model(write(tmp_path / "model.safetensors", card))


@pytest.mark.parametrize(
    "content",
    [b"", b"short", b"\xff" * 100, (2**40).to_bytes(8, "little") + b"{}", (5).to_bytes(8, "little") + b"[1,2]"],
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match="is not a weights file"):
        load_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "entry", [3, {}, {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 4]}, {"dtype": "F32", "shape": [-1]}]
)
def test_damaged_headers_are_refused(tmp_path, good_card, entry):
    header = json.dumps({"__metadata__": {"animesion": json.dumps(good_card)}, "weight": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(UsageError, match="damaged"):
        load_model(tmp_path / "model.safetensors")


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(create_model("vit_tiny_patch16", 3, 32, **SMALL), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UsageError, match="cannot be read"):
        load_model(path)
    with pytest.raises(UsageError, match="No such file"):
        load_model(tmp_path / "absent.safetensors")
    with pytest.raises(UsageError, match="is a folder without weights"):
        load_model(tmp_path)
