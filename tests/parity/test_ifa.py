"""The original's outputs on small inputs: IFA and the plain head, loaded through `from_reference`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")

from safetensors import safe_open

from animesion_training import from_reference

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "fgir"
CASES = ["anim_vit_ifa", "ila_ifa_head", "ila_vit_frozenhead_base"]
TOLERANCE = 2e-5


def read(case):
    path = GOLDEN / f"{case}.safetensors"
    if not path.is_file():
        pytest.skip("reference outputs not found")
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    weights = {key.removeprefix("sd."): value for key, value in tensors.items() if key.startswith("sd.")}
    return config, weights, tensors["in.x"], tensors["out.logits"]


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_originals(case):
    config, weights, images, logits = read(case)
    with torch.inference_mode():
        error = (from_reference(config, weights)(images) - logits).abs().max().item()
    print(f"{case}: {error:.1e}")
    assert error <= TOLERANCE


def test_the_prefix_and_the_rest_of_the_config_are_not_needed():
    _, weights, images, logits = read("anim_vit_ifa")
    bare = {key.removeprefix("model."): value for key, value in weights.items()}
    model = from_reference({"model_name": "tiny_8", "image_size": 64, "num_attention_heads": 4}, bare)
    assert torch.allclose(model(images), logits, atol=TOLERANCE)


def test_every_weight_gets_a_gradient_that_a_small_step_confirms():
    config, weights, images, _ = read("anim_vit_ifa")
    model = from_reference(config, weights).double()
    labels = torch.tensor([3, 8])

    def loss():
        return torch.nn.functional.cross_entropy(model(images.double()), labels)

    loss().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    for name in ("backbone.cls_token", "backbone.blocks.0.attn.qkv.weight", "head.layers.weight"):
        parameter = model.get_parameter(name)
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        with torch.no_grad():
            parameter.add_(1e-5 * direction)
            after = loss()
            parameter.sub_(2e-5 * direction)
            slope = (after - loss()) / 2e-5
            parameter.add_(1e-5 * direction)
        assert slope.item() == pytest.approx((parameter.grad * direction).sum().item(), rel=1e-4, abs=1e-7)
