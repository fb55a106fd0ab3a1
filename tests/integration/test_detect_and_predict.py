"""The detector `onnx` on small networks that read pixels: its forms of output, its options, builds and `predict`."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import animesion
from animesion import detectors
from animesion.cli import cli
from animesion.detectors.onnx import OnnxDetector, suppress
from animesion.errors import AnimesionError, UsageError
from animesion.images import codec
from animesion.schemas import Box
from animesion_training.models import create_model
from animesion_training.weights import save_model

from .test_bad_input import put, rows

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SHAPES = [(400, 300), (300, 400), (97, 61), (1600, 200), (50, 900), (64, 64)]


def save(
    path: Path,
    nodes: list[Any],
    constants: list[Any],
    taken: Any,
    metadata: dict[str, str] | None = None,
    kind: int = 1,
) -> None:
    """Write a network with one output, `output0`, of an element type of ONNX (1 is float)."""
    from onnx import helper

    given = helper.make_tensor_value_info("output0", kind, None)
    graph = helper.make_graph(nodes, "network", [taken], [given], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, metadata or {})
    onnx.save(model, path)


def network(
    path: Path,
    layout: str = "yolov8",
    *,
    sides: tuple[int | str, int | str] = (256, 256),
    half: bool = False,
    names: tuple[str, ...] = ("face", "hand"),
    scores: tuple[tuple[float, ...], ...] = ((0.9, 0.1), (0.7, 0.0), (0.2, 0.1)),
    shifts: tuple[float, ...] = (0, 2, 0),
    **metadata: str,
) -> Path:
    """A network that boxes the bright pixels of its input: one row for each of `scores`, moved right by its shift.

    The other rows are empty, as many as networks of the layout have. Sides are height and width.
    """
    from onnx import TensorProto, helper, numpy_helper

    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    nodes: list[Any] = []
    constants: dict[str, Any] = {}

    def constant(name: str, value: Any, dtype: Any = np.float32) -> str:
        constants[name] = numpy_helper.from_array(np.asarray(value, dtype), name)
        return name

    def add(operation: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operation, inputs, [output], **attributes))
        return output

    full = add("Cast", ["images"], "full", to=TensorProto.FLOAT)
    dark = add("ReduceMin", [full], "dark", axes=[1], keepdims=0)  # (1, H, W)
    mask = add("Cast", [add("Greater", [dark, constant("bright", 0.7)], "is")], "mask", to=TensorProto.FLOAT)
    ends = {}
    for name, axis in (("x", 1), ("y", 2)):
        line = add("ReduceMax", [mask], f"line_{name}", axes=[axis], keepdims=0)  # (1, W or H)
        for end, last in (("first", 0), ("last", 1)):
            found = add("ArgMax", [line], f"{end}_{name}", axis=1, keepdims=1, select_last_index=last)  # (1, 1)
            ends[end, name] = add("Cast", [found], f"{end}_{name}_float", to=TensorProto.FLOAT)
        ends["last", name] = add("Add", [ends["last", name], constant(f"one_{name}", 1)], f"end_{name}")
    seen = add("ReduceMax", [mask], "seen", axes=[1, 2], keepdims=0)  # (1,)
    corners = add("Concat", [ends["first", "x"], ends["first", "y"], ends["last", "x"], ends["last", "y"]], "c", axis=1)
    moved = add("Add", [corners, constant("moves", [[shift, 0, shift, 0] for shift in shifts])], "moved")  # (R, 4)
    centred = np.array([[0.5, 0, -1, 0], [0, 0.5, 0, -1], [0.5, 0, 1, 0], [0, 0.5, 0, 1]])
    if layout in {"yolov5", "yolov8"}:
        moved = add("MatMul", [moved, constant("centred", centred)], "centre_and_size")
    of_classes = np.array(scores)
    if layout == "yolov5":
        tail = np.concatenate([np.full((len(scores), 1), 0.5), of_classes], 1)  # objectness halves the score
    elif layout == "yolov8":
        tail = of_classes
    else:
        tail = np.stack([of_classes.max(1), of_classes.argmax(1)], 1)
    visible = add("Mul", [constant("tail", tail), seen], "visible")
    rows = add("Concat", [moved, visible], "rows", axis=1)
    height, width = (side if isinstance(side, int) else 64 for side in sides)
    places = sum((height // s) * (width // s) for s in (8, 16, 32))
    total = {"yolov5": 3 * places, "yolov8": places}.get(layout, 100)
    pads = [0, 0, total - len(scores), 0]
    out = add("Pad", [rows, constant("pads", pads, np.int64)], "padded")
    if layout == "yolov8":
        out = add("Transpose", [out], "turned", perm=[1, 0])
    if layout != "flat":
        out = add("Unsqueeze", [out, constant("axes", [0], np.int64)], "batched")
    add("Cast", [out], "output0", to=kind)
    if names:
        metadata = {"names": str(dict(enumerate(names))), **metadata}
    taken = helper.make_tensor_value_info("images", kind, [1, 3, *sides])
    save(path, nodes, list(constants.values()), taken, metadata, kind)
    return path


def drawn(width: int, height: int, box: tuple[float, float, float, float]) -> tuple[Image.Image, Box]:
    """A dark image with a bright rectangle, and where that is."""
    left, top, right, bottom = (
        round(share * side) for share, side in zip(box, (width, height, width, height), strict=True)
    )
    pixels = np.full((height, width, 3), 30, np.uint8)
    pixels[top:bottom, left:right] = 250
    return Image.fromarray(pixels), Box(left / width, top / height, right / width, bottom / height, 1.0)


def found(path: Path, *images: Image.Image, **options: Any) -> list[list[Box]]:
    made = OnnxDetector(OnnxDetector.Options(file=str(path), **options))
    return made(images, [None] * len(images))


def close(box: Box, truth: Box, image: Image.Image, side: int) -> bool:
    """Whether the edges differ by less than 1.5 px of the network's input."""
    pixel = max(image.size) / side
    allowed = 1.5 * max(pixel, 1.0)
    sizes = (*image.size, *image.size)
    return all(abs(a - b) * size < allowed for a, b, size in zip(box[:4], truth[:4], sizes, strict=True))


@pytest.fixture
def announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry point of `onnx`, and an empty folder of detectors."""
    monkeypatch.setenv("ANIMESION_DETECTORS", str(tmp_path / "detectors"))
    if "onnx" not in detectors.names():
        entry = b"[animesion.detectors]\nonnx = animesion.detectors.onnx:OnnxDetector\n"
        put(tmp_path / "site", "yolo-1.0.dist-info/METADATA", b"Metadata-Version: 2.1\nName: yolo\nVersion: 1.0\n")
        put(tmp_path / "site", "yolo-1.0.dist-info/entry_points.txt", entry)
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        importlib.invalidate_caches()


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, list(map(str, arguments)))


@pytest.mark.parametrize("size", SHAPES, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("layout", ["yolov8", "yolov5", "flat", "end2end"])
def test_boxes_are_those_of_the_image_in_every_layout_and_shape(
    tmp_path: Path, layout: str, size: tuple[int, int]
) -> None:
    image, truth = drawn(*size, (0.25, 0.2, 0.75, 0.6))
    [boxes] = found(network(tmp_path / "n.onnx", layout), image)
    # suppressed already, the file's second row counts as another box
    assert len(boxes) == (1 if layout.startswith("yolo") else 2)
    assert close(boxes[0], truth, image, 256)
    assert boxes[0].score == pytest.approx(0.45 if layout == "yolov5" else 0.9, abs=1e-3)


@pytest.mark.parametrize("sides", [(256, 128), (128, 320), ("height", "width"), (160, "width")])
@pytest.mark.parametrize("size", SHAPES[:4], ids="{0[0]}x{0[1]}".format)
def test_inputs_of_any_sides_and_open_ones(
    tmp_path: Path, sides: tuple[int | str, int | str], size: tuple[int, int]
) -> None:
    image, truth = drawn(*size, (0.1, 0.3, 0.5, 0.9))
    path = network(tmp_path / "n.onnx", sides=sides)
    [[box]] = found(path, image, size=320)
    height, width = (side if isinstance(side, int) else 320 for side in sides)
    assert close(box, truth, image, max(1, round(max(size) * min(width / size[0], height / size[1]))))


def test_half_floats_are_taken_and_given(tmp_path: Path) -> None:
    image, truth = drawn(300, 200, (0.2, 0.2, 0.6, 0.7))
    [[box]] = found(network(tmp_path / "n.onnx", half=True), image)
    assert close(box, truth, image, 256)


def test_an_open_input_is_padded_to_the_stride_of_the_file(tmp_path: Path) -> None:
    """A network that scores by the sides of its input: 0.5 where they are 64 x 192."""
    from onnx import TensorProto, helper, numpy_helper

    shares = numpy_helper.from_array(np.array([64 * 2, 192], np.float32), "sides")  # for a score and a class
    fixed = numpy_helper.from_array(np.array([[0, 0, 32, 32]], np.float32), "box")
    nodes = [
        helper.make_node("Shape", ["images"], ["shape"], start=2),
        helper.make_node("Cast", ["shape"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "sides"], ["half"]),
        helper.make_node("Unsqueeze", ["half", "zero"], ["two"]),
        helper.make_node("Concat", ["box", "two"], ["output0"], axis=1),
    ]
    zero = numpy_helper.from_array(np.array([0], np.int64), "zero")
    taken = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, "h", "w"])
    save(tmp_path / "n.onnx", nodes, [shares, fixed, zero], taken, {"stride": "64"})
    [[box]] = found(tmp_path / "n.onnx", Image.new("RGB", (380, 100)), size=190)
    assert box.score == 0.5
    # 190 x 50 px in the centre of 192 x 64
    assert box[:4] == pytest.approx((0, 0, 31 / 190, 25 / 50))


def test_options_choose_classes_scores_and_overlap(tmp_path: Path) -> None:
    path = network(tmp_path / "n.onnx", scores=((0.9, 0.1), (0.1, 0.6), (0.3, 0.0)), shifts=(0, 6, 200))
    image, _ = drawn(256, 256, (0.25, 0.25, 0.5, 0.5))

    def scores(**options: Any) -> list[float]:
        [boxes] = found(path, image, **options)
        return [round(box.score, 3) for box in boxes]

    assert scores() == [0.9]  # the second overlaps the first, the third is outside
    assert scores(iou=0.9) == [0.9, 0.6]
    assert scores(classes=["hand"]) == scores(classes=[1]) == [0.6]
    assert scores(classes=[0, "hand"], iou=0.9) == [0.9, 0.6]
    assert scores(score=0.95) == []
    assert scores(score=0.65, iou=1) == [0.9]
    [nothing] = found(path, Image.new("RGB", (200, 90)))
    assert nothing == []


def test_masks_after_the_classes_are_no_classes(tmp_path: Path) -> None:
    image, truth = drawn(256, 256, (0.25, 0.25, 0.5, 0.5))
    masks = ((0.3, 0.9, -7.0, 40.0), (0.2, 0.9, 3.0, 5.0), (0.0, 0.0, 0.0, 9.0))
    for layout in ("yolov5", "yolov8"):
        path = network(tmp_path / f"{layout}.onnx", layout, scores=masks, names=("face",))
        [[box]] = found(path, image, score=0.1)
        assert box.score == pytest.approx(0.15 if layout == "yolov5" else 0.3)
        assert close(box, truth, image, 256)


def test_one_class_of_yolov5_is_told_from_suppressed_boxes(tmp_path: Path) -> None:
    """Both have six columns; only the number of rows differs."""
    image, truth = drawn(256, 256, (0.25, 0.25, 0.5, 0.5))
    one = ((0.9,), (0.7,), (0.2,))
    [[box]] = found(network(tmp_path / "five.onnx", "yolov5", names=(), scores=one), image)
    assert close(box, truth, image, 256)
    [boxes] = found(network(tmp_path / "done.onnx", "end2end", names=(), scores=one), image)
    assert [round(box.score, 2) for box in boxes] == [0.9, 0.7]


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"classes": ["tail"]}, r"lists 'tail', but .* has 0 \(face\), 1 \(hand\)"),
        ({}, {"classes": [2]}, "lists 2, but"),
        ({"names": ()}, {"classes": ["face"]}, "has no class names"),
        ({}, {"file": "absent.onnx"}, "file not found: absent.onnx"),
        ({}, {"layout": "boxes"}, r"returns output0 \(1, 6, 1344\) .*not recognised"),
        ({"names": ("a", "b", "c")}, {}, r"returns output0 \(1, 6, 1344\) .*not recognised"),
        ({"scores": ((5.0, 7.0),), "shifts": (0,)}, {}, "returns scores from 0 to 7 instead of 0 to 1"),
        ({"sides": (9999, 9999)}, {}, "takes images of 9999x9999 px, which is too large"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    path = network(tmp_path / "n.onnx", **changes)
    image, _ = drawn(100, 80, (0.2, 0.2, 0.6, 0.6))
    with pytest.raises(UsageError, match=message):
        OnnxDetector(OnnxDetector.Options(**{"file": str(path), **options}))([image], [None])


@pytest.mark.parametrize("content", [b"", b"no network", b"\x08\x09\x12\xff\xff\xff\xff\x0f"])
def test_what_is_no_network_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "n.onnx").write_bytes(content)
    with pytest.raises(UsageError, match="is not a network that onnxruntime can load"):
        found(tmp_path / "n.onnx")


def test_a_network_that_fails_on_an_image_is_one_sentence(tmp_path: Path) -> None:
    """It asks for rows of seven numbers, and the image has no multiple of seven."""
    from onnx import TensorProto, helper, numpy_helper

    shape = numpy_helper.from_array(np.array([1, -1, 7], np.int64), "shape")
    save(
        tmp_path / "n.onnx",
        [helper.make_node("Reshape", ["images", "shape"], ["output0"])],
        [shape],
        helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, "h", "w"]),
    )
    with pytest.raises(AnimesionError, match=r"n\.onnx fails on an image: .*Reshape"):
        found(tmp_path / "n.onnx", Image.new("RGB", (64, 64)))


def test_cuda_without_a_gpu_is_one_sentence(tmp_path: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(UsageError, match="needs a GPU and onnxruntime-gpu"):
        found(network(tmp_path / "n.onnx"), device="cuda")


def test_boxes_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    wild = (float("nan"), float("inf"), 0.0, -1e38, 3e38)
    image, _ = drawn(256, 256, (0.25, 0.25, 0.5, 0.5))
    path = network(tmp_path / "n.onnx", scores=((0.9, 0.1),) * 5, shifts=wild)
    [boxes] = found(path, image)
    assert len(boxes) == 1


@given(
    st.lists(st.tuples(*[st.integers(0, 30)] * 2, *[st.integers(1, 20)] * 2), max_size=40),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    st.integers(1, 12),
)
def test_suppression_is_that_of_its_definition(places: list[tuple[int, int, int, int]], iou: float, most: int) -> None:
    corners = np.array([(x, y, x + w, y + h) for x, y, w, h in places], dtype=np.float64).reshape(-1, 4)

    def overlap(a: Any, b: Any) -> float:
        wide, tall = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        both = max(wide, 0) * max(tall, 0)
        areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
        return float(both / (sum(areas) - both))

    kept: list[int] = []
    for i, box in enumerate(corners):
        if len(kept) < most and all(overlap(box, corners[j]) <= iou for j in kept):
            kept.append(i)
    assert suppress(corners, iou, most) == kept


@pytest.mark.usefixtures("announced")
def test_a_network_is_installed_listed_and_used_without_options(tmp_path: Path) -> None:
    assert "onnx missing" in " ".join(run("detectors").output.split())
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"no network")
    refused = run("detectors", "install", "onnx", "--from", bad)
    assert f"{bad} is not a network that onnxruntime can load" in str(refused.exception)
    assert "onnx missing" in " ".join(run("detectors").output.split())
    done = run("detectors", "install", "onnx", "--from", network(tmp_path / "n.onnx"))
    assert done.exit_code == 0, done.exception
    assert "onnx ready" in " ".join(run("detectors").output.split())
    image, truth = drawn(300, 200, (0.2, 0.2, 0.6, 0.7))
    [[box]] = detectors.load("onnx")([image], [None])
    assert close(box, truth, image, 256)
    with pytest.raises(UsageError, match="options of the detector 'onnx': unknown key 'scor'; did you mean 'score'"):
        detectors.load("onnx", {"scor": 0.3})


@pytest.mark.usefixtures("announced")
def test_builds_cut_what_the_network_boxes_and_notice_another_network(tmp_path: Path) -> None:
    path = network(tmp_path / "n.onnx")
    for label, places in {"a": (0.1, 0.2, 0.3), "b": (0.4, 0.5, 0.25)}.items():
        for i, place in enumerate(places):
            image, _ = drawn(200 + 8 * i, 160, (place, place, place + 0.4, place + 0.35))
            put(tmp_path / "set", f"{label}/{i}.png", codec.encode(image, "png", 100))
    put(tmp_path / "set", "a/dark.png", codec.encode(Image.new("RGB", (90, 90)), "png", 100))
    overrides = ["duplicates.near=false", "crop.detector=onnx", "crop.min_score=0.5", "crop.margin=0.1"]
    overrides += [f"source.path={tmp_path / 'set'}", f"crop.detector_options.file={path}"]
    made = animesion.load_recipe("folder", overrides)
    out = tmp_path / "out"
    assert animesion.build(made, out, workers=2).kept == 6
    before = rows(out)
    assert before["a/dark.png"]["reason"] == "no face"
    x0, y0, x1, y1 = before["a/0.png"]["crop"]
    assert (x0, y0, x1, y1) == pytest.approx((12, 10, 108, 78), abs=2)
    network(path, shifts=(20, 22, 20))
    animesion.build(made, out, workers=2)
    assert rows(out)["a/0.png"]["crop"][0] == pytest.approx(x0 + 20 * 200 / 256, abs=2)


@pytest.mark.usefixtures("announced")
def test_predict_names_faces_and_with_or_whole_the_image(tmp_path: Path) -> None:
    path = network(tmp_path / "n.onnx")
    torch.manual_seed(0)
    save_model(create_model("resnet18", 3, 64), tmp_path / "w.safetensors", ("ann", "bea", "cia"))
    image, truth = drawn(320, 200, (0.25, 0.25, 0.6, 0.75))
    image.save(tmp_path / "a.png")
    Image.new("RGB", (90, 70)).save(tmp_path / "b.png")
    command: list[str | Path] = ["predict", "--checkpoint", tmp_path / "w.safetensors", "--device", "cpu"]
    command += [tmp_path / "a.png", tmp_path / "b.png"]
    faces = [*command, "--detector", "onnx", "--set", f"file={path}", "--margin", "0.1"]
    plain = run(*faces, "--json")
    assert plain.exit_code == 1
    first, second = (json.loads(line) for line in plain.stdout.splitlines())
    assert first["box"] == pytest.approx(codec.crop_pixels(truth, 320, 200, 0.1, square=False), abs=2)
    assert second["problem"] == "no face found"
    whole = run(*faces, "--json", "--or-whole")
    assert whole.exit_code == 0
    _, dark = (json.loads(line) for line in whole.stdout.splitlines())
    undetected = [json.loads(line) for line in run(*command, "--json").stdout.splitlines()]
    assert dark == undetected[1]
    assert "box" not in dark
    every = run(*faces, "--json", "--all-faces", "--set", "iou=1.0", "--set", "score=0.5")
    assert [json.loads(line).get("score") for line in every.stdout.splitlines()] == pytest.approx([0.9, 0.7, None])
    text = run(*faces)
    assert " at {},{} to {},{}: ".format(*first["box"]) in text.stdout
    assert "b.png: no prediction (no face found)" in text.stderr


@pytest.mark.usefixtures("announced")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--detector", "onnx"], "needs the file detector.onnx, which is not installed; install it with"),
        (["--detector", "onnx", "--set", "scor=1"], "unknown key 'scor'; did you mean 'score'"),
        (["--detector", "onnx", "--set", "score"], "--set 'score' does not have the form"),
        (["--detector", "boxes"], "needs the boxes of a source"),
        (["--all-faces"], "are for faces: name a detector"),
    ],
)
def test_wrong_requests_are_one_sentence(tmp_path: Path, arguments: list[str], message: str) -> None:
    save_model(create_model("resnet18", 3, 64), tmp_path / "w.safetensors", ("a", "b", "c"))
    drawn(60, 60, (0.2, 0.2, 0.6, 0.6))[0].save(tmp_path / "a.png")
    result = run("predict", "--checkpoint", tmp_path / "w.safetensors", tmp_path / "a.png", *arguments)
    assert result.exit_code != 0
    assert message in str(result.exception) + result.stderr
