"""The original's outputs on small inputs: ILA and the methods it is compared with, loaded through `from_reference`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")

from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer

from animesion.errors import UsageError
from animesion_training import from_reference
from animesion_training.engine.optim import freeze
from animesion_training.models.cal import CALHead
from animesion_training.tokens import Tokens, TokenVisionTransformer
from animesion_training.tokens.adapters import make_adapter
from animesion_training.tokens.adapters.ila import ILA, InterLayerAdapter
from animesion_training.tokens.overlapping_patches import overlap_patches
from animesion_training.tokens.part_selection import contrastive_loss, make_part_selector
from animesion_training.tokens.pooling import MPNCOVHead, patch_head

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "fgir"
#: Two passes, in the parity tests of GLSim.
NOT_OURS = ("glsim", "rams")
CASES = sorted(
    path.stem
    for pattern in ("ila_*.safetensors", "glsim_baseline_*.safetensors")
    for path in GOLDEN.glob(pattern)
    if not any(name in path.stem for name in NOT_OURS) or "baseline" in path.stem
)
ABSENT = "reference outputs not found"
TOLERANCE = 2e-5


def read(case):
    path = GOLDEN / f"{case}.safetensors"
    if not path.is_file():
        pytest.skip(ABSENT)
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    weights = {key.removeprefix("sd."): value for key, value in tensors.items() if key.startswith("sd.")}
    out = {key.removeprefix("out."): value for key, value in tensors.items() if key.startswith("out.")}
    return config, weights, tensors["in.x"], out


@pytest.fixture(scope="module")
def ops():
    path = GOLDEN / "ops_unit.safetensors"
    if not path.is_file():
        pytest.skip(ABSENT)
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.mark.skipif(not CASES, reason=ABSENT)
@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_the_originals(case):
    config, weights, images, expected = read(case)
    model = from_reference(config, weights)
    assert not model.training
    with torch.inference_mode():
        error = (model(images) - expected["logits"]).abs().max().item()
        print(f"{case}: {error:.1e}")
        assert error <= TOLERANCE
        if not hasattr(model, "trace"):  # plain and IFA transformers have no token methods
            return
        logits, tokens = model.trace(images)
    assert torch.allclose(logits, expected["logits"], atol=TOLERANCE)
    if "tokens_out" in expected:
        lengths = expected["tokens_out"].tolist()
        assert [int(tokens.trace[f"block{i}.tokens"][1]) for i in range(len(lengths))] == lengths
    for name, value in expected.items():
        if name.startswith("ila"):  # of size 100, as windows are summed twice
            # each value is a sum of terms of the size of the largest, which other processors round otherwise
            scale = float(value.abs().max().clamp(min=1))
            assert torch.allclose(tokens.trace[name], value, atol=1e-6 * scale + TOLERANCE, rtol=TOLERANCE), name


@pytest.mark.skipif(not CASES, reason=ABSENT)
@pytest.mark.parametrize("case", CASES)
def test_the_same_number_of_parameters_is_trained_with_a_frozen_backbone(case):
    config, weights, _, _ = read(case)
    model = from_reference(config, weights)
    if "n_trainable_when_frozen" not in config or not hasattr(model, "trace") or config.get("selector"):
        pytest.skip("the number is not recorded, or there is no token method, or it trains a block")
    freeze(model, ["backbone"])
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert trained == config["n_trainable_when_frozen"]


@pytest.mark.parametrize("case", ["ila_ILAplusplus", "ila_convpass", "ila_vpt_deep", "ila_vqt"])
def test_the_originals_model_name_and_a_minimal_config_are_enough(case):
    config, weights, images, expected = read(case)
    bare = {"model_name": "vit_b16", "num_classes": 10, "image_size": 64, "num_attention_heads": 4}
    bare |= {key: config[key] for key in ("ila_ds_locs", "prompt") if config[key]}
    wrapped = {f"module.{name}": value for name, value in weights.items()}
    assert torch.allclose(from_reference(bare, wrapped)(images), expected["logits"], atol=TOLERANCE)


def test_unknown_parameters_are_named():
    config, weights, _, _ = read("ila_ILA")
    with pytest.raises(UsageError, match=r"encoder\.extra"):
        from_reference(config, {**weights, "encoder.extra": torch.zeros(1)})
    with pytest.raises(UsageError, match="no classifier"):
        from_reference(config, {name: value for name, value in weights.items() if not name.startswith("head.")})


@pytest.mark.parametrize("training", [False, True])
def test_the_module_equals_the_originals_in_evaluation_and_training(ops, training):
    prefix = "ila_module."
    names = {"adapter_down": "down", "norm1.1": "norm1", "adapter_conv.0": "conv", "adapter_conv.1.0": "norm2"}
    names |= {"adapter_conv.2": "point", "adapter_cls": "cls", "norm3.1": "norm3", "adapter_up": "up"}
    names |= {"ds_conv": "residual_conv"}
    module = InterLayerAdapter(24, dropout=0.0).train(training)
    weights: dict[str, Any] = {}
    for key, value in ops.items():
        if key.startswith(f"{prefix}sd."):
            stem, _, leaf = key.removeprefix(f"{prefix}sd.").rpartition(".")
            pointwise = stem in ("adapter_conv.2", "adapter_cls") and leaf == "weight"
            weights[f"{names[stem]}.{leaf}"] = value.flatten(1) if pointwise else value
    module.load_state_dict(weights)
    x = ops[f"{prefix}x"]
    out = module(x, Tokens(x, 1, (5, 5)))
    assert torch.allclose(out, ops[f"{prefix}out_{'train_dropout0' if training else 'eval'}"], atol=2e-5, rtol=1e-5)


def test_covariance_pooling_equals_the_originals(ops):
    head = MPNCOVHead(10, 3, dim=6).eval()
    weights = {"project.weight": ops["mpncov.sd.conv_dr_block.0.weight"].flatten(1)}
    prefix = "mpncov.sd.conv_dr_block.1."
    weights |= {f"norm.{key.removeprefix(prefix)}": value for key, value in ops.items() if key.startswith(prefix)}
    head.load_state_dict(weights, strict=False)
    pooled = head.features(ops["mpncov.x"].flatten(2).transpose(1, 2))
    assert torch.allclose(pooled, ops["mpncov.out"][..., 0], atol=1e-5)


def test_contrastive_loss_equals_the_originals(ops):
    case = "loss_transfg_contrastive"
    loss = contrastive_loss(ops[f"{case}.features"], ops[f"{case}.labels"])
    assert loss.item() == pytest.approx(ops[f"{case}.out"].item(), abs=1e-6)


# -- checkpoints written here in the originals' names, without reference outputs ---------------------------------------

WIDTH, DEPTH, PATCH, CLASSES = 32, 4, 8, 10
BLOCK = {"attn.proj.": "proj.", "mlp.": "pwff.", "attn.qkv.": "attn.proj_{}."}
CONFIG = {"model_name": "vit_b16", "image_size": 64, "num_classes": CLASSES, "num_attention_heads": 4}
ADAPTER = {"down.": "adapter_down.", "up.": "adapter_up.", "cls.": "adapter_cls.", "conv.": "adapter_conv.0."}
ADAPTER |= {"point.": "adapter_conv.2.", "norm1.": "norm1.1.", "norm2.": "adapter_conv.1.0.", "norm3.": "norm3.1."}
ADAPTER |= {"residual_conv.": "ds_conv."}


def ours(plugins=(), head=None, class_token=True, stride=None, eps=1e-12):
    torch.manual_seed(0)
    host = VisionTransformer(
        64,
        PATCH,
        num_classes=0,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=4,
        class_token=class_token,
        global_pool="token" if class_token else "avg",
        fc_norm=False,
        norm_layer=partial(torch.nn.LayerNorm, eps=eps),
    )
    if stride:
        overlap_patches(host, stride)
    options: dict[str, Any] = (
        {"head": patch_head(head, WIDTH, **({"dim": 6} if head in ("mpncov", "lrblp") else {}))} if head else {}
    )
    model = TokenVisionTransformer(
        host, dict(plugins), CLASSES, **options, reads="patches" if head else "feature"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for block in host.blocks:
            block.attn.qkv.weight.mul_(5)
    return model


def adapter(name, **options):
    torch.manual_seed(1)
    return make_adapter(name, depth=DEPTH, width=WIDTH, grid=(8, 8), **options)


def backbone_in_the_originals_names(model, last="encoder.blocks.3.", norm="encoder_norm."):
    weights: dict[str, Any] = {}
    for key, value in model.backbone.state_dict().items():
        name = key.replace("cls_token", "class_token").replace("pos_embed", "positional_embedding.pos_embedding")
        name = name.replace("patch_embed.proj.", "patch_embedding.")
        if name.startswith("norm."):
            name = norm + name.removeprefix("norm.")
        for mine, theirs in BLOCK.items():
            name = name.replace(mine, theirs)
        name = last + name.removeprefix("blocks.3.") if name.startswith("blocks.3.") else name
        name = f"encoder.{name}" if name.startswith("blocks.") else name
        parts = value.chunk(3) if "{}" in name else [value]
        weights |= {name.format(letter): part for letter, part in zip("qkv", parts, strict=False)}
    return weights


def head_in_the_originals_names(model, names=None):
    names = names or {"": "head.head."}
    return {
        theirs + key.removeprefix(mine): value
        for key, value in model.head.state_dict().items()
        for mine, theirs in names.items()
        if key.startswith(mine)
    }


def ila_in_the_originals_names(module, stem):
    weights: dict[str, Any] = {}
    for key, value in module.state_dict().items():
        name, _, leaf = key.rpartition(".")
        pointwise = name in ("point", "cls") and leaf == "weight"
        weights[f"{stem}.{ADAPTER[f'{name}.']}{leaf}"] = value[..., None, None] if pointwise else value
    return weights


def agree(model, config, weights, atol=TOLERANCE):
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    read_again = from_reference({**CONFIG, **config}, weights)
    with torch.inference_mode():
        assert torch.allclose(read_again(images), model(images), atol=atol)
    return read_again


@pytest.mark.parametrize("locations", [[-1], [0, 2]])
@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({}, {"ila_ds_conv_type": "dws_near_ones_init", "ila_ds_conv": True}),
        ({"norms": ("ln", "none", "ln"), "kernel": 5, "locations": (1,)}, {"ila_ds_locs": [1]}),
        ({"residual": "conv", "multiplier": 2}, {"ila_ds_conv_type": "conv"}),
        ({"residual": "avg-pool", "dilation": 1}, {"ila_ds_conv_type": "avg_pool", "ila_ds_conv": True}),
        ({"residual": "none"}, {"ila_ds_conv": False}),
        ({"dilation": 2, "locations": (3,)}, {"ila_dilation": 2, "ila_ds_locs": [3]}),
        ({"residual": "identity", "padding": True, "class_conv": False}, {"ila_ds_conv": False}),
        ({"padding": True}, {"ila_padding": True}),
    ],
)
def test_inter_layer_adapters_of_all_kinds_are_read(options, config, locations):
    options = {"locations": (1, 3), **options}
    config = {"ila": True, "ila_ds_locs": [1, 3], "ila_locs": locations, **config}
    padded = [i for i in range(DEPTH) if i not in options["locations"]] if locations == [-1] else locations
    plugins = [("ila", ILA(WIDTH, depth=DEPTH, grid=(8, 8), padded=padded, **options))]
    model = ours(plugins)
    weights = backbone_in_the_originals_names(model) | head_in_the_originals_names(model)
    for group, modules in (("ila_ds", plugins[0][1].down_sampling), ("ila", plugins[0][1].keeping)):
        for j, module in enumerate(modules):
            weights |= ila_in_the_originals_names(module, f"encoder.{group}.{j}")
    agree(model, config, weights, atol=1e-3)  # windows are summed, and logits in the hundreds


@pytest.mark.parametrize("name", ["adapter", "adapter-sequential", "convpass", "vpt-shallow", "vpt-deep", "vqt"])
def test_adapters_in_blocks_are_read(name):
    options = {"count": 3} if name.startswith("v") else {}
    plugins = adapter(name, **options)
    model = ours(plugins)
    weights = backbone_in_the_originals_names(model) | head_in_the_originals_names(model)
    plugin = plugins[0][1]
    for key, value in plugin.state_dict().items():
        if key in ("prompts", "queries"):
            weights["encoder.prompt"] = value
            continue
        place, block, rest = key.split(".", 2)
        inner = {"attention_adapters": "adapter_attn", "mlp_adapters": "adapter_pwffn"}[place]
        inner = "adapter" if name == "adapter-sequential" else inner
        weights[f"encoder.blocks.{block}.{inner}.adapter_{rest}"] = value
    config = {"prompt": name.replace("-", "_")} if options else {"adapter": name}
    config |= {"adapter_path": "pfeiffer"} if name == "adapter-sequential" else {}
    agree(model, config, weights)


@pytest.mark.parametrize("name", ["transfg", "ffvt"])
@pytest.mark.parametrize("stride", [None, 6])
@pytest.mark.parametrize("last", ["encoder.blocks.3.", "aggregator.blocks.0.", "encoder.part_layer."])
def test_part_selectors_are_read_wherever_their_last_block_is(name, stride, last):
    options = {"count": 5} if name == "ffvt" else {}
    model = ours([("selector", make_part_selector(name, depth=DEPTH, reference_compat=True, **options))], stride=stride)
    norm = "aggregator_norm." if "aggregator" in last else "encoder_norm."
    weights = backbone_in_the_originals_names(model, last, norm) | head_in_the_originals_names(model)
    selector = {"transfg": "psm", "ffvt": "maws"}[name]
    again = agree(model, {"selector": selector, "selector_num_tokens": 5}, weights)
    assert again.pretrained_cfg["input_size"] == (3, 64, 64)
    assert again.backbone.patch_embed.grid_size == ((10, 10) if stride else (8, 8))


def test_an_encoders_norm_precedes_a_last_block_with_its_own_norm():
    model = ours([("selector", make_part_selector("transfg", depth=DEPTH))])
    weights = backbone_in_the_originals_names(model, "aggregator.blocks.0.", "aggregator_norm.")
    weights |= head_in_the_originals_names(model)
    extra = {"encoder_norm.weight": torch.full((WIDTH,), 2.0), "encoder_norm.bias": torch.zeros(WIDTH)}
    again = from_reference({**CONFIG, "selector": "psm"}, weights | extra)
    images = torch.randn(2, 3, 64, 64)
    block = model.backbone.blocks[-1]
    block.register_forward_pre_hook(lambda _, given: (2 * torch.nn.functional.layer_norm(given[0], (WIDTH,)),))
    with torch.inference_mode():
        assert torch.allclose(again(images), model(images), atol=1e-4)


@pytest.mark.parametrize(("name", "last"), [("transfg", "part_layer"), ("ffvt", "ff_last_layer")])
def test_part_selectors_are_read_from_their_own_repositories_names(name, last):
    options = {"count": 5} if name == "ffvt" else {}
    model = ours([("selector", make_part_selector(name, depth=DEPTH, reference_compat=True, **options))], stride=6)
    norm = "part_norm" if name == "transfg" else "ff_encoder_norm"
    weights = backbone_in_the_originals_names(model, f"encoder.{last}.", f"encoder.{norm}.")
    table = {"class_token": "embeddings.cls_token", "patch_embedding": "embeddings.patch_embeddings"}
    table |= {"positional_embedding.pos_embedding": "embeddings.position_embeddings", "encoder.blocks": "encoder.layer"}
    table |= {"norm1": "attention_norm", "norm2": "ffn_norm", "pwff": "ffn", "attn.proj_q": "attn.query"}
    table |= {"attn.proj_k": "attn.key", "attn.proj_v": "attn.value", ".proj.": ".attn.out."}
    theirs = {}
    for key, value in weights.items():
        for mine, renamed in table.items():
            key = key.replace(mine, renamed)
        theirs[f"transformer.{key}"] = value
    theirs |= head_in_the_originals_names(model, {"": "part_head." if name == "transfg" else "ff_head."})
    agree(model, {"model": name.upper(), "num_token": 5}, theirs)


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("pool", {"fc.": "head.head."}),
        ("blp", {"fc.": "head.head."}),
        ("lrblp", {"project.": "head.project.", "fc.": "head.fc."}),
        ("mpncov", {"project.": "head.0.conv_dr_block.0.", "norm.": "head.0.conv_dr_block.1.", "fc.": "head.1."}),
    ],
)
def test_heads_on_the_patches_are_read_with_a_class_token_and_without(name, names, class_token):
    model = ours(head=name, class_token=class_token)
    weights = backbone_in_the_originals_names(model) | head_in_the_originals_names(model, names)
    if name == "mpncov":
        weights["head.0.conv_dr_block.0.weight"] = weights["head.0.conv_dr_block.0.weight"][..., None, None]
    agree(model, {"classifier": name}, weights)


@pytest.mark.parametrize("wrapper", ["", "encoder."])
def test_adapters_on_timms_transformers_are_read(wrapper):
    plugins = [*adapter("ila++", dim=4, locations=(1, 3))]
    model = ours(plugins, eps=1e-6)
    weights = {f"{wrapper}{key}": value for key, value in model.backbone.state_dict().items()}
    for j, module in enumerate(plugins[0][1].down_sampling):
        weights |= ila_in_the_originals_names(module, f"{wrapper}ila_ds.{j}")
    for key, value in plugins[1][1].state_dict().items():
        place, block, rest = key.split(".", 2)
        inner = {"attention_adapters": "adapter_attn", "mlp_adapters": "adapter_pwffn"}[place]
        weights[f"{wrapper}blocks.{block}.{inner}.adapter_{rest}"] = value
    weights |= head_in_the_originals_names(model, {"": "head."})
    again = agree(model, {"num_heads": 4, "ila_ds_locs": [1, 3]}, weights, atol=1e-3)
    assert again.backbone.norm.eps == 1e-6


def test_the_head_of_counterfactual_attention_is_read_without_a_backbone():
    torch.manual_seed(0)
    head = CALHead(12, CLASSES, 4).eval()
    features = torch.randn(2, 12, 5, 5)
    for prefix in ("", "dfsm."):
        weights = {f"{prefix}{key}": value for key, value in head.state_dict().items()}
        assert torch.equal(from_reference({"num_classes": CLASSES}, weights)(features), head(features).logits)


def test_larger_images_get_resampled_positions():
    model = ours(adapter("ila", locations=(1, 3)))
    weights = backbone_in_the_originals_names(model) | head_in_the_originals_names(model)
    for j, module in enumerate(model.plugins["ila"].down_sampling):
        weights |= ila_in_the_originals_names(module, f"encoder.ila_ds.{j}")
    config = {**CONFIG, "image_size": 96, "patch_stride": 8, "ila_ds_locs": [1, 3]}
    again = from_reference(config, weights)
    assert again(torch.randn(1, 3, 96, 96)).shape == (1, CLASSES)
    assert again.pretrained_cfg["input_size"] == (3, 96, 96)
