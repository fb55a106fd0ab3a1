"""Methods by name in `create_model`, recipes and files: they are built as named, and invalid ones are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch

from animesion.errors import UsageError
from animesion_training.models import Methods, create_model, spec_of
from animesion_training.models.assemble import CACHES, SELECTORS, TOKEN_HEADS
from animesion_training.models.shorthand import NAMES, split_name
from animesion_training.recipe import load
from animesion_training.tokens.adapters import ADAPTERS
from animesion_training.tokens.reductions import REDUCTIONS
from animesion_training.weights import load_model, save_model

HOST = "vit_tiny_patch16"
SMALL: dict[str, Any] = {"depth": 4, "embed_dim": 48, "num_heads": 3}


def built(size: int = 96, **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model(HOST, 5, size, **options, **SMALL)


EVERYTHING: dict[str, dict[str, Any]] = {
    **{f"reduction-{name}": {"reduction": name, "keep_rate": 0.5, "reduction_layers": [1, 2]} for name in REDUCTIONS},
    **{f"adapter-{name}": {"adapter": name} for name in ADAPTERS},
    **{f"selector-{name}": {"selector": name} for name in SELECTORS},
    **{f"head-{name}": {"head": name} for name in TOKEN_HEADS},
    "clca": {"reduction": "evit", "keep_rate": 0.5, "reduction_layers": [1, 2], "cache": "clc", "head": "cla"},
    "glsim-lora": {"selector": "glsim", "adapter": "lora"},
    "tome-adapter": {"reduction": "tome", "keep_rate": 0.5, "reduction_layers": [1], "adapter": "adapter"},
}


@pytest.mark.parametrize("options", EVERYTHING.values(), ids=EVERYTHING)
def test_every_method_trains_saves_and_loads(options: dict[str, Any], tmp_path: Path) -> None:
    model = built(**options).train()
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    if getattr(model, "needs_targets", False):
        logits, losses = model(x, with_losses=True, targets=torch.tensor([0, 3]))
    else:
        logits, losses = model(x), {}
    assert logits.shape == (2, 5)
    (logits.square().sum() + sum(losses.values())).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    model.eval()
    save_model(model, tmp_path / "w.safetensors", tuple("abcde"))
    again, card = load_model(tmp_path / "w.safetensors")
    assert spec_of(again) == spec_of(model)
    assert card.spec == spec_of(model)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_train_with_a_frozen_backbone(adapter: str) -> None:
    from animesion_training.engine.optim import freeze

    model = built(adapter=adapter)
    frozen = set(freeze(model, ["backbone"]))
    assert frozen
    left = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert left
    assert all(name.startswith(("plugins.", "head.")) or name == "backbone.cls_token" for name in left)
    model.train()
    model(torch.randn(2, 3, 96, 96)).square().sum().backward()
    graded = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert graded == left


@pytest.mark.parametrize(
    ("name", "host", "methods", "head"),
    [
        ("evit_vit_base_patch16", "vit_base_patch16", Methods(reduction="evit"), ""),
        ("evit50_clca_vit_tiny_patch16", HOST, Methods(reduction="evit", keep_rate=0.5, cache="clc"), "cla"),
        ("glsim_vit_base_patch16_clip_224.laion2b", "vit_base_patch16_clip_224.laion2b", Methods(selector="glsim"), ""),
        ("ilapp_vit_small_patch16", "vit_small_patch16", Methods(adapter="ila++"), ""),
        ("vptdeep_cla_deit_tiny_patch16_224", "deit_tiny_patch16_224", Methods(adapter="vpt-deep"), "cla"),
        ("cal_resnet18", "resnet18", Methods(selector="cal"), ""),
        ("resnet18", "resnet18", Methods(), ""),
    ],
)
def test_a_name_includes_methods(name: str, host: str, methods: Methods, head: str) -> None:
    assert split_name(name) == (host, methods, head)


def test_names_are_registered_with_timm() -> None:
    assert set(NAMES) <= set(timm.list_models())
    model = timm.create_model("evit_clca_vit_tiny_patch16", num_classes=5, img_size=96, keep_rate=0.5, **SMALL)
    assert model(torch.zeros(2, 3, 96, 96)).shape == (2, 5)
    assert spec_of(model).methods == Methods(reduction="evit", keep_rate=0.5, cache="clc")


def test_a_recipe_has_the_same_methods() -> None:
    overrides = [
        "model.reduction=tome", "model.keep_rate=[0.7, 0.5]", "model.reduction_layers=[1, 2]",
        "model.method_options.reduction.reference_compat=true",
    ]  # fmt: skip
    methods = load("scratch", overrides).model.methods()
    expected = Methods("tome", (0.7, 0.5), (1, 2), options={"reduction": {"reference_compat": True}})
    assert methods == expected == Methods.from_dict(expected.to_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "evitt"}, "did you mean 'evit'"),
        ({"adapter": "loral"}, "did you mean 'lora'"),
        ({"selector": "glsm"}, "did you mean 'glsim'"),
        ({"cache": "clcc"}, f"did you mean '{next(iter(CACHES))}'"),
        ({"keep_rate": 0.5}, "name one as reduction"),
        ({"reduction": "evit", "keep_rate": 0.0}, "above 0 and at most 1"),
        ({"reduction": "evit", "keep_rate": 0.5, "selector": "glsim", "reduction_layers": [1]}, "use one of GLSim"),
        ({"reduction": "evit", "keep_rate": 0.5, "adapter": "ila", "reduction_layers": [1]}, "use one of the two"),
        ({"selector": "cal", "adapter": "lora"}, "cannot be combined with other methods"),
        ({"selector": "glsim", "head": "cla"}, "leave head cla out"),
        ({"adapter": "lora", "method_options": {"adapter": {"rang": 3}}}, "no option rang"),
        ({"method_options": {"adapter": {"rank": 3}}}, "there are options for adapter, but no adapter"),
        ({"adapter": "lora", "head": "cosine"}, "does not support token methods"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        built(**options)


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224"])
def test_backbones_without_support_for_token_methods_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="reduction evit need"):
        create_model(name, 5, reduction="evit", keep_rate=0.5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("evit0_vit_tiny_patch16", "write 1 to 100"),
        ("evit_tome_vit_tiny_patch16", "two methods of the kind reduction"),
        ("evitt_vit_tiny_patch16", "there is no model"),
    ],
)
def test_invalid_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create_model(name, 5, 96)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "studies").glob("*.toml")), ids=lambda path: path.stem
)
def test_every_network_of_the_studies_can_be_built(path: Path) -> None:
    from animesion_training.analysis.study import cells, load

    study = load(path)
    seen: list[tuple[Methods, str]] = []
    of_one_seed = cells(study.model_copy(update={"grid": {**study.grid, "run.seed": [0]}}))
    for cell in of_one_seed:
        model = cell.recipe.model
        asked = (model.methods(), model.head)
        if model.name.startswith("vit_base") and asked not in seen:
            seen.append(asked)
            with torch.device("meta"):
                built(160, methods=asked[0], head=asked[1])
    names = {cell.values.get("variant") for cell in of_one_seed}
    assert names == set(study.variants)
    assert len(seen) > 1 or path.stem == "tgda" or path.stem.startswith("faces-")


def test_the_built_in_recipes_name_networks_that_can_be_built() -> None:
    from animesion_training.recipe import builtin_names

    for name in builtin_names():
        model: Any = load(name).model
        with torch.device("meta"):
            create_model(model.name, 5, model.img_size, model.head, methods=model.methods(), **model.options)


@pytest.mark.parametrize(
    "options",
    [
        {"selector": "glsim"},
        {"adapter": "ila++"},
        {"reduction": "dynamicvit", "keep_rate": 0.5, "reduction_layers": [1, 2], "cache": "clc", "head": "cla"},
        {"selector": "cal"},
    ],
    ids=["glsim", "ila++", "dynamicvit-clca", "cal"],
)
def test_weights_of_a_backbone_trained_alone_are_loaded(options: dict[str, Any], tmp_path: Path) -> None:
    plain = built()
    save_model(plain, tmp_path / "plain.safetensors")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = create_model(HOST, 5, 96, pretrained=tmp_path / "plain.safetensors", **options, **SMALL)
    own = {key.removeprefix("encoder.").removeprefix("backbone."): value for key, value in model.state_dict().items()}
    same = [key for key, value in plain.state_dict().items() if key in own and torch.equal(own[key], value)]
    assert len(same) >= len(plain.state_dict()) - 4  # all but the classifier, and a norm that a head does without
    if options.get("cache"):
        assert torch.equal(cast(Any, model.plugins)["cache"].clr[:, :1], cast(Any, plain).cls_token)


def test_a_trained_cache_keeps_its_registers(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "reduction": "evit",
        "keep_rate": 0.5,
        "reduction_layers": [1, 2],
        "cache": "clc",
        "head": "cla",
    }
    model = built(**options)
    with torch.no_grad():
        model.plugins["cache"].clr.fill_(0.25)
    save_model(model, tmp_path / "w.safetensors")
    again = built(**options, pretrained=tmp_path / "w.safetensors")
    assert torch.equal(again.plugins["cache"].clr, model.plugins["cache"].clr)


def test_weights_with_half_of_a_method_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = built(adapter="ila++").state_dict()
    dropped = sorted(key for key in weights if key.startswith("plugins."))[:3]
    save_file({key: value.clone() for key, value in weights.items() if key not in dropped}, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="3 missing"):
        built(adapter="ila++", pretrained=tmp_path / "w.safetensors")
