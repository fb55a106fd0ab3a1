"""The network as an ONNX graph of convolutions, sums and clips, which OpenCV and onnxruntime read alike.

Written node by node rather than traced: batch normalisation is folded into the convolutions, uneven padding is part of
them, and height and width stay open.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from animesion_training.detection import network

OPSET = 13


class _Writer:
    """Nodes and weights of a graph under construction; every method returns the name of its output."""

    def __init__(self, half: bool) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self._half = half

    def node(self, kind: str, inputs: list[str], name: str = "", **attributes: Any) -> str:
        from onnx import helper

        name = name or f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=f"node_{name}", **attributes))
        return name

    def weight(self, value: NDArray[np.float32]) -> str:
        """A tensor of the file, in half precision if that is wanted."""
        from onnx import TensorProto, numpy_helper

        name = f"w{len(self.weights)}"
        if self._half and value.ndim > 1:
            self.weights.append(numpy_helper.from_array(value.astype(np.float16), name))
            return self.node("Cast", [name], to=TensorProto.FLOAT)
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def conv(self, given: str, layer: nn.Conv2d, norm: nn.Module | None, *, name: str = "") -> str:
        """A convolution with the normalisation after it."""
        kernel = layer.weight.detach().double()
        bias = torch.zeros(len(kernel), dtype=torch.float64) if layer.bias is None else layer.bias.detach().double()
        if norm is not None:
            assert isinstance(norm, nn.BatchNorm2d)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            gain = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
            bias = (bias - norm.running_mean.double()) * gain + norm.bias.detach().double()
            kernel = kernel * gain[:, None, None, None]
        size, stride = layer.kernel_size[0], layer.stride[0]
        if isinstance(layer.padding, tuple) and layer.padding[0]:
            before = after = layer.padding[0]
        else:  # TensorFlow's "same": what does not divide by two comes last
            before, after = (size - stride) // 2 if size > stride else 0, 0
            after = max(size - stride, 0) - before
        return self.node(
            "Conv",
            [given, self.weight(kernel.float().numpy()), self.weight(bias.float().numpy())],
            name,
            kernel_shape=[size, size], strides=[stride, stride], pads=[before, before, after, after],
            group=layer.groups, dilations=[1, 1],
        )  # fmt: skip

    def six(self, given: str) -> str:
        """ReLU6."""
        return self.node("Clip", [given, "zero", "six"])

    def normed(self, given: str, layer: Any, norm: Any) -> str:
        """A convolution and timm's normalisation with its activation, if it has one."""
        made = self.conv(given, layer, norm)
        return made if isinstance(getattr(norm, "act", nn.Identity()), nn.Identity) else self.six(made)

    def block(self, given: str, block: Any) -> str:
        """One block of EfficientNet-lite: an inverted residual, or the depthwise-separable first one."""
        made = given
        for layer, norm in network.pairs(block):
            made = self.normed(made, getattr(block, layer), getattr(block, norm))
        return self.node("Add", [made, given]) if block.has_skip else made

    def separable(self, given: str, block: nn.Module) -> str:
        """A block of the pyramid or of a head."""
        assert isinstance(block, nn.Sequential)
        first, norm, second, after, _ = block
        assert isinstance(first, nn.Conv2d)
        assert isinstance(second, nn.Conv2d)
        return self.six(self.conv(self.conv(given, first, norm), second, after))


def write(
    module: network.FaceNetwork, path: Path, *, half: bool = True, gain: float = 1.0, offset: float = 0.0
) -> None:
    """Write the graph.

    The input `image` has shape (1, 3, height, width), RGB from -1 to 1, sides multiples of 32. The outputs `stride8`,
    `stride16` and `stride32` are those of the network.

    Args:
        module: the network; its statistics are used as in evaluation.
        path: file to write.
        half: store kernels with 16 bits; they are widened when the file is loaded.
        gain: factor of the scores' logits, see `check.calibration`.
        offset: added to them after that.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph = _Writer(half)
    graph.weights += [
        numpy_helper.from_array(np.array(0, np.float32), "zero"),
        numpy_helper.from_array(np.array(6, np.float32), "six"),
        numpy_helper.from_array(np.array([], np.float32), "roi"),
        numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "twice"),
    ]
    low: Any = module.low
    made = graph.normed("image", low[0], low[1])
    levels = []
    whole: tuple[Any, ...] = ([low[2], low[3]], module.eight, module.sixteen)
    for stages in whole:
        for stage in stages:
            for block in stage:
                made = graph.block(made, block)
        levels.append(made)
    deep = made
    for block in module.deeper:
        deep = graph.separable(deep, block)
    levels = [*levels[1:], deep]
    above = ""
    outputs: list[Any] = []
    for number in (2, 1, 0):
        lateral: Any = module.lateral[number]
        here = graph.conv(levels[number], lateral[0], lateral[1])
        if above:
            wide = graph.node(
                "Resize", [above, "roi", "twice"], mode="nearest",
                coordinate_transformation_mode="asymmetric", nearest_mode="floor",
            )  # fmt: skip
            here = graph.node("Add", [here, wide])
        above = here
        made = graph.separable(here, module.smooth[number])
        head: Any = module.head[number]
        for block in head:
            made = graph.separable(made, block)
        out = module.out[number]
        assert isinstance(out, nn.Conv2d)
        out = copy.deepcopy(out)
        assert out.bias is not None
        with torch.no_grad():
            out.weight[0] *= gain
            out.bias[0] = out.bias[0] * gain + offset
        name = graph.conv(made, out, None, name=f"stride{network.STRIDES[number]}")
        outputs.insert(0, helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 5, f"h{number}", f"w{number}"]))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, "height", "width"])
    made_graph = helper.make_graph(graph.nodes, "faces", [image], outputs, graph.weights)
    model = helper.make_model(made_graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="animesion")
    model.ir_version = 8
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
