"""Registered networks behave as timm's own: features without classes, feature maps, configs, devices and types."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from timm.models import get_notrace_functions, get_notrace_modules

import animesion_training.models  # noqa: F401  # registers the networks
from animesion.errors import UsageError
from animesion_training.models import create_model, shorthand
from animesion_training.tokens.patch_maps import PatchMaps
from animesion_training.tokens.reductions.factory import REDUCTIONS

SMALL: dict[str, Any] = {"depth": 5, "embed_dim": 48, "num_heads": 3, "img_size": 128}
TINY = [name for name in shorthand.NAMES if name.endswith("_vit_tiny_patch16")]
NAMES = ["vit_tiny_patch16_ifa", *TINY]
IMAGES = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(3))


def build(name: str, **options: Any) -> Any:
    torch.manual_seed(1)
    return timm.create_model(name, **SMALL, **options).eval()


def keep(name: str) -> str:
    """The name with a keep rate, if it is of a reduction."""
    word, _, rest = name.partition("_")
    return f"{word}50_{rest}" if word in REDUCTIONS else name


@pytest.mark.parametrize("name", NAMES)
def test_without_classes_a_network_gives_its_features(name):
    model = build(name, num_classes=3)
    with torch.no_grad():
        features = model.forward_features(IMAGES)
        pooled = model.forward_head(features, pre_logits=True)
        assert torch.allclose(model.forward_head(features), model(IMAGES), atol=1e-6)
        assert pooled.shape == (2, model.head_hidden_size)
        model.reset_classifier(0)
        assert torch.equal(model(IMAGES), pooled)
        model.reset_classifier(7)
        assert model(IMAGES).shape == (2, 7)
        assert build(name, num_classes=0)(IMAGES).shape == pooled.shape
        assert model.to(torch.bfloat16)(IMAGES.to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_a_new_classifier_keeps_frozen_layers_devices_types_and_the_mode(name):
    model = build(name, num_classes=3).to("meta", torch.float64)
    model.requires_grad_(False)
    model.reset_classifier(0)
    assert not [key for key, value in model.named_parameters() if value.requires_grad]
    model.reset_classifier(2)
    assert {(value.device.type, value.dtype) for value in model.parameters()} == {("meta", torch.float64)}
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", [*NAMES, *timm.list_models(["lrnet*", "vitfs_*"])])
def test_every_name_has_a_config_that_names_its_layers(name):
    with torch.device("meta"):
        names = timm.create_model(name).state_dict()
    config = timm.get_pretrained_cfg(name)
    assert f"{config.classifier}.weight" in names
    assert f"{config.first_conv}.weight" in names
    assert config.architecture == name
    with pytest.raises(TypeError):
        timm.create_model(name, device="meta", not_an_argument=1)
    model = timm.create_model(name, device="meta", dtype=torch.float16)
    assert {value.device.type for value in (*model.parameters(), *model.buffers())} == {"meta"}
    assert {value.dtype for value in model.parameters()} == {torch.float16}


@pytest.mark.parametrize("name", NAMES)
def test_maps_of_all_blocks_have_the_grid_of_the_patches(name):
    model = create_model(keep(name), 3, **SMALL).eval()
    with torch.no_grad():
        features, maps = model.forward_intermediates(IMAGES)
        assert torch.equal(features, model.forward_features(IMAGES))
        assert [tuple(each.shape) for each in maps] == [(2, 48, 8, 8)] * 5
        assert all(torch.isfinite(each).all() for each in maps)
        [last] = model.forward_intermediates(IMAGES, indices=[1], stop_early=True, intermediates_only=True)
        assert torch.equal(last, maps[1])
    nets = timm.create_model(name, features_only=True, out_indices=(0, 3), **SMALL).eval()
    assert [tuple(each.shape) for each in nets(IMAGES)] == [(2, 48, 8, 8)] * 2
    assert nets.feature_info.channels() == [48, 48]


@pytest.mark.parametrize("name", ["lora", "vptdeep", "convpass", "transfg"])
def test_maps_of_methods_that_keep_all_patches_are_those_of_their_tokens(name):
    model = create_model(f"{name}_vit_tiny_patch16", 3, **SMALL).eval()
    with torch.no_grad():
        [second] = model.forward_intermediates(IMAGES, indices=[1], output_fmt="NLC", intermediates_only=True)
        tokens = model.encode(IMAGES, last=1)
    assert torch.equal(second, tokens.patches)


def test_dropped_patches_keep_their_vector_and_merged_ones_share_one():
    patches = torch.arange(8.0).reshape(1, 4, 2)
    maps = PatchMaps(patches, (2, 2), {0, 1})
    maps.keep_rows(torch.tensor([[3, 1]]), 4)  # patches 0 and 2 are dropped
    maps.after(0, torch.tensor([[[30.0, 31], [10, 11]]]))
    assert maps.kept[0].tolist() == [[[0, 1], [10, 11], [4, 5], [30, 31]]]
    maps.move(torch.tensor([[0, 0]]))  # both tokens become one
    maps.after(1, torch.tensor([[[7.0, 8.0]]]))
    assert maps.kept[1].tolist() == [[[0, 1], [7, 8], [4, 5], [7, 8]]]


def test_a_border_that_is_cut_joins_the_nearest_patch():
    maps = PatchMaps(torch.zeros(1, 16, 1), (4, 4), {0})
    maps.shrink((4, 4), (2, 2), extra=0)
    maps.after(0, torch.tensor([[[1.0], [2], [3], [4]]]))
    assert maps.kept[0].reshape(4, 4).tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]


def test_tokens_that_vanish_without_a_word_are_refused():
    maps = PatchMaps(torch.zeros(1, 4, 2), (2, 2), {0})
    with pytest.raises(UsageError, match="removed tokens in block 0"):
        maps.after(0, torch.zeros(1, 3, 2))


def test_maps_follow_the_tokens_of_a_reduction():
    """In each image, a patch that EViT kept has the vector of its token; the order of tokens is by attention."""
    model = create_model("topk50_vit_tiny_patch16", 3, **SMALL).eval()
    with torch.no_grad():
        [after] = model.forward_intermediates(IMAGES, indices=[3], output_fmt="NLC", intermediates_only=True)
        tokens = model.encode(IMAGES, trace=True, last=3)
        [before] = model.forward_intermediates(IMAGES, indices=[2], output_fmt="NLC", intermediates_only=True)
    assert tokens.trace is not None
    kept = tokens.trace["block3.kept_idx"]
    assert torch.equal(after.gather(1, kept[:, :, None].expand(-1, -1, 48)), tokens.x[:, 1:])
    dropped = torch.ones(2, 64).scatter(1, kept, 0).bool()
    assert torch.equal(after[dropped], before[dropped])


@pytest.mark.parametrize("name", ["tome", "dpcknn", "ats", "sit"])
def test_maps_of_merged_tokens_have_the_vectors_of_tokens_only(name):
    model = create_model(f"{name}50_vit_tiny_patch16", 3, **SMALL).eval()
    with torch.no_grad():
        [after] = model.forward_intermediates(IMAGES, indices=[3], output_fmt="NLC", intermediates_only=True)
        tokens = model.encode(IMAGES, last=3)
        [before] = model.forward_intermediates(IMAGES, indices=[2], output_fmt="NLC", intermediates_only=True)
    allowed = torch.cat([tokens.x[:, 1:], before], dim=1)  # a dropped patch keeps its vector
    distance = torch.cdist(after.double(), allowed.double()).amin(dim=2)
    assert distance.max() < 1e-5
    if name != "ats":
        assert torch.cdist(after.double(), tokens.x[:, 1:].double()).amin(dim=2).max() < 1e-5


@pytest.mark.parametrize(
    "words", ["ats_clca", "ilapp", "vqt", "vptdeep", "lora", "transfg", "ffvt", "glsim", "rams", "cal"]
)
def test_fx_traces_the_methods(words):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = build(f"{words}_vit_tiny_patch16", num_classes=3)
    tracing = {
        "leaf_modules": get_notrace_modules(),
        "autowrap_functions": get_notrace_functions(),
        "param_shapes_constant": True,
    }
    nodes = extraction.get_graph_node_names(model, tracer_kwargs=tracing)
    traced = extraction.create_feature_extractor(
        model, train_return_nodes=[nodes[0][-1]], eval_return_nodes=[nodes[1][-1]], tracer_kwargs=tracing
    )
    with torch.no_grad():
        [logits] = traced(IMAGES).values()
        assert torch.allclose(logits, model(IMAGES), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*jit:FutureWarning")
@pytest.mark.parametrize("name", ["lrnet14", "vitfs_nano_patch16", "vit_tiny_patch16_ifa", "lora_vit_tiny_patch16"])
def test_a_trace_is_scripted(name):
    """TorchScript compiles the annotations that torch.fx copies from the network."""
    options = {} if name in ("lrnet14", "vitfs_nano_patch16") else SMALL
    model = create_model(name, 3, **options).eval()
    tracer = torch.fx.Tracer(autowrap_functions=tuple(get_notrace_functions()), param_shapes_constant=True)
    leaves = tuple(get_notrace_modules())
    tracer.is_leaf_module = lambda module, path: (
        isinstance(module, leaves) or torch.fx.Tracer.is_leaf_module(tracer, module, path)
    )
    scripted = torch.jit.script(torch.fx.GraphModule(model, tracer.trace(model)))
    with torch.no_grad():
        assert torch.allclose(scripted(IMAGES), model(IMAGES), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*jit:FutureWarning")
def test_ifa_is_scripted():
    model = build("vit_tiny_patch16_ifa", num_classes=3)
    with torch.no_grad():
        assert torch.allclose(torch.jit.script(model)(IMAGES), model(IMAGES), atol=1e-6)
