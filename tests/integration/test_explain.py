"""`animesion explain` draws panels for each kind of network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from animesion_training.analysis import explain
from animesion_training.distributed import distributed_context
from animesion_training.models import create_model
from animesion_training.weights import save_model

SMALL: dict[str, Any] = {"depth": 4, "embed_dim": 48, "num_heads": 3}
STAGES: dict[str, Any] = {"keep_rate": 0.5, "reduction_layers": [1, 2]}
KINDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "glsim": ({"selector": "glsim"}, ["similarity", "box", "crop"]),
    "rams": ({"selector": "rams"}, ["rollout", "box", "crop"]),
    "evit": ({"reduction": "evit", **STAGES}, ["after block1", "after block2"]),
    "evit-clca": ({"reduction": "evit", "cache": "clc", "head": "cla", **STAGES}, ["after block1", "after block2"]),
    "ats": ({"reduction": "ats", **STAGES}, ["after block1", "after block2"]),
    "dynamicvit": ({"reduction": "dynamicvit", **STAGES}, ["after block1", "after block2"]),
    "tome": ({"reduction": "tome", **STAGES}, ["after block1", "after block2"]),
    "dpcknn": ({"reduction": "dpcknn", **STAGES}, ["after cluster0", "after cluster1"]),
    "lora": ({"adapter": "lora"}, ["attention rollout"]),
}


@pytest.mark.parametrize(("options", "titles"), KINDS.values(), ids=KINDS)
def test_each_kind_of_network_has_its_panels(options: dict[str, Any], titles: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16", 3, 96, **options, **SMALL)
    save_model(model, tmp_path / "w.safetensors", ("a", "b", "c"))
    rng = np.random.default_rng(0)
    images = [tmp_path / f"{i}.png" for i in range(2)]
    for path in images:
        coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((100, 80), Image.Resampling.BICUBIC).save(path)
    with distributed_context("cpu") as context:
        rows = list(explain.explain(tmp_path / "w.safetensors", images, context))
    assert [row.path for row in rows] == images
    for row in rows:
        assert [panel.title for panel in row.panels] == ["image", *titles]
        assert all(panel.pixels.shape == (96, 96, 3) for panel in row.panels)
        changed = [panel for panel in row.panels[1:] if panel.title != "crop"]  # which may be of the whole image
        assert all(not np.array_equal(row.panels[0].pixels, panel.pixels) for panel in changed)
    assert explain.sheet(rows, 64).size == (6 + (len(titles) + 1) * 70, 20 + 2 * 84)


def test_half_of_the_patches_are_dark_when_half_are_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16", 3, 96, reduction="topk", keep_rate=0.5, reduction_layers=[1], **SMALL)
    save_model(model, tmp_path / "w.safetensors", ("a", "b", "c"))
    Image.new("RGB", (96, 96), (200, 180, 160)).save(tmp_path / "p.png")
    with distributed_context("cpu") as context:
        [row] = explain.explain(tmp_path / "w.safetensors", [tmp_path / "p.png"], context)
    assert (row.panels[1].pixels[..., 0] < 100).mean() == 0.5
