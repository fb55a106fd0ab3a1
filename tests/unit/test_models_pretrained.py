"""Weights from files and over the network: adapted, with a sentence for a new head, and never unpickled."""

from __future__ import annotations

import socket
from typing import Any

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from animesion.errors import AnimesionError, UsageError
from animesion_training import create_model
from animesion_training.models import load_weights

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3}


@pytest.fixture(scope="module")
def host():
    """A plain vision transformer of timm, 64 pixels, 5 classes."""
    torch.manual_seed(1)
    return timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=5, **SMALL).eval()


@pytest.fixture(scope="module")
def host_file(host, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "host.safetensors"
    save_file(host.state_dict(), path)
    return path


def test_a_file_of_timms_names_gives_the_same_logits(host, host_file):
    model = create_model("vit_tiny_patch16", 5, 64, pretrained=host_file, **SMALL).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(images), host(images))


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: {"state_dict": {f"module.{k}": v for k, v in d.items()}}])
def test_pytorch_archives_are_read_without_unpickling(host, tmp_path, wrap):
    torch.save(wrap(host.state_dict()), tmp_path / "host.pth")
    model = create_model("vit_tiny_patch16", 5, 64, pretrained=tmp_path / "host.pth", **SMALL)
    assert torch.equal(model.blocks[1].attn.qkv.weight, host.blocks[1].attn.qkv.weight)


def test_position_embeddings_are_resampled_as_timm_does(host, host_file):
    model = create_model("vit_tiny_patch16", 5, 96, pretrained=host_file, **SMALL)
    expected = resample_abs_pos_embed(host.pos_embed, new_size=[6, 6], old_size=[4, 4], num_prefix_tokens=1)
    assert torch.allclose(model.pos_embed, expected)


def test_a_classifier_of_other_classes_is_replaced_with_a_sentence(host, host_file, caplog):
    model = create_model("vit_tiny_patch16", 9, 64, pretrained=host_file, **SMALL)
    assert model.head.weight.shape == (9, 48)
    assert torch.equal(model.norm.weight, host.norm.weight)
    assert "its classifier of 5 classes was left out, a new one of 9 classes" in caplog.text


def test_a_fitting_classifier_can_be_left_out(host, host_file):
    model = create_model("vit_tiny_patch16", 5, 64, **SMALL)
    before = model.head.weight.clone()
    assert "left out" in load_weights(model, host_file, new_head=True)
    assert torch.equal(model.head.weight, before)
    assert "with the classifier" in load_weights(model, host_file)
    assert torch.equal(model.head.weight, host.head.weight)


@pytest.mark.parametrize("head", ["ifa", "cosine"])
def test_weights_of_the_bare_backbone_load_with_another_head(host, host_file, head, caplog):
    model = create_model("vit_tiny_patch16", 5, 96, head, pretrained=host_file, **SMALL)
    inner = model.backbone if head == "ifa" else model
    assert torch.equal(inner.blocks[0].mlp.fc1.weight, host.blocks[0].mlp.fc1.weight)
    assert "of 5 classes was left out" in caplog.text


def test_an_ifa_file_loads_completely_at_another_size(tmp_path):
    model = create_model("vit_tiny_patch16", 5, 64, "ifa", **SMALL)
    save_file(model.state_dict(), tmp_path / "ifa.safetensors")
    again = create_model("vit_tiny_patch16", 5, 32, "ifa", pretrained=tmp_path / "ifa.safetensors", **SMALL)
    assert torch.equal(again.head.fc.weight, model.head.fc.weight)
    assert again.backbone.pos_embed.shape == (1, 5, 48)


def test_weights_of_another_architecture_are_named(host_file):
    with pytest.raises(UsageError, match=r"another model: .* missing \(bn1\.bias, .*; .* unknown \(blocks\.0"):
        create_model("resnet18", 5, pretrained=host_file)
    with pytest.raises(UsageError, match=r"of another shape \(blocks\.0\.attn\.proj\.bias \(48,\) for \(96,\)"):
        create_model("vit_tiny_patch16", 5, 64, pretrained=host_file, depth=2, embed_dim=96, num_heads=3)


def test_timm_loads_the_backbones_weights_under_our_names(host, host_file):
    overlay = {"file": str(host_file), "hf_hub_id": None, "num_classes": 5}
    model = timm.create_model(
        "vit_tiny_patch16_ifa", pretrained=True, pretrained_cfg_overlay=overlay, img_size=32, num_classes=9, **SMALL
    )
    assert torch.equal(model.backbone.blocks[1].norm1.weight, host.blocks[1].norm1.weight)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 9)


class Trap:
    def __reduce__(self):
        return (open, ("sprung", "w"))


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Trap()}, "trap.pth")
    with pytest.raises(UsageError, match="could run code"):
        create_model("resnet18", 5, pretrained="trap.pth")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("absent.pth", None, "weight file not found"),
        ("model.npz", b"", "not an intact NumPy archive"),
        ("model.onnx", b"\x08", "neither a safetensors file, nor an archive"),
        ("model.safetensors", b"\xff" * 64, "not an intact safetensors"),
        ("model.pth", b"PK\x03\x04garbage", "not an intact PyTorch archive|could run code"),
        ("empty.pt", b"", "not an intact PyTorch archive"),
    ],
)
def test_files_without_weights_are_refused(tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=sentence):
        create_model("resnet18", 5, pretrained=tmp_path / name)


def test_archives_of_other_things_are_refused(tmp_path):
    for content in ([1, 2], {}, {"epoch": 3}):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(UsageError, match=r"no weights by name|is not a tensor"):
            create_model("resnet18", 5, pretrained=tmp_path / "other.pt")


def test_without_a_network_the_error_is_immediate(monkeypatch, tmp_path):
    def unreachable(*arguments, **options):
        raise OSError(101, "Network is unreachable")

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "create_connection", unreachable)
    for name in ("resnet18", "vit_tiny_patch16_ifa"):
        with pytest.raises(AnimesionError, match=f"weights of {name} are not in the cache") as caught:
            create_model(name, 5, pretrained=True)
        assert "pretrained=PATH" in str(caught.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AnimesionError, match="does not answer"):
        create_model("resnet18", 5, pretrained=True)


def test_a_failing_download_is_one_sentence(monkeypatch):
    from animesion_training.models import pretrained

    def broken(*arguments, **options):
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(pretrained, "_hub_answers", lambda: True)
    monkeypatch.setattr(timm, "create_model", broken)
    with pytest.raises(AnimesionError, match=r"cannot be downloaded \(ConnectionResetError\)"):
        create_model("resnet18", 5, pretrained=True)


def test_models_without_published_weights_have_none_to_download():
    name = next(name for name in timm.list_models("vit_*") if not timm.is_model_pretrained(name))
    with pytest.raises(UsageError, match="no weights were published"):
        create_model(name, 5, pretrained=True)
