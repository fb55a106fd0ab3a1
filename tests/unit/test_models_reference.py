"""Checkpoints of originals are read; the tests write their own, in the original's names."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")

from animesion.errors import UsageError
from animesion_training import create_model, from_reference, load_model, save_model
from animesion_training.originals import base

CONFIG = {"model_name": "b_16", "image_size": 32, "num_classes": 5, "num_attention_heads": 3}
TABLE = {
    "cls_token": "class_token",
    "pos_embed": "positional_embedding.pos_embedding",
    "patch_embed.proj.": "patch_embedding.",
    "blocks.": "transformer.blocks.",
    ".attn.proj.": ".proj.",
    ".mlp.": ".pwff.",
    "head.layers.": "inter_class_head.0.",
    "head.norm.": "inter_class_head.3.",
    "head.fc.": "inter_class_head.4.",
}


def ours(head, **sizes):
    torch.manual_seed(2)
    sizes = sizes or {"depth": 2, "embed_dim": 48, "num_heads": 3}
    model = create_model("vit_tiny_patch16", 5, 32, head, norm_eps=1e-12, **sizes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def in_the_originals_names(model):
    weights = {}
    for key, value in model.state_dict().items():
        name = key.removeprefix("backbone.")
        for mine, theirs in TABLE.items():
            name = name.replace(mine, theirs)
        if name.startswith(("head.", "norm.")):
            name = name.replace("head.", "fc.")
        if ".qkv." in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                weights[f"model.{name.replace('qkv', f'proj_{letter}')}"] = part
        else:
            weights[name if name.startswith("inter_class_head") else f"model.{name}"] = value
    return weights


@pytest.mark.parametrize("head", ["linear", "ifa"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_an_original_and_ours_have_equal_outputs(head, prefix):
    model = ours(head)
    weights = {f"{prefix}{key}": value for key, value in in_the_originals_names(model).items()}
    images = torch.randn(2, 3, 32, 32)
    again = from_reference(CONFIG, weights)
    assert not again.training
    assert again.num_classes == 5
    assert torch.allclose(again(images), model(images), atol=1e-6)
    assert again.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)


def test_a_published_size_can_be_saved_for_use(tmp_path):
    weights = in_the_originals_names(ours("ifa", drop_rate=0.0))
    model = from_reference({"model_name": "ti_16", "image_size": 32}, weights)
    save_model(model, tmp_path / "model.safetensors")
    again, card = load_model(tmp_path / "model.safetensors")
    assert (card.name, card.head, card.norm_eps) == ("vit_tiny_patch16", "ifa", 1e-12)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), again(images))


def test_another_image_size_resamples_position_embeddings():
    model = from_reference({**CONFIG, "image_size": 64}, in_the_originals_names(ours("ifa")))
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_unknown_parts_are_named():
    weights = in_the_originals_names(ours("ifa"))
    with pytest.raises(UsageError, match=r"beyond the plain vision transformer .* text_decoder\.weight"):
        from_reference(CONFIG, weights | {"text_decoder.weight": torch.zeros(2)})
    with pytest.raises(UsageError, match=r"belongs to none of the known families: .*animesion vision transformer"):
        from_reference({**CONFIG, "selector": "glsim"}, weights)
    with pytest.raises(UsageError, match="belongs to none of the known families"):
        from_reference({}, {"conv1.weight": torch.zeros(2)})
    with pytest.raises(UsageError, match="weights alone"):
        from_reference({}, {"state_dict": weights})
    with pytest.raises(UsageError, match=r"lacks transformer\.blocks\.0\.attn\.proj_k\.bias"):
        from_reference(CONFIG, {key: value for key, value in weights.items() if "0.attn.proj_k.bias" not in key})
    with pytest.raises(UsageError, match="no classifier"):
        from_reference(CONFIG, {key: value for key, value in weights.items() if "class_head" not in key})
    with pytest.raises(UsageError, match=r"do not match the .* backbone\.blocks\.1\.norm1\.bias"):
        from_reference(CONFIG, {key: value for key, value in weights.items() if "1.norm1.bias" not in key})


def test_special_families_are_asked_before_general_ones():
    families = [converter.family for converter in base._CONVERTERS]
    assert families == [
        "ViLT of Animesion",
        "ViTFS",
        "LRNet",
        "ILA model",
        "CAL head",
        "GLSim model",
        "CLCA model",
        "CAL teacher",
        "animesion vision transformer",
        "fine-tuned network",
    ]


def test_a_further_family_registers_itself(monkeypatch):
    monkeypatch.setattr(base, "_CONVERTERS", list(base._CONVERTERS))
    seen: dict[str, Any] = {}

    def build(config, weights, reference_compat):
        seen.update(config=config, weights=set(weights), compat=reference_compat)
        return torch.nn.Identity()

    base.register_converter(base.Converter("mine", lambda config, weights: "mine" in weights, build))
    from_reference({"a": 1}, {"module.mine": torch.zeros(1)}, reference_compat=False)
    assert seen == {"config": {"a": 1}, "weights": {"mine"}, "compat": False}
