"""Networks from checkpoints that describe them: of timm's trainer, of the originals, and in timm's hub layout."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from safetensors.torch import save_file

from animesion.errors import UsageError
from animesion_training import create_model, load_model
from animesion_training.originals.backbones import BACKBONES

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5,) * 3, (0.5,) * 3)


def shaken(model: Any) -> Any:
    """The model in evaluation mode, with norms and biases that differ."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.dtype.is_floating_point and value.ndim == 1:  # norms and biases, which start at 0 and 1
                value.add_(0.05 * torch.rand(value.shape, generator=generator))
    return model.eval()


def images(side: int) -> Any:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3))


# -- timm's trainer --------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_timms_trainer_is_a_model(tmp_path, caplog):
    torch.manual_seed(1)
    trained = shaken(timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=7, **SMALL))
    args = argparse.Namespace(
        model="vit_tiny_patch16_224", img_size=64, num_classes=None, mean=[0.5, 0.4, 0.3], crop_pct=0.9, gp=None
    )
    args.model_kwargs, args.device = SMALL, torch.device("cpu")
    worse = {key: value * 0 for key, value in trained.state_dict().items()}
    content = {"epoch": 4, "arch": args.model, "state_dict": worse, "state_dict_ema": trained.state_dict()}
    torch.save(content | {"optimizer": {}, "version": 2, "args": args, "metric": 81.5}, tmp_path / "model_best.pth.tar")
    model, card = load_model(tmp_path / "model_best.pth.tar")
    assert torch.equal(model(images(64)), trained(images(64)))
    assert (card.name, card.num_classes, card.img_size) == ("vit_tiny_patch16_224", 7, 64)
    assert (card.mean, card.std, card.crop_pct) == ((0.5, 0.4, 0.3), (0.5, 0.5, 0.5), 0.9)
    assert card.facts == {"epoch": 4, "accuracy": 81.5}
    assert "the average under 'state_dict_ema' was taken" in caplog.text
    assert "it has no class names" in caplog.text


def test_a_checkpoint_of_a_network_that_timm_lacks_is_refused(tmp_path):
    torch.save({"arch": "vit_of_mine", "state_dict": {"w": torch.zeros(2)}}, tmp_path / "a.pth")
    with pytest.raises(UsageError, match="network called 'vit_of_mine', which timm does not have"):
        load_model(tmp_path / "a.pth")
    args = argparse.Namespace(model_kwargs={"embed_dim": 10**9})
    weights = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=2, **SMALL).state_dict()
    torch.save({"arch": "vit_tiny_patch16_224", "state_dict": weights, "args": args}, tmp_path / "a.pth")
    with pytest.raises(UsageError, match="describes a model of unreasonable size"):
        load_model(tmp_path / "a.pth")
    torch.save(weights, tmp_path / "a.pth")
    with pytest.raises(UsageError, match="nothing that describes their network: load them with `create_model"):
        load_model(tmp_path / "a.pth")


def test_timms_hub_layout_is_a_model_with_class_names(tmp_path):
    trained = shaken(timm.create_model("resnet18", num_classes=2))
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    inputs = {"input_size": [3, 64, 64], "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "crop_pct": 1.0}
    config = {"architecture": "resnet18", "num_classes": 2, "pretrained_cfg": inputs, "label_names": ["rei", "asuka"]}
    config["model_args"] = {"num_classes": 2, "drop_rate": 0.1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, card = load_model(tmp_path)
    assert torch.equal(model(images(64)), trained(images(64)))
    assert (card.classes, card.img_size, card.mean) == (("rei", "asuka"), 64, (0.1, 0.2, 0.3))


# -- the originals ---------------------------------------------------------------------------------------------------


def settings(name: str, side: int, **others: Any) -> argparse.Namespace:
    """The flags of a run of FGIR-Backbones, as its checkpoints hold them."""
    flags = {"model_name": name, "image_size": side, "num_classes": 4, "dataset_name": "aircraft"}
    return argparse.Namespace(**flags, custom_mean_std=False, selector=None, device=torch.device("cuda"), **others)


def released(path: Any, config: Any, weights: Any) -> None:
    torch.save({"config": config, "epoch": 50, "model": weights, "accuracy": 90.5}, path)


def old_swin(weights: Any) -> dict[str, Any]:
    """Swin's weights under the names of timm 0.6: downsampling ends a stage, and computed tensors are stored."""
    named = {}
    for key, value in weights.items():
        stage = key.split(".")[1] if key.startswith("layers.") else ""
        named[key.replace(f"layers.{stage}.downsample", f"layers.{int(stage or 1) - 1}.downsample")] = value
        if key.endswith("relative_position_bias_table"):
            named[key.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.int64)
    named["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    return named


def own_dialect(weights: Any) -> dict[str, Any]:
    """A transformer's weights under the names of the originals' own class."""
    table = {
        "cls_token": "class_token",
        "pos_embed": "positional_embedding.pos_embedding",
        "patch_embed.proj.": "patch_embedding.",
        "blocks.": "transformer.blocks.",
        ".attn.proj.": ".proj.",
        ".mlp.": ".pwff.",
        "norm.weight": "encoder_norm.weight",
        "norm.bias": "encoder_norm.bias",
    }
    named = {}
    for key, value in weights.items():
        name = key
        for mine, theirs in table.items():
            if not mine.startswith("norm.") or key.startswith("norm."):
                name = name.replace(mine, theirs)
        if ".qkv." in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                named[name.replace("qkv", f"proj_{letter}")] = part
        else:
            named[name] = value
    return named


#: Name in the originals -> our options, side of images, prefix of the encoder and names of its weights.
CAL: dict[str, tuple[dict[str, Any], int, str, Any]] = {
    "tv_resnet34": ({}, 64, "encoder.", dict),
    "vgg19_bn": ({}, 32, "encoder.", dict),
    "resnetv2_101": ({"layers": (1, 1, 1, 1)}, 64, "encoder.", dict),
    "convnext_base": ({"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)}, 64, "encoder.", dict),
    "swin_base_patch4_window7_224_in22k": (
        {"depths": (2, 2), "embed_dim": 16, "num_heads": (1, 1)},
        224,
        "encoder.0.",
        old_swin,
    ),
    "deit3_base_patch16_224": (SMALL | {"class_token": False, "global_pool": ""}, 64, "encoder.0.", dict),
    "beitv2_base_patch16_224_in22k": (SMALL, 64, "encoder.0.", dict),
    "vit_b16": (SMALL | {"class_token": False, "global_pool": ""}, 64, "encoder.0.", own_dialect),
    "van_b3": ({"widths": (8, 8, 16, 24), "depths": (1, 1, 2, 1)}, 64, "encoder.0.", dict),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "vgg19_bn" else name for name in CAL]
)
def test_cal_releases_are_loaded_as_they_are(tmp_path, monkeypatch, name, caplog):
    options, side, encoder, rename = CAL[name]
    architecture = BACKBONES.get(name, name).partition(".")[0]
    eps = 1e-12 if name == "vit_b16" else None
    trained: Any = shaken(create_model(architecture, 4, side, selector="cal", norm_eps=eps, **options))
    parts = trained.state_dict()
    backbone = {key.removeprefix("backbone."): value for key, value in parts.items() if key.startswith("backbone.")}
    weights = {f"model.{encoder}{key}": value for key, value in rename(backbone).items()}
    weights |= {f"model.dfsm.{key.removeprefix('head.')}": v for key, v in parts.items() if key.startswith("head.")}
    released(tmp_path / "aircraft_cal.pth", settings(name, side), weights)
    small = {key: value for key, value in options.items() if key not in ("class_token", "global_pool")}
    build = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: build(*a, **(small | k)))  # the published sizes are large
    model, card = load_model(tmp_path / "aircraft_cal.pth")
    assert torch.allclose(model(images(side)), trained(images(side)), atol=1e-5)
    assert (card.num_classes, card.img_size, (card.mean, card.std)) == (4, side, IMAGENET)
    assert card.crop_pct == side / {32: 36, 64: 72, 224: 300}[side]
    assert card.facts == {"epoch": 50, "accuracy": 90.5}
    assert f"{name} of the originals with 4 classes" in caplog.text


@pytest.mark.parametrize("name", ["resnet18", "tv_resnet34", "resnetv2_101", "van_b3", "deit3_base_patch16_224"])
def test_fine_tuned_releases_are_loaded_as_they_are(tmp_path, monkeypatch, name):
    small = {
        "resnetv2_101": {"layers": (1, 1, 1, 1)},
        "deit3_base_patch16_224": SMALL,
        "van_b3": {"widths": (8, 8, 16, 24), "depths": (1, 1, 2, 1)},
    }.get(name, {})
    side, architecture = 64, BACKBONES.get(name, name).partition(".")[0]
    trained: Any = shaken(create_model(architecture, 4, side, **small))
    classifier = trained.pretrained_cfg["classifier"]
    weights = {}
    for key, value in trained.state_dict().items():
        last = key.startswith(f"{classifier}.")
        where = f"head.head.{key.rpartition('.')[2]}" if last else f"model.{key}"
        weights[where] = value.flatten(1) if last and value.ndim == 4 else value
    config = settings(name, side, test_resize_directly=True)
    config.custom_mean_std = True
    released(tmp_path / "cub_ft.pth", config, weights)
    build = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: build(*a, **(small | k)))
    model, card = load_model(tmp_path / "cub_ft.pth")
    assert torch.allclose(model(images(side)), trained(images(side)), atol=1e-5)
    assert ((card.mean, card.std), card.crop_pct) == (HALF, 1.0)


def test_what_the_file_lacks_is_said(tmp_path, caplog):
    config = settings("resnet18", 64)
    config.custom_mean_std, config.dataset_name = True, "cub"
    trained = create_model("resnet18", 4, 64)
    weights = {f"model.{key}".replace("model.fc", "head.head"): value for key, value in trained.state_dict().items()}
    released(tmp_path / "a.pth", config, weights)
    load_model(tmp_path / "a.pth")
    assert "mean and deviation are 0.5, and not those of cub" in caplog.text


@pytest.mark.parametrize("name", sorted(set(BACKBONES)))
def test_the_table_of_names_is_of_timm(name):
    architecture, _, tag = BACKBONES[name].partition(".")
    assert timm.is_model(architecture)
    assert tag
