"""Training of the face detector: material, scenes, targets, losses, export and the command."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageDraw

torch = pytest.importorskip("torch")
pytest.importorskip("timm")

from animesion.dataset.box_tables import KindBox
from animesion.detectors import evaluation
from animesion.detectors.anime import AnimeDetector, AnimeOptions
from animesion.errors import UsageError
from animesion.schemas import Box
from animesion_training.cli.train_detector import train_detector
from animesion_training.detection import check, fit, graph, labels, network, scenes

RED = (250, 20, 20)


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    packed = io.BytesIO()
    image.save(packed, form)
    return packed.getvalue()


def crop(number: int) -> bytes:
    """A square that is easy to tell from a ground: a disc with two eyes."""
    image = Image.new("RGB", (64, 64), (60 + number, 40, 90))
    draw = ImageDraw.Draw(image)
    draw.ellipse((8, 8, 56, 60), fill=(250, 210, 180))
    for x in (24, 40):
        draw.ellipse((x - 5, 28, x + 5, 40), fill=(20, 30, 160))
    return encoded(image)


def illustration(left: int = 60, top: int = 40, side: int = 50) -> labels.Labelled:
    """An image with one labelled square, which is red."""
    image = Image.new("RGB", (240, 180), (20, 160, 60))
    ImageDraw.Draw(image).rectangle((left, top, left + side - 1, top + side - 1), fill=RED)
    return labels.Labelled(encoded(image), (((left, top, left + side, top + side), True),))


@pytest.fixture(scope="module")
def net() -> network.FaceNetwork:
    torch.manual_seed(1)
    return network.FaceNetwork(width=16)


@pytest.mark.parametrize("seed", range(6))
def test_labels_move_with_the_window(seed: int) -> None:
    rng = Random(seed)
    for _ in range(8):
        scene = scenes._window(illustration(), 128, 96, rng)
        red = (scene.pixels[:, :, 0] > 180) & (scene.pixels[:, :, 1] < 90)
        if not scene.faces:
            continue
        [(left, top, right, bottom)] = scene.faces
        y, x = np.nonzero(red)
        inside = (x >= left - 2) & (x <= right + 2) & (y >= top - 2) & (y <= bottom + 2)
        assert inside.mean() > 0.8  # corners of a turned square stand out
        middle = (left + right) / 2, (top + bottom) / 2
        if left > 2 and right < 126 and top > 2 and bottom < 94:
            assert middle == pytest.approx((x.mean(), y.mean()), abs=3)


def test_scenes_have_faces_of_all_sizes_and_none() -> None:
    material = labels.Material([crop(n) for n in range(4)], [illustration()], [encoded(Image.new("RGB", (90, 80)))])
    counts, sides = set(), []
    for seed in range(60):
        scene = scenes.compose(material, 160, Random(seed))
        assert scene.pixels.shape == (160, 160, 3)
        assert scene.pixels.dtype == np.uint8
        counts.add(min(2, len(scene.faces)))
        for left, top, right, bottom in (*scene.faces, *scene.ignored):
            assert 0 <= left < right <= 160
            assert 0 <= top < bottom <= 160
        sides += [right - left for left, _, right, _ in scene.faces]
    assert counts == {0, 1, 2}
    assert min(sides) < 20
    assert max(sides) > 80
    again = scenes.compose(material, 160, Random(7))
    np.testing.assert_array_equal(again.pixels, scenes.compose(material, 160, Random(7)).pixels)


def test_parts_of_illustrations_that_are_grounds_show_no_face() -> None:
    image = Image.effect_noise((240, 180), 80).convert("RGB")
    ImageDraw.Draw(image).rectangle((60, 40, 109, 89), fill=RED)
    labelled = labels.Labelled(encoded(image), (((60, 40, 110, 90), True),))
    parts = [part for seed in range(40) if (part := scenes._bare(labelled, Random(seed))) is not None]
    assert len(parts) > 20
    for part in parts:
        assert min(part.shape[:2]) >= 32
        assert not ((part[:, :, 0] > 240) & (part[:, :, 1] < 30)).any()


def test_each_size_of_a_face_is_learnt_on_its_grid() -> None:
    centres, strides = network.cells([(32, 32), (16, 16), (8, 8)], torch.device("cpu"))
    for side, expected in ((16, {8.0}), (50, {8.0, 16.0}), (80, {16.0}), (120, {16.0, 32.0}), (240, {32.0})):
        box = torch.tensor([[128 - side / 2, 128 - side / 2, 128 + side / 2, 128 + side / 2]])
        chosen, counts = network.assign(centres, strides, box, torch.zeros(0, 4))
        assert set(strides[chosen >= 0].tolist()) == expected
        assert counts[chosen >= 0].all()
        assert not counts.all() or len(expected) == 3  # the middle of another grid is neither right nor wrong


def test_the_smaller_of_two_faces_takes_a_cell_and_ignored_areas_do_not_count() -> None:
    centres, strides = network.cells([(8, 8), (4, 4), (2, 2)], torch.device("cpu"))
    boxes = torch.tensor([[0.0, 0.0, 40.0, 40.0], [10.0, 10.0, 30.0, 30.0]])
    chosen, _ = network.assign(centres, strides, boxes, torch.zeros(0, 4))
    at = ((centres - 20).abs().sum(1) + (strides != 8) * 1e3).argmin()
    assert chosen[at] == 1
    _, counts = network.assign(centres, strides, torch.zeros(0, 4), torch.tensor([[0.0, 0.0, 32.0, 64.0]]))
    assert counts.tolist() == (centres[:, 0] > 32).tolist()


def test_overlap_of_equal_apart_and_nested_boxes() -> None:
    first = torch.tensor([[0.0, 0.0, 2.0, 2.0]]).repeat(3, 1)
    second = torch.tensor([[0.0, 0.0, 2.0, 2.0], [2.0, 0.0, 4.0, 2.0], [0.0, 0.0, 1.0, 2.0]])
    iou, giou = network.overlap(first, second)
    assert iou.tolist() == pytest.approx([1.0, 0.0, 0.5])
    assert giou.tolist() == pytest.approx([1.0, 0.0, 0.5])


@pytest.mark.parametrize("half", [False, True])
def test_the_exported_graph_equals_the_network(net: network.FaceNetwork, tmp_path: Path, half: bool) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    net.eval()
    path = tmp_path / "net.onnx"
    graph.write(net, path, half=half, gain=1.5, offset=-0.25)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for size in ((64, 96), (128, 32)):
        images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(3)) * 2 - 1
        with torch.no_grad():
            expected = net(images)
        for ours, theirs in zip(session.run(None, {"image": images.numpy()}), expected, strict=True):
            theirs[:, 0] = theirs[:, 0] * 1.5 - 0.25
            np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-2 if half else 1e-4)


def test_frozen_stages_give_what_they_give_unfolded(net: network.FaceNetwork) -> None:
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    before = {name: value.clone() for name, value in net.low.state_dict().items()}
    expected = net.eval().low(images)
    net.freeze()
    net.train()
    folded = net._folded[0](images)
    torch.testing.assert_close(folded, expected, atol=1e-4, rtol=1e-4)
    net(images)[0].sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in net.low.state_dict().items())
    assert all(weight.grad is None for weight in net.low.parameters())
    assert next(net.eight.parameters()).grad is not None


@pytest.mark.slow
def test_a_few_steps_lower_the_loss(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = network.FaceNetwork(width=16)
    material = labels.Material([crop(0)])
    images, faces, ignored = fit.batch(material, 64, 8, Random(1), torch.device("cpu"))

    def score() -> float:
        module.train()
        with torch.no_grad():
            return float(sum(network.loss(module(images), faces, ignored)))

    before = score()
    settings = fit.Settings(steps=40, batch=1, sides=(64,), decay=0.2, every=20, rate=1e-2)
    average = fit.fit(module, material, settings, tmp_path / "checkpoint.pt", report=lambda line: None)
    assert score() < 0.9 * before
    assert average.count == 40


def test_classifier_weights_start_the_backbone(tmp_path: Path) -> None:
    import timm

    whole = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    path = tmp_path / "lite0.pth"
    torch.save({f"other.{n}": value for n, value in enumerate(whole.state_dict().values())}, path)
    module = network.FaceNetwork(width=16)
    fit.backbone_weights(path, module)
    assert torch.equal(module.low[0].weight, whole.conv_stem.weight)
    assert torch.equal(module.sixteen[1][-1].conv_pwl.weight, whole.blocks[4][-1].conv_pwl.weight)
    torch.save({"a": torch.zeros(3)}, path)
    with pytest.raises(UsageError, match="does not fit the backbone"):
        fit.backbone_weights(path, module)
    path.write_bytes(b"nothing")
    with pytest.raises(UsageError, match="cannot be read as weights"):
        fit.backbone_weights(path, module)


def test_crops_of_a_post_of_a_character_that_is_left_out_are_not_learnt_from(tmp_path: Path) -> None:
    for name in ("mio/a-0", "mio/b-0", "rei/a-1", "rei/c-0"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    learnt, tested = labels.face_crops([tmp_path], ["mio"])
    assert (learnt, tested) == ([b"rei/c-0"], [b"mio/a-0", b"mio/b-0"])
    with pytest.raises(UsageError, match="no face crops of 'yui'"):
        labels.face_crops([tmp_path], ["yui"])


def test_scores_are_calibrated() -> None:
    rng = Random(4)
    truth = KindBox(Box(0, 0, 1, 1, 1.0), "face")
    images = []
    for _ in range(3000):
        score = rng.uniform(0.05, 0.95)
        right = rng.random() < score**2  # too sure of itself
        images.append(evaluation.Judged(9, 9, (truth,), (False,), (Box(0, 0, 1, 1, score),), (0,) if right else (-1,)))
    gain, offset = check.calibration(images)
    for score in (0.3, 0.6, 0.9):
        calibrated = 1 / (1 + np.exp(-(gain * np.log(score / (1 - score)) + offset)))
        assert calibrated == pytest.approx(score**2, abs=0.07)
    assert check.calibration(images[:3]) == (1.0, 0.0)


@pytest.fixture
def material(tmp_path: Path) -> Path:
    """Face crops and two labelled images."""
    (tmp_path / "faces").mkdir()
    (tmp_path / "images").mkdir()
    for n in range(3):
        (tmp_path / "faces" / f"{n}.png").write_bytes(crop(n))
    for name, left in (("learn", 60), ("test", 90)):
        content = illustration(left).content
        (tmp_path / "images" / f"{name}.png").write_bytes(content)
        with (tmp_path / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(("sha256", "width", "height", "left", "top", "right", "bottom", "kind", "flags"))
            rows.writerow((hashlib.sha256(content).hexdigest(), 240, 180, left, 40, left + 50, 90, "face", ""))
    return tmp_path


def test_the_command_trains_goes_on_and_writes_a_network_that_runs(material: Path) -> None:
    pytest.importorskip("onnx")
    out = material / "run"
    given = ["--labels", "learn.csv", "--images", "images", "--faces", "faces", "--holdout", "test.csv", "--batch", "1"]
    given = [str(material / each) if (material / each).exists() else each for each in given]

    def run(*more: str) -> str:
        result = CliRunner().invoke(train_detector, [*given, "--out", str(out), *more], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    assert "3 face crops, 1 windows of labelled images, 0 grounds; 1 labelled images to test on" in run("--steps", "1")
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 1
    assert "at step 1" in run("--steps", "2", "--resume")
    figures = json.loads((out / "figures.json").read_text())
    assert figures["images"] == 1
    assert figures["rows"][0]["truth"] == 1
    assert figures["parameters"] < 3_000_000
    AnimeDetector(AnimeOptions(file=str(out / "detector.onnx")))([Image.new("RGB", (80, 60))], [None])


def test_what_cannot_be_learnt_from_is_refused(material: Path) -> None:
    def refused(*arguments: str) -> str:
        with pytest.raises(UsageError) as caught:
            CliRunner().invoke(train_detector, [*arguments, "--out", str(material / "run")], catch_exceptions=False)
        return str(caught.value)

    assert "nothing to learn from" in refused()
    assert "labels none of the images" in refused(
        "--labels", str(material / "learn.csv"), "--images", str(material / "faces")
    )
    checkpoint = material / "run" / "checkpoint.pt"
    checkpoint.parent.mkdir()
    torch.save({"weights": {}, "average": {}}, checkpoint)
    faces = ("--faces", str(material / "faces"))
    assert "--resume, or give another folder" in refused(*faces)
    assert "not a checkpoint of this detector" in refused(*faces, "--resume")
