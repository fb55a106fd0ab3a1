"""The ViLT of Animesion v2: the original's outputs, and those of its formulas at other sizes and with other heads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")

from safetensors import safe_open
from torch.nn import functional

from animesion.errors import UsageError
from animesion_training import from_reference, load_model, save_model

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "fgir" / "anim_vilt_mlm_tagging.safetensors"
TOLERANCE = 1e-5


def golden():
    if not GOLDEN.is_file():
        pytest.skip("reference outputs not found")
    with safe_open(GOLDEN, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    weights = {key.removeprefix("sd."): value for key, value in tensors.items() if key.startswith("sd.")}
    return config, weights, tensors


def test_outputs_equal_the_originals():
    config, weights, tensors = golden()
    model = from_reference(config, weights)
    with torch.inference_mode():
        logits, tag_logits = model(tensors["in.x"], tensors["in.text"], with_tags=True)
    errors = [(logits - tensors["out.logits"]).abs().max().item(), (tag_logits - tensors["out.tag_logits"]).abs().max()]
    print(f"logits {errors[0]:.1e}, tag logits {errors[1]:.1e}")
    assert max(errors) <= TOLERANCE


def test_a_checkpoint_that_holds_the_shared_embedding_once_is_read():
    config, weights, tensors = golden()
    once = {key: value for key, value in weights.items() if key != "text_decoder.weight"}
    _, tag_logits = from_reference(config, once)(tensors["in.x"], tensors["in.text"], with_tags=True)
    assert torch.allclose(tag_logits, tensors["out.tag_logits"], atol=TOLERANCE)


# -- any size: weights under the original's names, and its formulas ----------------------------------------------------

SIZES = [
    # width, depth, heads, MLP, patch, grid, text length, vocabulary, classes
    {"d": 32, "depth": 4, "heads": 4, "mlp": 128, "patch": 8, "grid": 8, "length": 8, "vocab": 60, "classes": 10},
    {"d": 24, "depth": 2, "heads": 3, "mlp": 72, "patch": 16, "grid": 3, "length": 16, "vocab": 31, "classes": 5},
    {"d": 40, "depth": 1, "heads": 8, "mlp": 40, "patch": 4, "grid": 5, "length": 3, "vocab": 200, "classes": 2},
]


def original(size, *, ifa=False, tagging=True, seed=0):
    """Random weights under the original's names, and the settings that do not follow from them."""
    generator = torch.Generator().manual_seed(seed)
    d, m, patch = size["d"], size["mlp"], size["patch"]
    shapes = {
        "model.class_token": (1, 1, d),
        "model.positional_embedding.pos_embedding": (1, size["grid"] ** 2 + 1, d),
        "model.patch_embedding.weight": (d, 3, patch, patch),
        "model.patch_embedding.bias": (d,),
        "model.text_embeddings.word_embeddings.weight": (size["vocab"], d),
        "model.text_embeddings.position_embeddings.weight": (size["length"], d),
        "model.text_embeddings.token_type_embeddings.weight": (2, d),
        "model.text_embeddings.LayerNorm.weight": (d,),
        "model.text_embeddings.LayerNorm.bias": (d,),
    }
    for i in range(size["depth"]):
        block = f"model.transformer.blocks.{i}"
        for name in ("attn.proj_q", "attn.proj_k", "attn.proj_v", "proj"):
            shapes |= {f"{block}.{name}.weight": (d, d), f"{block}.{name}.bias": (d,)}
        shapes |= {f"{block}.pwff.fc1.weight": (m, d), f"{block}.pwff.fc1.bias": (m,)}
        shapes |= {f"{block}.pwff.fc2.weight": (d, m), f"{block}.pwff.fc2.bias": (d,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"{block}.{name}.weight": (d,), f"{block}.{name}.bias": (d,)}
    if ifa:
        shapes |= {"inter_class_head.0.weight": (1, size["depth"]), "inter_class_head.0.bias": (1,)}
        shapes |= {"inter_class_head.3.weight": (d,), "inter_class_head.3.bias": (d,)}
        shapes |= {"inter_class_head.4.weight": (size["classes"], d), "inter_class_head.4.bias": (size["classes"],)}
    else:
        shapes |= {"class_head.0.weight": (d,), "class_head.0.bias": (d,)}
        shapes |= {"class_head.1.weight": (size["classes"], d), "class_head.1.bias": (size["classes"],)}
    if tagging:
        shapes |= {"mlm_head.0.weight": (d, d), "mlm_head.0.bias": (d,), "decoder_bias": (size["vocab"],)}
        shapes |= {"mlm_head.2.weight": (d,), "mlm_head.2.bias": (d,)}
    weights = {
        name: (torch.randn(shape, generator=generator) / max(1, shape[-1]) ** 0.5).double()
        for name, shape in shapes.items()
    }
    if tagging:
        weights["text_decoder.weight"] = weights["model.text_embeddings.word_embeddings.weight"]
    return {"args": {}, "arch": {"num_attention_heads": size["heads"], "layer_norm_eps": 1e-12}}, weights


def formulas(size, weights, images, text, *, ifa, tagging, eps=1e-12):
    """The forward pass of ../shared/reference/glsim-clca-ila-ifa.md, section 4, layer by layer."""
    w = {name.removeprefix("model."): value for name, value in weights.items()}

    def linear(x, name):
        return functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x, name):
        return functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    patches = functional.conv2d(
        images, w["patch_embedding.weight"], w["patch_embedding.bias"], stride=size["patch"]
    ).flatten(2)
    x = torch.cat([w["class_token"].expand(len(images), -1, -1), patches.transpose(1, 2)], dim=1)
    x = x + w["positional_embedding.pos_embedding"]
    words = w["text_embeddings.word_embeddings.weight"][text]
    positions = w["text_embeddings.position_embeddings.weight"][: text.shape[1]]
    types = w["text_embeddings.token_type_embeddings.weight"][0]
    x = torch.cat([x, norm(words + positions + types, "text_embeddings.LayerNorm")], dim=1)
    class_tokens = []
    for i in range(size["depth"]):
        block = f"transformer.blocks.{i}"
        normed = norm(x, f"{block}.norm1")
        q, k, v = (linear(normed, f"{block}.attn.proj_{each}").unflatten(2, (size["heads"], -1)) for each in "qkv")
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
        mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)
        x = x + linear(mixed, f"{block}.proj")
        hidden = functional.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.pwff.fc1"))
        x = x + linear(hidden, f"{block}.pwff.fc2")
        class_tokens.append(x[:, 0])
    if ifa:
        gathered = torch.stack(class_tokens, dim=-1)
        aggregated = gathered @ w["inter_class_head.0.weight"][0] + w["inter_class_head.0.bias"]
        logits = linear(norm(aggregated.relu(), "inter_class_head.3"), "inter_class_head.4")
    else:
        logits = linear(norm(x[:, 0], "class_head.0"), "class_head.1")
    if not tagging:
        return logits, None
    hidden = norm(functional.gelu(linear(x[:, -text.shape[1] :], "mlm_head.0")), "mlm_head.2")
    return logits, hidden @ w["text_decoder.weight"].T + w["decoder_bias"]


def inputs(size, seed=1):
    generator = torch.Generator().manual_seed(seed)
    side = size["grid"] * size["patch"]
    images = torch.randn(2, 3, side, side, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, size["vocab"], (2, size["length"]), generator=generator)


@pytest.mark.parametrize("tagging", [True, False], ids=["tagging", "classes"])
@pytest.mark.parametrize("ifa", [False, True], ids=["linear", "ifa"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"width{size['d']}")
def test_every_size_and_head_follows_the_formulas(size, ifa, tagging):
    config, weights = original(size, ifa=ifa, tagging=tagging)
    images, text = inputs(size)
    logits, tag_logits = formulas(size, weights, images, text, ifa=ifa, tagging=tagging)
    model = from_reference(config, weights).double()
    with torch.inference_mode():
        assert torch.allclose(model(images, text), logits, atol=1e-10)
        if tagging:
            both = model(images, text, with_tags=True)
            assert torch.allclose(both[0], logits, atol=1e-10)
            assert torch.allclose(both[1], tag_logits, atol=1e-10)
        shorter = formulas(size, weights, images, text[:, :2], ifa=ifa, tagging=tagging)
        assert torch.allclose(model(images, text[:, :2]), shorter[0], atol=1e-10)


def test_the_epsilon_of_the_config_is_that_of_every_norm():
    size = SIZES[1]
    config, weights = original(size)
    config["arch"]["layer_norm_eps"] = 0.5
    images, text = inputs(size)
    logits, tag_logits = formulas(size, weights, images, text, ifa=False, tagging=True, eps=0.5)
    both = from_reference(config, weights).double()(images, text, with_tags=True)
    assert torch.allclose(both[0], logits, atol=1e-10)
    assert torch.allclose(both[1], tag_logits, atol=1e-10)


def test_unknown_tags_are_masks_or_no_tags_where_the_network_has_seen_no_masks():
    size = SIZES[0]
    images, _ = inputs(size)
    masked = torch.tensor([[2, 1, 1, 1, 1, 1, 1, 3]] * 2)  # [CLS], six masks, [SEP]
    empty = torch.tensor([[2, 3, 0, 0, 0, 0, 0, 0]] * 2)  # [CLS], [SEP], padding
    for tagging, text in ((True, masked), (False, empty)):
        config, weights = original(size, tagging=tagging)
        model = from_reference(config, weights).double()
        assert torch.equal(model(images), model(images, text))


@pytest.mark.parametrize("ifa", [False, True], ids=["linear", "ifa"])
def test_a_published_size_is_saved_and_loaded(tmp_path, ifa):
    size = {"d": 192, "depth": 12, "heads": 3, "mlp": 768, "patch": 16, "grid": 2, "length": 4, "vocab": 20000}
    size["classes"] = 3
    config, weights = original(size, ifa=ifa)
    weights = {name: value.float() for name, value in weights.items()}
    model = from_reference(config, weights)
    save_model(model, tmp_path / "vilt.safetensors", ("a", "b", "c"))
    loaded, card = load_model(tmp_path / "vilt.safetensors")
    assert card.methods["options"]["text"]["vocab_size"] == 20000
    images, text = inputs(size)
    expected = model(images.float(), text, with_tags=True)
    found = loaded(images.float(), text, with_tags=True)
    assert all(map(torch.equal, expected, found))


def test_images_of_another_size_are_read_after_resampling():
    size = SIZES[1]
    config, weights = original(size)
    model = from_reference({**config, "image_size": 80}, {name: value.float() for name, value in weights.items()})
    assert model(torch.zeros(1, 3, 80, 80), torch.tensor([[2, 7, 3]]), with_tags=True)[1].shape == (1, 3, 31)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.text_embeddings.position_embeddings.weight": None},
            "lacks text_embeddings.position_embeddings.weight",
        ),
        ({"mlm_head.2.bias": None}, "lacks mlm_head.2.bias"),
        ({"class_head.1.weight": None, "class_head.1.bias": None}, "no classifier"),
        ({"model.patch_embedding.weight": None}, "lacks the weights for patch_embed"),
        ({"pooler.dense.weight": torch.zeros(3, 3)}, "1 parameters beyond the ViLT of Animesion: pooler.dense.weight"),
        ({"text_decoder.weight": torch.zeros(31, 24)}, "text_decoder.weight differs from"),
        ({"decoder_bias": torch.zeros(30)}, "do not match the ViLT of Animesion: plugins.text.tagger.bias"),
        ({"model.text_embeddings.LayerNorm.weight": torch.zeros(23)}, "plugins.text.norm.weight"),
    ],
)
def test_a_checkpoint_that_is_incomplete_or_changed_is_refused(change, message):
    config, weights = original(SIZES[1])
    changed = {key: value for key, value in (weights | change).items() if value is not None}
    with pytest.raises(UsageError, match=message):
        from_reference(config, changed)


def test_another_activation_is_refused():
    config, weights = original(SIZES[1])
    config["arch"]["hidden_act"] = "relu"
    with pytest.raises(UsageError, match="activation 'relu'"):
        from_reference(config, weights)


def test_a_text_that_is_too_long_or_of_another_type_is_refused():
    config, weights = original(SIZES[1])
    model = from_reference(config, weights).double()
    images, text = inputs(SIZES[1])
    for wrong in (torch.cat([text, text], 1), text.float(), text[0]):
        with pytest.raises(UsageError, match="at most 16"):
            model(images, wrong)
