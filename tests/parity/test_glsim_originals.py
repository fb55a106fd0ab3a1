"""GLSim and RAMS-Trans of the originals, loaded through `from_reference`.

The originals' outputs on small inputs where they are at hand; where not, networks of ours written in the originals'
names, which covers every option that a checkpoint's config can have.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")

from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional

from animesion.errors import UsageError
from animesion_training import from_reference
from animesion_training.tokens import TokenVisionTransformer
from animesion_training.tokens.rollout import class_rollout, rollout
from animesion_training.tokens.twopass import GLSim, RAMSTrans

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "fgir"
#: Those without a file here are skipped.
CASES = sorted(
    {
        "glsim_vit_cos_k8",
        "glsim_vit_cos_k1_degenerate",
        "glsim_vit_l2_k8",
        "glsim_timm_transformer_k8",
        "ila_glsim",
        "ila_ramstrans",
    }
    | {path.stem for path in GOLDEN.glob("glsim_*.safetensors") if "baseline" not in path.stem}
)
TOLERANCE = 2e-5


def read(case: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    path = GOLDEN / f"{case}.safetensors"
    if not path.is_file():
        pytest.skip("reference outputs not found")
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads((file.metadata() or {})["config"])
    weights = {key.removeprefix("sd."): value for key, value in tensors.items() if key.startswith("sd.")}
    return config, weights, tensors


@pytest.mark.parametrize("case", CASES)
def test_logits_selections_and_crops_equal_the_originals(case: str) -> None:
    config, weights, tensors = read(case)
    model = from_reference(config, weights)
    with torch.inference_mode():
        logits, tokens = model.trace(tensors["in.x"])
        assert torch.equal(model(tensors["in.x"]), logits)
    error = (logits - tensors["out.logits"]).abs().max().item()
    print(f"{case}: {error:.1e}")
    assert error <= TOLERANCE
    compared = []
    for key, found in tokens.trace.items():
        expected = tensors.get(f"out.{key}")
        if expected is None:
            continue
        compared.append(key)
        if found.is_floating_point():
            assert (found - expected).abs().max().item() <= TOLERANCE, key
        else:
            assert torch.equal(found, expected), key
    both = tensors.get("out.images_and_crops")
    if both is not None:
        torch.testing.assert_close(torch.cat([tensors["in.x"], tokens.trace["crops"]]), both)
    if case.startswith("glsim_vit"):
        assert len(compared) == 6


def test_corrected_boxes_have_one_patch_more_than_the_originals() -> None:
    config, weights, tensors = read("glsim_vit_cos_k8")
    original = tensors["out.crop_box_rows0_rows1_cols0_cols1"]
    found = from_reference(config, weights, reference_compat=False).select_crops(tensors["in.x"]).boxes
    assert torch.equal(found[:, 0::2], original[:, 0::2])
    assert torch.equal(found[:, 1::2] - config["patch"], original[:, 1::2].maximum(original[:, 0::2]))


def test_rollout_equals_the_originals() -> None:
    path = GOLDEN / "ops_unit.safetensors"
    if not path.is_file():
        pytest.skip("reference outputs not found")
    with safe_open(path, "pt") as file:
        weights, expected = file.get_tensor("rollout.attn"), file.get_tensor("rollout.out")
    torch.testing.assert_close(rollout(weights), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(class_rollout(weights), expected[:, 0], rtol=0, atol=1e-6)


# -- in the originals' names -------------------------------------------------------------------------------------------

#: Pattern of timm's name -> the original's own.
_OWN_NAMES = (
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "positional_embedding.pos_embedding"),
    (r"^patch_embed\.proj\.", "patch_embedding."),
    (r"^norm\.", "encoder_norm."),
    (r"^(blocks\.\d+)\.attn\.proj\.", r"encoder.\1.proj."),
    (r"^(blocks\.\d+)\.mlp\.", r"encoder.\1.pwff."),
    (r"^blocks\.", "encoder.blocks."),
)


def encoder(width: int = 64, heads: int = 4, num_classes: int = 0, eps: float = 1e-12, **options: Any) -> Any:
    norm = partial(nn.LayerNorm, eps=eps)
    options = {"img_size": 32, "patch_size": 8, "num_classes": 0, "norm_layer": norm, **options}
    backbone = VisionTransformer(embed_dim=width, depth=2, num_heads=heads, **options)
    return TokenVisionTransformer(backbone, {}, num_classes)


def varied(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def images() -> Any:
    coarse = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(4))
    return functional.interpolate(coarse, size=(32, 32), mode="bicubic")


def own_names(model: Any, head: str = "head.") -> dict[str, Any]:
    """Weights under the names of the originals' own transformer, with separate queries, keys and values."""
    weights: dict[str, Any] = {}
    for key, value in model.state_dict().items():
        name = key.removeprefix("encoder.").removeprefix("backbone.")
        if name.startswith("head."):
            name = name.replace("head.", head)
        elif name.startswith("aggregator."):
            _, number, rest = name.split(".", 2)
            rest = re.sub(r"^attn\.proj\.", "proj.", rest).replace("mlp.", "pwff.")
            last = int(number) == len(model.aggregator) - 1
            name = f"aggregator_norm.{rest}" if last else f"aggregator.blocks.{number}.{rest}"
        else:
            for pattern, theirs in _OWN_NAMES:
                name = re.sub(pattern, theirs, name)
        if ".qkv." in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                weights[name.replace("qkv", f"proj_{letter}")] = part
        else:
            weights[name] = value
    return weights


OWN: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "plain": (64, {}, {}),
    "l1": (64, {"metric": "l1"}, {"sim_metric": "l1"}),
    "average": (64, {"classifier": "avg"}, {"classifier": "avg_cls"}),
    "maximum": (64, {"classifier": "max"}, {"classifier": "max_cls"}),
    "two heads in the aggregator": (128, {}, {"agg_heads": 2}),
    "reduced": (96, {"representation": 64}, {"representation_size": 64}),
    "two blocks in the aggregator": (64, {"aggregator_depth": 2}, {}),
}


@pytest.mark.parametrize("case", OWN)
def test_options_of_the_originals_own_transformer_are_read(case: str) -> None:
    width, options, config = OWN[case]
    model = varied(GLSim(encoder(width), 5, top=3, reference_compat=True, **options))
    weights = own_names(model)
    for leaf in ("weight", "bias"):
        if f"reduce.{leaf}" in weights:
            weights[f"representation.{leaf}"] = weights.pop(f"reduce.{leaf}")
    weights["anchor_class_token"] = torch.randn(1, 1, width)
    again = from_reference({"model": "ViTGLSim", "image_size": 32, "heads": 4, "dynamic_top": 3, **config}, weights)
    assert isinstance(again, GLSim)
    torch.testing.assert_close(again(images()), model(images()))
    assert torch.equal(again.select_crops(images()).boxes, model.select_crops(images()).boxes)


ILA = {"model_name": "vit_b16", "num_attention_heads": 4, "image_size": 32, "ila": False, "selector": None}


def test_ilas_copy_begins_the_pass_over_crops_with_the_token_that_glsim_leaves_unused() -> None:
    model = varied(GLSim(encoder(), 5, top=8, crop_class_token=True, reference_compat=True))
    weights = own_names(model, "head.head.")
    weights["anchor_class_token"] = weights.pop("crop_class_token")
    config = {**ILA, "dynamic_anchor": True, "anchor_class_token": True, "aggregator": True, "selector_num_tokens": 8}
    again = from_reference(config, weights)
    torch.testing.assert_close(again(images()), model(images()))
    glsims = from_reference({key: value for key, value in config.items() if key != "ila"}, weights)
    assert glsims.crop_class_token is None
    assert not torch.allclose(glsims(images()), model(images()))


def test_ilas_copy_selects_twice_as_many_patches_of_large_images() -> None:
    weights = own_names(GLSim(encoder(img_size=448, patch_size=56), 5))
    config = {**ILA, "image_size": 448, "dynamic_anchor": True}
    assert from_reference(config, weights).top == 16
    assert from_reference({**config, "dynamic_top": 8}, weights).top == 8


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"attention_crop": True, "crop_attention_th": 0.9, "attention_pool_size": 2}, {"threshold": 0.9, "pool": 2}),
        (
            {"attention_crop": True, "crop_attention_th": 0.7, "crop_th_max": True, "attention_pool_size": 1},
            {"threshold": 0.7, "relative_to": "max", "pool": 1},
        ),
        ({"selector": "rollout", "selector_num_tokens": 3}, {"top": 3, "pool": 1}),
    ],
)
def test_rams_trans_is_read(config: dict[str, Any], options: dict[str, Any]) -> None:
    model = varied(RAMSTrans(encoder(num_classes=5), 5, reference_compat=True, **options))
    again = from_reference({**ILA, **config}, own_names(model, "head.head."))
    assert isinstance(again, RAMSTrans)
    torch.testing.assert_close(again(images()), model(images()))
    assert torch.equal(again.select_crops(images()).mask, model.select_crops(images()).mask)
    with pytest.raises(UsageError, match="crop_mode 'mask'"):
        from_reference({**ILA, **config, "crop_mode": "mask"}, own_names(model, "head.head."))


def timm_names(model: Any) -> dict[str, Any]:
    """Weights under the names of the original for timm's transformers."""
    weights = {}
    for key, value in model.state_dict().items():
        weights[key.removeprefix("encoder.backbone.")] = value
    if "crop_class_token" in weights:
        weights["cls_token_crops"] = weights.pop("crop_class_token")
    layers = {"norm1": "0", "conv1": "2", "norm2": "4", "mix.conv": "7", "mix.norm": "9"}
    for ours, number in layers.items():
        for leaf in ("weight", "bias"):
            value = weights.pop(f"aggregator.{ours}.{leaf}", None)
            if value is not None:
                pointwise = ours == "mix.conv" and leaf == "weight"
                weights[f"aggregator.{number}.{leaf}"] = value[:, :, None] if pointwise else value
    return weights


TIMM: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "registers": ({"reg_tokens": 2}, {}, {}),
    "registers without positions": ({"reg_tokens": 2, "no_embed_class": True}, {}, {}),
    "layer scale": ({"init_values": 0.1}, {}, {}),
    "clip": ({"pre_norm": True, "eps": 1e-5}, {}, {}),
    "no biases": ({"qkv_bias": False}, {}, {}),
    "squared differences": ({}, {"metric": "l2"}, {"sim_metric": "l2"}),
    "no crops at inference": ({}, {"crops_at_inference": False}, {"inference_crops": False}),
    "selected tokens": ({}, {"select_tokens": True}, {"select_top_k": True}),
    "depthwise": (
        {},
        {"select_tokens": True, "aggregator": "dwsc", "token_drop": 0.1},
        {"select_top_k": True, "aggregator_type": "dwsc", "token_drop": 0.1},
    ),
    "convolution": (
        {},
        {"select_tokens": True, "aggregator": "conv"},
        {"select_top_k": True, "aggregator_type": "conv"},
    ),
    "convolution of both passes": ({}, {"aggregator": "conv"}, {"aggregator_type": "conv"}),
}


@pytest.mark.parametrize("case", TIMM)
def test_options_of_the_original_for_timms_transformers_are_read(case: str) -> None:
    host, options, args = TIMM[case]
    host = {"eps": 1e-6, **host}
    single = options.get("select_tokens", False)
    model = GLSim(
        encoder(**host),
        5,
        **{"top": 3, "final_norm": False, "crop_class_token": not single, "reference_compat": True, **options},
        aggregator_heads=4,
    )
    weights = timm_names(varied(model))
    if single:
        weights["cls_token_crops"] = torch.randn(1, 1, 64)  # left over
    kwargs = {"img_size": 32, "patch_size": 8, "num_heads": 4, "embed_dim": 64, "depth": 2}
    config = {"model": "TIMMGLSViT", "model_kwargs": kwargs, "args": {"dynamic_top": 3, **args}}
    again = from_reference(config, weights)
    assert isinstance(again, GLSim)
    torch.testing.assert_close(again(images()), model(images()), rtol=1e-4, atol=1e-5)
    assert again.token_drop.p == args.get("token_drop", 0.0)


def test_another_size_resamples_positions_and_statistics_follow_the_config() -> None:
    weights = own_names(varied(GLSim(encoder(), 5)))
    again = from_reference({**ILA, "dynamic_anchor": True, "image_size": 64, "custom_mean_std": True}, weights)
    assert again.pretrained_cfg["input_size"] == (3, 64, 64)
    assert again.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    assert again.select_crops(torch.randn(1, 3, 64, 64)).similarity.shape == (1, 64)


@pytest.mark.parametrize(
    "config",
    [
        {"model": "TransFG", "heads": 4},
        {"model": "FFVT", "heads": 4},
        {**ILA, "dynamic_anchor": False, "selector": "psm", "aggregator": True},
    ],
)
def test_part_selectors_of_one_pass_are_left_to_others(config: dict[str, Any]) -> None:
    from animesion_training.originals.glsim import _kind

    weights = own_names(GLSim(encoder(), 5))
    assert _kind({"model": "ViTGLSim"}, weights) == "vit"
    assert _kind(config, weights) is None


def test_parameters_beyond_glsim_are_named() -> None:
    weights = own_names(GLSim(encoder(), 5))
    with pytest.raises(UsageError, match=r"extra\.first, extra\.second"):
        from_reference({"model": "ViTGLSim"}, weights | {"extra.first": torch.ones(2), "extra.second": torch.ones(2)})
    supported = "classifier 'flatten' of this checkpoint is not supported: GLSim has cls, avg_cls, max_cls"
    with pytest.raises(UsageError, match=supported):
        from_reference({"model": "ViTGLSim", "classifier": "flatten"}, weights)
    with pytest.raises(UsageError, match="no classifier"):
        from_reference({"model": "ViTGLSim"}, {key: value for key, value in weights.items() if "head" not in key})
    timm_weights = timm_names(GLSim(encoder(), 5, final_norm=False, crop_class_token=True))
    with pytest.raises(UsageError, match="adapters inside blocks"):
        from_reference({"model": "TIMMGLSViT", "args": {"adapter": "convpass"}}, timm_weights)
