"""Activations that are recomputed in the backward pass: equal gradients and less memory, also in opened blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from animesion_training.models import create_model

SMALL: dict[str, Any] = {"depth": 6, "embed_dim": 32, "num_heads": 2, "drop_path_rate": 0.2}
METHODS: dict[str, dict[str, Any]] = {
    "evit": {"reduction": "evit", "keep_rate": 0.7},
    "tome": {"reduction": "tome", "keep_rate": 0.7},
    "dynamicvit": {"reduction": "dynamicvit", "keep_rate": 0.7},
    "cropr": {"reduction": "cropr", "keep_rate": 0.7},
    "clca": {"reduction": "evit", "keep_rate": 0.7, "cache": "clc", "head": "cla"},
    "lora": {"adapter": "lora"},
    "ila++": {"adapter": "ila++"},
    "vqt": {"adapter": "vqt"},
    "transfg": {"selector": "transfg"},
    "glsim": {"selector": "glsim"},
    "rams": {"selector": "rams"},
    "cal": {"selector": "cal"},
}


def step(name: str, *, recompute: bool) -> tuple[dict[str, Tensor], int]:
    """Gradients by name, and the bytes that the forward pass keeps for the backward pass."""
    torch.manual_seed(0)
    size = 128 if name == "ila++" else 64
    model: Any = create_model("vit_tiny_patch16", 3, size, **METHODS[name], **SMALL).train()
    model.set_grad_checkpointing(recompute)
    weights = {each.untyped_storage().data_ptr() for each in model.state_dict().values()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images, targets = torch.randn(4, 3, size, size), torch.tensor([0, 1, 2, 0])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if getattr(model, "has_losses", False):
            options = {"targets": targets} if model.needs_targets else {}
            logits, losses = model(images, with_losses=True, **options)
        else:
            logits, losses = model(images), {}
        loss = torch.nn.functional.cross_entropy(logits, targets) + sum(losses.values())
    loss.backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}, sum(kept.values())


@pytest.mark.parametrize("name", METHODS)
def test_recomputed_activations_give_the_same_gradients_from_less_memory(name: str) -> None:
    plain, much = step(name, recompute=False)
    recomputed, little = step(name, recompute=True)
    assert plain.keys() == recomputed.keys()
    for parameter, gradient in plain.items():
        torch.testing.assert_close(gradient, recomputed[parameter], rtol=1e-5, atol=1e-7, msg=parameter)
    assert little < (0.6 if name == "rams" else 0.4) * much
