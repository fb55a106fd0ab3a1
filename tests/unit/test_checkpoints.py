"""Checkpoints of other trainers: what was understood is said, nothing is run, and nothing is guessed in silence."""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
import re
import zipfile
from typing import Any

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from animesion.checkpoints import read_checkpoint
from animesion.errors import UsageError
from animesion_training import create_model, save_model
from animesion_training.models import load_weights

SMALL: dict[str, Any] = {"depth": 4, "embed_dim": 48, "num_heads": 3}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


class Settings:
    """An object of a trainer's own class, in a module that readers do not have."""

    def __init__(self) -> None:
        self.folder, self.history = pathlib.PurePosixPath("/data"), collections.deque([1.0])


class Table(dict[str, object]):
    """A table with attributes, as several packages for settings have."""


def network(kind: str = "vit") -> Any:
    torch.manual_seed(1)
    if kind == "resnet":
        return timm.create_model("resnet18", num_classes=5).eval()
    return timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=5, **SMALL).eval()


def again(path: pathlib.Path, kind: str = "vit") -> tuple[Any, str]:
    """A new network with the weights of a file, and the sentence on them."""
    model: Any = (
        create_model("resnet18", 5, 64) if kind == "resnet" else create_model("vit_tiny_patch16", 5, 64, **SMALL)
    )
    return model, load_weights(model.eval(), path)


def prefixed(prefix: str, weights: Any) -> dict[str, Any]:
    return {f"{prefix}{key}": value for key, value in weights.items()}


WEIGHTS = network().state_dict()
WORSE = {key: value * 0 for key, value in WEIGHTS.items()}
TABLE = Table(inner=Table(depth=2))
TABLE.frozen = True  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "best.pth.tar",
            {"state_dict": prefixed("module.", WEIGHTS), "epoch": 3},
            "'state_dict'; prefix 'module.' cut",
        ),
        ("pytorch_model.bin", WEIGHTS, "all weights of the network loaded, with the classifier"),
        ("run.pt", {"model_state_dict": WEIGHTS, "loss": 0.5}, "weights under 'model_state_dict'"),
        ("run.pth", {"state_dict": WORSE, "state_dict_ema": WEIGHTS}, "the average under 'state_dict_ema' was taken"),
        ("other.pth", {"my_weights": WEIGHTS, "optimizer": {"state": {}}}, "weights under 'my_weights'"),
        ("nested.pth", {"model": {"state_dict": WEIGHTS}}, "weights under 'model.state_dict'"),
        (
            "last.ckpt",
            {
                "state_dict": prefixed("model.", WEIGHTS) | {"criterion.weight": torch.ones(5)},
                "hyper_parameters": TABLE,
                "callbacks": {"early": Settings()},
                "loops": collections.defaultdict(list),
            },
            "prefix 'model.' cut; 1 tensor outside of it left out (criterion.weight)",
        ),
        (
            "partly.ckpt",
            {key if key.startswith("head") else f"net.{key}": value for key, value in WEIGHTS.items()},
            "prefix 'net.' cut",
        ),
        (
            "averaged.ckpt",
            {"state_dict": prefixed("model.", WORSE) | prefixed("ema_model.module.", WEIGHTS)},
            "that under 'ema_model.module.' was taken",
        ),
        (
            "author.pth",
            {"config": argparse.Namespace(lr=0.1, obj=Settings()), "model": WEIGHTS, "accuracy": np.float64(91.5)},
            "weights under 'model'",
        ),
        ("extra.pth", {**WEIGHTS, "epoch": 3}, "epoch left out, which is no tensor"),
    ],
)
@pytest.mark.parametrize("modern", [True, False])
def test_files_of_trainers_are_read_and_the_sentence_says_how(tmp_path, name, content, said, modern):
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=modern)
    model, sentence = again(tmp_path / name)
    assert said in sentence
    assert torch.equal(model(IMAGES), network()(IMAGES))


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: {"model": model, "epoch": 1}])
def test_a_whole_network_is_read_without_its_code(tmp_path, wrap):
    torch.save(wrap(network("resnet")), tmp_path / "whole.pth")
    model, sentence = again(tmp_path / "whole.pth", "resnet")
    assert "weights of a whole network, whose code was not run" in sentence
    assert torch.equal(model(IMAGES), network("resnet")(IMAGES))


def test_files_before_counters_of_batch_norms_are_read(tmp_path):
    old = {key: value for key, value in network("resnet").state_dict().items() if "num_batches_tracked" not in key}
    torch.save(old, tmp_path / "old.pth")
    model, sentence = again(tmp_path / "old.pth", "resnet")
    assert "20 counters of batch norms start at 0" in sentence
    assert torch.equal(model(IMAGES), network("resnet")(IMAGES))


def test_settings_and_facts_are_plain_values(tmp_path):
    config = argparse.Namespace(model_name="vit", image_size=64, path=Settings(), nested={"lr": 0.1, 3: 4})
    content = {"config": config, "model": WEIGHTS, "epoch": 7, "accuracy": np.float64(91.5), "arch": "resnet18"}
    torch.save(content, tmp_path / "a.pth")
    found = read_checkpoint(tmp_path / "a.pth")
    assert found.settings == {"model_name": "vit", "image_size": 64, "path": {}, "nested": {"lr": 0.1}}
    assert found.facts == {"epoch": 7, "accuracy": 91.5}
    assert (found.architecture, found.img_size) == ("resnet18", (64, 64))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"student": WEIGHTS, "teacher": WEIGHTS}, "weights under 'student', 'teacher', and nothing says which"),
        ({"state_dict": prefixed("a.", WEIGHTS) | prefixed("b.", WEIGHTS)}, "networks under 'a.', 'b.', which all fit"),
        (prefixed("net.", WEIGHTS) | {"head.weight": torch.ones(5, 48)}, "head.weight twice"),
        ({"epoch": 3, "model": {}}, "no weights by name"),
        ([1, 2], "no weights by name"),
    ],
)
def test_what_is_ambiguous_is_refused(tmp_path, content, sentence):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UsageError, match=re.escape(sentence)):
        again(tmp_path / "a.pth")


class Trap:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


@pytest.mark.parametrize("modern", [True, False])
@pytest.mark.parametrize(
    ("call", "arguments", "named"),
    [
        (os.system, ("touch sprung",), r"(posix|nt)\.system"),
        (eval, ("open('sprung', 'w')",), r"builtins\.eval"),
        (open, ("sprung", "w"), r"_?io\.open"),
    ],
)
def test_code_is_refused_and_not_run(tmp_path, monkeypatch, call, arguments, named, modern):
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": WEIGHTS, "extra": Trap(call, *arguments)}
    torch.save(content, "trap.pth", _use_new_zipfile_serialization=modern)
    with pytest.raises(UsageError, match=f"contains {named}, which could run code"):
        again(tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


def test_an_unknown_call_is_not_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": WEIGHTS, "extra": Trap(pathlib.Path("sprung").touch)}, "trap.pth")
    with pytest.raises(UsageError, match="could run code"):  # a bound method is pickled with getattr
        read_checkpoint("trap.pth")
    torch.save({"state_dict": WEIGHTS, "extra": Trap(shout, "x")}, "trap.pth")
    assert read_checkpoint("trap.pth").tensors.keys() == WEIGHTS.keys()
    assert not SHOUTED


SHOUTED: list[str] = []


def shout(word: str) -> str:
    SHOUTED.append(word)
    return word


def test_files_that_are_something_else_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "program.pt", "w") as archive:
        archive.writestr("program/constants.pkl", b"")
    with pytest.raises(UsageError, match="is a TorchScript program"):
        read_checkpoint(tmp_path / "program.pt")
    (tmp_path / "pointer.pth").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(UsageError, match="pointer of Git LFS"):
        read_checkpoint(tmp_path / "pointer.pth")


def test_a_safetensors_header_that_begins_like_a_pickle_is_no_pickle(tmp_path):
    # the first byte is the lowest of the header's length: 0x80 for one of 256 files
    for pad in range(300):
        path = tmp_path / "a.safetensors"
        save_file({"w": torch.zeros(1)}, path, {"pad": "x" * pad})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert read_checkpoint(path).tensors["w"].shape == (1,)


@pytest.fixture(scope="module")
def small_files(tmp_path_factory) -> list[bytes]:
    """One small intact file of each format."""
    root = tmp_path_factory.mktemp("small")
    weights = {"a.weight": torch.randn(4, 3), "a.bias": torch.zeros(4)}
    content = {"state_dict": weights, "args": argparse.Namespace(a=1, b=Settings()), "acc": np.float64(2)}
    torch.save(content, root / "zip.pth")
    torch.save(content, root / "old.pth", _use_new_zipfile_serialization=False)
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), root / "whole.pth")
    save_file(weights, root / "a.safetensors", {"animesion": '{"img_size": [3, 4]}'})
    arrays = {"embedding/kernel": np.zeros((2, 2, 3, 4)), "Transformer/encoder_norm/scale": np.zeros(4)}
    np.savez(root / "a.npz", **arrays)
    return [path.read_bytes() for path in sorted(root.iterdir())]


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_damaged_files_are_read_or_refused_in_one_sentence(small_files, tmp_path_factory, data):
    content = bytearray(data.draw(st.sampled_from(small_files)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, max(0, len(content) - 1)))
        kind = data.draw(st.sampled_from(["change", "cut", "insert"]))
        if kind == "change" and content:
            content[place] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del content[place:]
        else:
            content[place:place] = data.draw(st.binary(max_size=8))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    tensors, refusal = [], ""
    try:
        tensors = list(read_checkpoint(path).tensors.values())
    except UsageError as error:
        refusal = str(error).strip()
    assert refusal or tensors
    assert "\n" not in refusal
    assert all(isinstance(value, torch.Tensor) for value in tensors)


# -- positions -------------------------------------------------------------------------------------------------------


def test_positions_of_a_turned_image_are_resampled_and_not_transposed(tmp_path):
    tall = create_model("vit_tiny_patch16", 5, (96, 64), **SMALL)
    save_model(tall, tmp_path / "tall.safetensors")
    wide: Any = create_model("vit_tiny_patch16", 5, (64, 96), **SMALL)
    sentence = load_weights(wide, tmp_path / "tall.safetensors")
    expected = resample_abs_pos_embed(tall.pos_embed, new_size=[4, 6], old_size=[6, 4], num_prefix_tokens=1)
    assert torch.equal(wide.pos_embed, expected)
    assert "position embeddings resampled from 6x4 to 4x6 patches" in sentence
    same: Any = create_model("vit_tiny_patch16", 5, (96, 64), **SMALL)
    assert "resampled" not in load_weights(same, tmp_path / "tall.safetensors")
    assert torch.equal(same.pos_embed, tall.pos_embed)


@pytest.mark.parametrize("methods", [{"head": "ifa"}, {"adapter": "lora"}, {"selector": "cal"}])
def test_positions_inside_of_methods_are_resampled_as_well(tmp_path, methods):
    tall: Any = create_model("vit_tiny_patch16", 5, (96, 64), **methods, **SMALL)
    save_model(tall, tmp_path / "tall.safetensors")
    wide: Any = create_model("vit_tiny_patch16", 5, (64, 96), **methods, **SMALL)
    load_weights(wide, tmp_path / "tall.safetensors")
    [old] = [value for key, value in tall.state_dict().items() if key.endswith("pos_embed")]
    [new] = [value for key, value in wide.state_dict().items() if key.endswith("pos_embed")]
    assert torch.equal(new, resample_abs_pos_embed(old, new_size=[4, 6], old_size=[6, 4], num_prefix_tokens=1))


def test_a_file_without_its_size_is_taken_for_the_model_or_a_square(tmp_path):
    tall = timm.create_model("vit_tiny_patch16_224", img_size=(96, 64), num_classes=5, **SMALL)
    torch.save(tall.state_dict(), tmp_path / "tall.pth")
    model: Any = create_model("vit_tiny_patch16", 5, (64, 96), **SMALL)
    assert "taken as those of 4x6 patches" in load_weights(model, tmp_path / "tall.pth")
    with pytest.raises(UsageError, match="24 position embeddings are of no square image"):
        load_weights(create_model("vit_tiny_patch16", 5, 128, **SMALL), tmp_path / "tall.pth")
    torch.save({"model": tall.state_dict(), "args": argparse.Namespace(img_size=[96, 64])}, tmp_path / "stated.pth")
    model = create_model("vit_tiny_patch16", 5, 128, **SMALL)
    assert "from 6x4 to 8x8 patches" in load_weights(model, tmp_path / "stated.pth")


def test_relative_positions_of_a_turned_image_are_refused(tmp_path):
    small: dict[str, Any] = {"depth": 1, "embed_dim": 48, "num_heads": 3}
    save_model(create_model("beit_base_patch16_224", 5, (96, 64), **small), tmp_path / "tall.safetensors")
    wide = create_model("beit_base_patch16_224", 5, (64, 96), **small)
    with pytest.raises(UsageError, match="relative positions of images of 96x64 pixels"):
        load_weights(wide, tmp_path / "tall.safetensors")


# -- Google's files --------------------------------------------------------------------------------------------------


def google(model: Any, *, big_vision: bool = False) -> dict[str, Any]:
    """The weights of a transformer of timm under Google's names, and in Google's layout."""
    heads, width = model.blocks[0].attn.num_heads, model.embed_dim
    attention, mlp, second = ("_0", "_0", "_1") if big_vision else ("_1", "_3", "_2")
    w = {key: value.numpy() for key, value in model.state_dict().items()}
    named = {
        "cls": w["cls_token"],
        "embedding/kernel": w["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": w["patch_embed.proj.bias"],
        "pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding": w["pos_embed"],
        "Transformer/encoder_norm/scale": w["norm.weight"],
        "Transformer/encoder_norm/bias": w["norm.bias"],
        "head/kernel": w["head.weight"].T,
        "head/bias": w["head.bias"],
    }
    for i in range(len(model.blocks)):
        ours, theirs = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        for norm, name in ((f"{ours}.norm1", "LayerNorm_0"), (f"{ours}.norm2", f"LayerNorm{second}")):
            named |= {f"{theirs}/{name}/scale": w[f"{norm}.weight"], f"{theirs}/{name}/bias": w[f"{norm}.bias"]}
        place = f"{theirs}/MultiHeadDotProductAttention{attention}"
        kernels, biases = np.split(w[f"{ours}.attn.qkv.weight"], 3), np.split(w[f"{ours}.attn.qkv.bias"], 3)
        for part, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True):
            named |= {f"{place}/{part}/kernel": kernel.T.reshape(width, heads, -1)}
            named |= {f"{place}/{part}/bias": bias.reshape(heads, -1)}
        named[f"{place}/out/kernel"] = w[f"{ours}.attn.proj.weight"].T.reshape(heads, -1, width)
        named[f"{place}/out/bias"] = w[f"{ours}.attn.proj.bias"]
        for j in (0, 1):
            named[f"{theirs}/MlpBlock{mlp}/Dense_{j}/kernel"] = w[f"{ours}.mlp.fc{j + 1}.weight"].T
            named[f"{theirs}/MlpBlock{mlp}/Dense_{j}/bias"] = w[f"{ours}.mlp.fc{j + 1}.bias"]
    return {f"params/{key}": value for key, value in named.items()} if big_vision else named


@pytest.mark.parametrize("big_vision", [False, True])
def test_googles_files_are_read_as_timm_reads_them(tmp_path, big_vision):
    path = tmp_path / "ViT-Ti_16.npz"
    np.savez(path, **google(network(), big_vision=big_vision))
    by_timm = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=5, **SMALL).eval()
    by_timm.load_pretrained(str(path))
    model, sentence = again(path)
    assert "names of Google's vision transformer" in sentence
    assert torch.equal(model(IMAGES), network()(IMAGES))
    assert all(torch.equal(value, by_timm.state_dict()[key]) for key, value in model.state_dict().items())


def test_googles_files_start_methods_of_other_sizes(tmp_path):
    np.savez(tmp_path / "vit.npz", **google(network()))
    model: Any = create_model("vit_tiny_patch16", 9, 96, adapter="lora", pretrained=tmp_path / "vit.npz", **SMALL)
    expected = resample_abs_pos_embed(network().pos_embed, new_size=[6, 6], num_prefix_tokens=1)
    assert torch.equal(model.backbone.pos_embed, expected)


def test_hostile_numpy_archives_are_refused(tmp_path):
    path = tmp_path / "vit.npz"
    arrays = google(network())
    np.savez(path, **arrays | {"cls": np.array([Trap(shout, "npz")], dtype=object)})
    with pytest.raises(UsageError, match="not an intact NumPy archive of numbers"):
        read_checkpoint(path)
    np.savez_compressed(path, **arrays | {"bomb": np.zeros(50_000_000, np.uint8)})
    with pytest.raises(UsageError, match="not an intact NumPy archive of numbers"):
        read_checkpoint(path)
    np.savez(path, **{key: value for key, value in arrays.items() if "encoderblock_0/MlpBlock_3/Dense_1" not in key})
    with pytest.raises(UsageError, match="lacks Transformer/encoderblock_0/MlpBlock_3/Dense_1/kernel"):
        read_checkpoint(path)
    assert not SHOUTED
