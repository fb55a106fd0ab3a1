"""The detector `onnx` on what exporters write: shapes of inputs and outputs, and what is refused."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from animesion.detectors import onnx_outputs
from animesion.detectors.onnx import OnnxDetector
from animesion.errors import UsageError

from .test_detect_and_predict import close, drawn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SIDE = 128
QUERIES = 300
CELLS = sum((SIDE // stride) ** 2 for stride in (8, 16, 32))
#: Boxes of unlikely queries: centre and size, relative.
UNLIKELY = np.random.default_rng(0).uniform(0.1, 0.4, (QUERIES - 1, 4)).astype(np.float32)


class Graph:
    """A network that finds the bright rectangle of its input; `corners` is (1, 4) in pixels of the input."""

    def __init__(self, *, batch: int | str = "batch", kind: str = "float", nhwc: bool = False, side: int | str = SIDE):
        from onnx import TensorProto, helper

        self.helper = helper
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.outputs: list[Any] = []
        code = {"float": TensorProto.FLOAT, "half": TensorProto.FLOAT16, "bytes": TensorProto.UINT8}[kind]
        shape = [batch, side, side, 3] if nhwc else [batch, 3, side, side]
        self.inputs = [helper.make_tensor_value_info("images", code, shape)]
        full = self.add("Cast", ["images"], to=TensorProto.FLOAT)
        if nhwc:
            full = self.add("Transpose", [full], perm=[0, 3, 1, 2])
        if kind == "bytes":
            full = self.add("Div", [full, self.constant(np.float32(255))])
        dark = self.add("ReduceMin", [full], axes=[1], keepdims=0)
        mask = self.add("Cast", [self.add("Greater", [dark, self.constant(np.float32(0.7))])], to=TensorProto.FLOAT)
        ends = []
        for last in (0, 1):
            for axis in (1, 2):
                line = self.add("ReduceMax", [mask], axes=[axis], keepdims=0)
                place = self.add("ArgMax", [line], axis=1, keepdims=1, select_last_index=last)
                place = self.add("Cast", [place], to=TensorProto.FLOAT)
                ends.append(self.add("Add", [place, self.constant(np.float32(last))]))
        self.corners = self.add("Concat", ends, axis=1)
        half = np.array([[0.5, 0, -1, 0], [0, 0.5, 0, -1], [0.5, 0, 1, 0], [0, 0.5, 0, 1]], np.float32)
        self.centred = self.add("MatMul", [self.corners, self.constant(half)])

    def add(self, operation: str, inputs: list[str], **attributes: Any) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append(self.helper.make_node(operation, inputs, [name], **attributes))
        return name

    def constant(self, value: Any) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.asarray(value), f"c{len(self.constants)}"))
        return self.constants[-1].name

    def rows(self, first: str, rest: np.ndarray, *, axes: tuple[int, ...] = (0,)) -> str:
        """One row, then constant ones, with a batch axis."""
        together = self.add("Concat", [first, self.constant(rest.astype(np.float32))], axis=0)
        return self.add("Unsqueeze", [together, self.constant(np.array(axes, np.int64))])

    def scored(self, box: str, tail: list[float]) -> str:
        return self.add("Concat", [box, self.constant(np.array([tail], np.float32))], axis=1)

    def output(self, name: str, value: str, kind: int = 1) -> None:
        self.nodes.append(self.helper.make_node("Identity", [value], [name]))
        self.outputs.append(self.helper.make_tensor_value_info(name, kind, None))

    def save(self, path: Path, **metadata: str) -> Path:
        graph = self.helper.make_graph(self.nodes, "n", self.inputs, self.outputs, self.constants)
        model = self.helper.make_model(graph, opset_imports=[self.helper.make_opsetid("", 17)], ir_version=9)
        self.helper.set_model_props(model, metadata)
        onnx.save(model, path)
        return path


def filler(count: int, columns: int) -> np.ndarray:
    """Rows of unlikely boxes all over the input, in pixels."""
    rng = np.random.default_rng(1)
    rows = np.full((count, columns), 0.01)
    rows[:, :2], rows[:, 2:4] = rng.uniform(0, SIDE, (count, 2)), rng.uniform(4, 40, (count, 2))
    return rows


def yolov5(graph: Graph, classes: int = 2) -> None:
    row = graph.scored(graph.centred, [0.9, *[1.0] + [0.0] * (classes - 1)])
    graph.output("output0", graph.rows(row, filler(3 * CELLS - 1, 5 + classes)))


def yolov8(graph: Graph) -> None:
    row = graph.scored(graph.centred, [0.9, 0.1])
    graph.output("output0", graph.add("Transpose", [graph.rows(row, filler(CELLS - 1, 6))], perm=[0, 2, 1]))


def yolov8_with_masks(graph: Graph) -> None:
    row = graph.scored(graph.centred, [0.9, 0.1, *[3.0] * 32])
    graph.output("output0", graph.add("Transpose", [graph.rows(row, filler(CELLS - 1, 38))], perm=[0, 2, 1]))
    graph.output("output1", graph.constant(np.zeros((1, 32, 32, 32), np.float32)))


def suppressed(graph: Graph) -> None:
    graph.output("output0", graph.rows(graph.scored(graph.corners, [0.9, 1]), np.zeros((QUERIES - 1, 6))))


def yolov7(graph: Graph) -> None:
    row = graph.add("Concat", [graph.constant(np.zeros((1, 1), np.float32)), graph.corners], axis=1)
    graph.output("output", graph.scored(row, [1, 0.9]))


def efficient(graph: Graph) -> None:
    """Four outputs of TensorRT's suppression; rows after the first are left over."""
    graph.output("num_dets", graph.constant(np.array([[1]], np.int32)), 6)
    graph.output("det_boxes", graph.rows(graph.corners, np.full((99, 4), 7)))
    graph.output("det_scores", graph.constant(np.full((1, 100), 0.9, np.float32)))
    graph.output("det_classes", graph.constant(np.zeros((1, 100), np.int32)), 6)


def rtdetr(graph: Graph) -> None:
    """Boxes in units of `orig_target_sizes`, as RT-DETR and D-FINE write them."""
    from onnx import TensorProto

    graph.inputs.append(graph.helper.make_tensor_value_info("orig_target_sizes", TensorProto.INT64, ["N", 2]))
    sizes = graph.add("Cast", ["orig_target_sizes"], to=TensorProto.FLOAT)
    sizes = graph.add("Concat", [sizes, sizes], axis=1)
    plain_rtdetr(graph, lambda boxes: graph.add("Mul", [boxes, sizes]))


def plain_rtdetr(graph: Graph, scaled: Callable[[str], str] = lambda boxes: boxes) -> None:
    relative = graph.add("Div", [graph.corners, graph.constant(np.float32(SIDE))])
    others = np.concatenate([UNLIKELY[:, :2], UNLIKELY[:, :2] + UNLIKELY[:, 2:]], 1)
    scores = np.full((1, QUERIES), 0.02, np.float32)
    scores[0, 0] = 0.9
    graph.output("labels", graph.constant(np.zeros((1, QUERIES), np.int64)), 7)
    graph.output("boxes", scaled(graph.rows(relative, others)))
    graph.output("scores", graph.constant(scores))


def queries(graph: Graph) -> None:
    """Class values and relative centres, as `transformers` exports the DETR family."""
    relative = graph.add("Div", [graph.centred, graph.constant(np.float32(SIDE))])
    values = np.full((1, QUERIES, 3), -4, np.float32)
    values[0, 0, 1] = np.log(9)
    graph.output("logits", graph.constant(values))
    graph.output("pred_boxes", graph.rows(relative, UNLIKELY))


def ultralytics_rtdetr(graph: Graph) -> None:
    relative = graph.add("Div", [graph.centred, graph.constant(np.float32(SIDE))])
    rows = np.concatenate([UNLIKELY, np.full((QUERIES - 1, 2), 0.02)], 1)
    graph.output("output0", graph.rows(graph.scored(relative, [0.1, 0.9]), rows))


def turned(graph: Graph) -> None:
    graph.output("output0", graph.rows(graph.scored(graph.centred, [0.9, 0.1]), filler(CELLS - 1, 6)))


def cut_off(graph: Graph) -> None:
    graph.output("output0", graph.corners)


TWO = {"names": "{0: 'face', 1: 'head'}"}
SIGMOID = {"activation": "sigmoid"}

EXPORTS: list[tuple[Callable[[Graph], None], dict[str, str], dict[str, Any]]] = [
    (yolov5, TWO, {}),
    (yolov5, {}, {}),
    (yolov8, TWO, {}),
    (yolov8, {}, {}),
    (yolov8_with_masks, TWO, {}),
    (suppressed, TWO, {}),
    (suppressed, {}, {}),
    (yolov7, {}, {}),
    (efficient, {}, {}),
    (rtdetr, {}, {}),
    (plain_rtdetr, {}, {}),
    (queries, {}, SIGMOID),
    (ultralytics_rtdetr, {}, {"layout": "yolov8"}),
    (turned, TWO, {}),
]


def found(path: Path, image: Image.Image, **options: Any) -> Any:
    return OnnxDetector(OnnxDetector.Options(file=str(path), **options))([image], [None])[0]


@pytest.mark.parametrize(("export", "metadata", "options"), EXPORTS, ids=lambda value: getattr(value, "__name__", ""))
def test_boxes_are_those_of_the_image_for_every_exporter(
    tmp_path: Path, export: Callable[[Graph], None], metadata: dict[str, str], options: dict[str, Any]
) -> None:
    graph = Graph()
    export(graph)
    path = graph.save(tmp_path / "n.onnx", **metadata)
    detector = OnnxDetector(OnnxDetector.Options(file=str(path), **options))
    for size in [(300, 200), (90, 260)]:
        image, truth = drawn(*size, (0.2, 0.3, 0.6, 0.8))
        [[box]] = detector([image], [None])
        assert close(box, truth, image, SIDE)
        assert box.score == pytest.approx(0.9, abs=1e-3)
        # no other shape of the frame may change the boxes
    if not options:
        [box] = found(path, image, resize="stretch")
        assert close(box, truth, image, SIDE)


@pytest.mark.parametrize(
    ("kind", "nhwc", "batch", "side"),
    [
        ("float", False, 1, SIDE),
        ("float", False, "N", "side"),
        ("float", True, -1, SIDE),
        ("half", True, "batch", "side"),
        ("bytes", False, "batch", SIDE),
        ("bytes", True, 1, SIDE),
    ],
)
def test_inputs_of_any_type_order_and_openness(
    tmp_path: Path, kind: str, nhwc: bool, batch: int | str, side: int | str
) -> None:
    graph = Graph(batch=batch, kind=kind, nhwc=nhwc, side=side)
    yolov8(graph)
    path = graph.save(tmp_path / "n.onnx")
    image, truth = drawn(260, 260, (0.2, 0.3, 0.6, 0.8))
    start = time.perf_counter()
    [box] = found(path, image, size=SIDE)
    # a named axis used to be searched for in a range of two thousand million
    assert time.perf_counter() - start < 20
    assert close(box, truth, image, SIDE)


def test_colours_and_their_values_are_as_the_options_say(tmp_path: Path) -> None:
    """A network whose score is the first channel of the input, over 1,000."""

    def score(**options: Any) -> float:
        [box] = found(path, Image.new("RGB", (SIDE, SIDE), (250, 50, 100)), score=0.0, **options)
        return 1000 * float(box.score)

    graph = Graph()
    one = graph.add("Slice", ["images", *(graph.constant(np.array(v, np.int64)) for v in ([0] * 4, [1] * 4))])
    one = graph.add(
        "Div", [graph.add("Reshape", [one, graph.constant(np.array([1, 1]))]), graph.constant(np.float32(1000))]
    )
    row = graph.add("Concat", [graph.constant(np.array([[9, 9, 99, 99]], np.float32)), one], axis=1)
    graph.output("output0", graph.add("Concat", [row, graph.constant(np.zeros((1, 1), np.float32))], axis=1))
    path = graph.save(tmp_path / "n.onnx")
    assert score() == pytest.approx(250 / 255, rel=1e-4)
    assert score(channels="bgr") == pytest.approx(100 / 255, rel=1e-4)
    assert score(values="0-255") == pytest.approx(250, rel=1e-4)
    assert score(values="imagenet") == pytest.approx((250 / 255 - 0.485) / 0.229, rel=1e-4)
    assert score(values="imagenet", channels="bgr") == pytest.approx((100 / 255 - 0.406) / 0.225, abs=12)


@pytest.mark.parametrize(
    ("inputs", "export", "metadata", "options", "message"),
    [
        ({"batch": 8}, cut_off, {}, {}, "takes batches of 8 images"),
        ({}, yolov8, {"task": "obb"}, {}, "returns rotated boxes"),
        ({}, yolov8, {}, {"axes": "nhwc"}, r"shape \(batch, 3, 128, 128\), which has not three channels"),
        ({"side": 3}, yolov8, {}, {}, "set the option 'axes'"),
        ({"kind": "bytes"}, yolov8, {}, {"values": "imagenet"}, "takes bytes"),
        ({}, ultralytics_rtdetr, TWO, {}, "where layout 'boxes' has class ids below 2: set the option 'layout'"),
        ({}, turned, {}, {}, r"output0 \(1, 336, 6\) and has no class names, which are not recognised"),
        ({}, queries, {}, {}, "set the option 'activation' to sigmoid"),
        ({}, rtdetr, {}, {"layout": "yolov8"}, "the option 'layout' is 'yolov8'"),
        ({}, yolov8, {}, {"layout": "rtdetr"}, "the option 'layout' is 'rtdetr'"),
    ],
)
def test_what_is_not_certain_is_refused_with_the_option_to_set(
    tmp_path: Path,
    inputs: dict[str, Any],
    export: Callable[[Graph], None],
    metadata: dict[str, str],
    options: dict[str, Any],
    message: str,
) -> None:
    graph = Graph(**inputs)
    export(graph)
    path = graph.save(tmp_path / "n.onnx", **metadata)
    image, _ = drawn(200, 200, (0.2, 0.3, 0.6, 0.8))
    with pytest.raises(UsageError, match=message):
        found(path, image, **options)


def test_other_inputs_are_named(tmp_path: Path) -> None:
    """PaddleDetection's networks take the image's shape and scale too."""
    graph = Graph()
    yolov8(graph)
    graph.inputs.append(graph.helper.make_tensor_value_info("im_shape", 1, [1, 2]))
    with pytest.raises(UsageError, match=r"takes images \(batch, 3, 128, 128\) of tensor\(float\), im_shape \(1, 2\)"):
        found(graph.save(tmp_path / "n.onnx"), Image.new("RGB", (9, 9)))


# -- outputs alone -----------------------------------------------------------------------------------------------------


def reading(**changes: Any) -> onnx_outputs.Reading:
    return onnx_outputs.Reading(**changes)


def refused(outputs: dict[str, Any], match: str, **changes: Any) -> None:
    with pytest.raises(UsageError, match=match):
        onnx_outputs.read(outputs, 640, 640, reading(**changes))


def test_heads_that_are_not_decoded_are_refused() -> None:
    maps = {f"head{i}": np.zeros((1, 255, side, side), np.float32) for i, side in enumerate((80, 40, 20))}
    refused(maps, r"head0 \(1, 255, 80, 80\).*not recognised")
    rng = np.random.default_rng(0)
    # YOLOX leaves the grid to its reader: offsets of a cell, and logarithms of sides
    rows = np.concatenate([rng.normal(0, 1.5, (1, 8400, 4)), rng.uniform(0, 0.9, (1, 8400, 2))], 2)
    refused({"output": rows.astype(np.float32)}, "not recognised")
    refused({"output": rows.astype(np.float32)}, "boxes decoded", layout="yolov5")


def test_relative_boxes_after_suppression_are_not_guessed() -> None:
    rows = np.zeros((1, 300, 6), np.float32)
    rows[0, 0] = 0.1, 0.2, 0.5, 0.7, 0.9, 0
    refused({"output0": rows}, "set the option 'coordinates'")
    found = onnx_outputs.read({"output0": rows}, 640, 320, reading(coordinates="relative"))
    assert found.corners[0] == pytest.approx((64, 64, 320, 224))
    found = onnx_outputs.read({"output0": rows}, 640, 320, reading(coordinates="pixels"))
    assert found.corners[0] == pytest.approx((0.1, 0.2, 0.5, 0.7))


def test_boxes_that_end_before_they_start_are_refused() -> None:
    rows = np.zeros((1, 300, 6), np.float32)
    rows[0, 0] = 300, 300, 60, 80, 0.9, 0  # centre and size
    refused({"output0": rows}, "right or bottom is before")


def test_boxes_of_several_images_are_refused() -> None:
    rows = np.array([[0, 10, 10, 90, 90, 0, 0.9], [1, 10, 10, 90, 90, 0, 0.9]], np.float32)
    refused({"output": rows}, "boxes of several images")


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_class_values_become_scores(kind: str) -> None:
    values = np.full((1, 100, 3), -4, np.float32)
    values[0, 0] = 2, -1, 0
    boxes = np.random.default_rng(0).uniform(0.2, 0.6, (1, 100, 4)).astype(np.float32)
    found = onnx_outputs.read({"logits": values, "pred_boxes": boxes}, 640, 640, reading(activation=kind))
    expected = 1 / (1 + np.exp(-2)) if kind == "sigmoid" else np.exp(2) / np.exp([2, -1, 0]).sum()
    assert found.scores[0] == pytest.approx(expected, abs=1e-5)
    assert found.classes[0] == 0
    assert not found.suppressed


def test_nothing_found_is_no_box() -> None:
    for outputs in (
        {"output0": np.zeros((0, 6), np.float32)},
        {"output0": np.zeros((1, 0, 6), np.float32)},
        {"output0": np.zeros((1, 300, 6), np.float32)},
        {
            "labels": np.zeros((1, 0), np.int64),
            "boxes": np.zeros((1, 0, 4), np.float32),
            "scores": np.zeros((1, 0), np.float32),
        },
        {"labels": np.zeros(0, np.int64), "boxes": np.zeros((0, 4), np.float32), "scores": np.zeros(0, np.float32)},
    ):
        found = onnx_outputs.read(outputs, 640, 640, reading())
        assert not (found.scores >= 0.25).any()


SHAPES: list[tuple[int, ...]] = [
    *[(1, 300, 6), (1, 6, 300), (1, 300, 4), (1, 300), (300,), (1,), (1, 1), (300, 7), (0, 6), (1, 0, 6)],
    *[(1, 5, 8400), (1, 8400, 6), (2, 300, 6), (1, 4, 300), (1, 32, 9, 9), (1, 300, 80), (300, 4), (), (1, 3, 3)],
]


@hypothesis.given(
    st.lists(
        st.tuples(
            st.sampled_from(["boxes", "scores", "labels", "logits", "pred_boxes", "num_dets", "output0", "x"]),
            st.sampled_from(SHAPES),
            st.sampled_from(["float32", "float16", "int64"]),
            st.sampled_from(["zero", "unit", "wide", "wild"]),
        ),
        max_size=4,
        unique_by=lambda each: each[0],
    ),
    st.sampled_from(["auto", "yolov5", "yolov8", "boxes", "yolov7", "rtdetr", "queries"]),
    st.sampled_from(["auto", "sigmoid", "softmax"]),
    st.integers(0, 3),
)
@hypothesis.settings(deadline=None, max_examples=60)
def test_any_output_is_read_or_refused(outputs: list[Any], layout: Any, activation: Any, classes: int) -> None:
    rng = np.random.default_rng(0)
    arrays = {}
    for name, shape, kind, values in outputs:
        value = {"zero": np.zeros(shape), "unit": rng.uniform(0, 1, shape), "wide": rng.uniform(0, 640, shape)}.get(
            values
        )
        if value is None:
            value = rng.choice([np.nan, np.inf, -np.inf, -1e38, 3e38, 0.5, 0], shape)
        with np.errstate(all="ignore"):
            arrays[name] = np.asarray(np.nan_to_num(value) if kind == "int64" else value).astype(kind)
    how = onnx_outputs.Reading(layout=layout, activation=activation, classes=classes)
    try:
        found = onnx_outputs.read(arrays, 640, 640, how)
    except UsageError:
        return
    assert found.corners.shape == (len(found.scores), 4) == (len(found.classes), 4)
    assert ((found.scores >= 0) & (found.scores <= 1)).all()
