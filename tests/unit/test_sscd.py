"""SSCD as an embedder: small networks of its interface are installed, checked and called; pixels verify what they find.

The network itself is not at hand here: its file has the same interface, and is larger.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from aiohttp import web
from click.testing import CliRunner, Result
from PIL import Image

import animesion
from animesion import model_files
from animesion.cli.embedders import embedders
from animesion.config.recipe import EmbeddingSection, load
from animesion.errors import UsageError
from animesion.pipeline import embed
from animesion.pipeline.sscd import Sscd
from animesion_sample.faults import local_server
from tests.unit.test_copies import scene, turned

torch = pytest.importorskip("torch", reason="the extra `train` is not installed")
from torch import Tensor, nn


class Network(nn.Module):
    """512 values per image: of 16 x 32 areas, the mean of the channels; not yet of unit length."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images.mean(1), (16, 32)).flatten(1)


class Constant(nn.Module):
    """The same vector for every image: all pairs are candidates."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0, :1, :1].flatten(1) * 0 + torch.ones(1, 512)


class Maps(nn.Module):
    """A network of another kind: it returns maps."""

    def forward(self, images: Tensor) -> Tensor:
        return images


class Blind(nn.Module):
    """Vectors of zeros."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :512] * 0


def torchscript(path: Path, network: nn.Module) -> Path:
    torch.jit.script(network).save(str(path))
    return path


def onnx_network(path: Path, batch: int | str = "n", side: int | str = "side", channels: int = 3) -> Path:
    """A network in ONNX form whose vector is the mean of each channel."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["means"]),
        helper.make_node("Flatten", ["means"], ["vectors"], axis=1),
    ]
    taken = helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, channels, side, side])
    given = helper.make_tensor_value_info("vectors", TensorProto.FLOAT, [batch, channels])
    graph = helper.make_graph(nodes, "small", [taken], [given])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def install(*arguments: str) -> Result:
    return CliRunner().invoke(embedders, ["install", "sscd", *arguments])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of embedders."""
    monkeypatch.setenv("ANIMESION_EMBEDDERS", str(tmp_path / "embedders"))
    return tmp_path / "embedders"


def prepared(image: Image.Image, side: int) -> Tensor:
    """The published preprocessing, by torchvision."""
    transforms = pytest.importorskip("torchvision.transforms", reason="the extra `train` is not installed")
    normalise = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    steps: Tensor = transforms.Compose([transforms.Resize([side, side]), transforms.ToTensor(), normalise])(image)
    return steps[None]


def test_images_are_prepared_as_published(tmp_path: Path) -> None:
    images = [scene(0), scene(1).resize((500, 200)), Image.new("RGB", (3, 2), "red")]
    found = Sscd(torchscript(tmp_path / "net.pt", Network()))(images)
    assert found.shape == (3, 512)
    for vector, image in zip(found, images, strict=True):
        due = nn.functional.normalize(Network()(prepared(image, 320)), dim=1).numpy()[0]
        np.testing.assert_allclose(vector, due, atol=1e-5)


@pytest.mark.parametrize(("batch", "side", "used"), [("n", "side", 320), (1, 288, 288), ("n", 320, 320)])
def test_a_network_in_onnx_form_has_its_own_size(tmp_path: Path, batch: int | str, side: int | str, used: int) -> None:
    found = Sscd(onnx_network(tmp_path / "net.onnx", batch, side))([scene(0), scene(1)])
    for vector, image in zip(found, (scene(0), scene(1)), strict=True):
        means = prepared(image, used).mean((2, 3)).numpy()[0]
        np.testing.assert_allclose(vector, means / np.linalg.norm(means), atol=1e-4)


def test_batches_do_not_depend_on_what_ran_before(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 16, 16), nn.ReLU(), nn.Flatten(), nn.Linear(3200, 512))
    path = torchscript(tmp_path / "net.pt", network)
    images = [scene(seed) for seed in range(3)]
    warm = Sscd(path)
    assert len({warm(images).tobytes() for _ in range(4)} | {Sscd(path)(images).tobytes()}) == 1


def test_a_file_is_installed_listed_and_used(folder: Path, tmp_path: Path) -> None:
    path = torchscript(tmp_path / "net.pt", Network())
    assert "sscd  missing" in CliRunner().invoke(embedders).output
    with pytest.raises(UsageError, match=r"'sscd' needs the file sscd\.model, which is not installed; install it with"):
        embed.load(EmbeddingSection(model="sscd"))
    wrong = install("--from", str(path), "--sha256", "0" * 64)
    assert isinstance(wrong.exception, UsageError)
    assert digest(path) in str(wrong.exception)
    assert not folder.exists()
    done = install("--from", str(path), "--sha256", digest(path).upper())
    assert done.exit_code == 0, done.output
    assert (folder / "sscd.model").read_bytes() == path.read_bytes()
    assert "sscd  ready" in CliRunner().invoke(embedders).output
    installed, given = (
        embed.load(EmbeddingSection(model="sscd", weights=weights))([scene(0)]) for weights in ("pretrained", str(path))
    )
    assert installed.tobytes() == given.tobytes()


def test_a_url_is_fetched_and_checked(folder: Path, tmp_path: Path) -> None:
    path = torchscript(tmp_path / "net.pt", Constant())

    def application() -> web.Application:
        async def file(request: web.Request) -> web.Response:
            return web.Response(body=path.read_bytes(), content_type="application/octet-stream")

        app = web.Application()
        app.router.add_get("/net.pt", file)
        return app

    contact = ("--contact", "tests@example.org", "--allow-private")
    with local_server(application) as server:
        url = server.url("/net.pt")
        unknown = install("--from", url, *contact)
        wrong = install("--from", url, "--sha256", "0" * 64, *contact)
        done = install("--from", url, "--sha256", digest(path), *contact)
    assert "needs --sha256" in str(unknown.exception)
    assert "its SHA-256 is" in str(wrong.exception)
    assert done.exit_code == 0, done.output
    assert (folder / "sscd.model").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: torchscript(path, Maps()), r"returns an array of shape \(1, 3, 320, 320\) for 1 images"),
        (lambda path: torchscript(path, Blind()), "returns a vector without a length"),
        (lambda path: torch.save(nn.Linear(4, 4).state_dict(), path), r"not a TorchScript file .*\.torchscript\.pt"),
        (lambda path: path.write_bytes(b"PK\x03\x04 cut"), "not a TorchScript file"),
        (lambda path: path.write_bytes(b"\x08 no network"), "not a network that onnxruntime can load"),
        (lambda path: onnx_network(path, channels=1), "does not take RGB images"),
        (lambda path: onnx_network(path, batch=4), "takes batches of 4 images only"),
        (lambda path: onnx_network(path, side=4000), "takes images of 4000x4000 px"),
    ],
    ids=["maps", "blind", "checkpoint", "cut", "garbage", "grey", "batches", "large"],
)
def test_another_file_is_one_sentence(folder: Path, tmp_path: Path, make: Any, message: str) -> None:
    path = tmp_path / "other.pt"
    make(path)
    with pytest.raises(UsageError, match=message):
        Sscd(path)([scene(0)])
    assert not folder.exists()


def test_a_file_that_cannot_be_used_is_not_installed(folder: Path, tmp_path: Path) -> None:
    refused = install("--from", str(torchscript(tmp_path / "maps.pt", Maps())))
    assert isinstance(refused.exception, UsageError)
    assert f"{tmp_path / 'maps.pt'} returns an array of shape" in str(refused.exception)
    assert not folder.exists()
    with pytest.raises(UsageError, match="the embedder 'lbp' needs no file; those that do: sscd"):
        model_files.install("lbp", "x.xml", kind="embedder")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["duplicates.embedding.weights=random"], "weights 'random' are for timm models"),
        (["duplicates.copies=off"], "embedding.verify needs a comparison of pixels"),
        (["duplicates.near=false"], "embedding.verify needs a comparison of pixels"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        load("folder", ["source.path=x", "duplicates.embedding.model=sscd", *overrides])


def test_sscd_has_its_own_defaults() -> None:
    chosen = load("folder", ["source.path=x", "duplicates.embedding.model=sscd"]).duplicates.embedding
    assert (chosen.threshold, chosen.verify) == (0.5, True)
    alone = ["duplicates.embedding.verify=false", "duplicates.embedding.threshold=0.75", "duplicates.copies=off"]
    chosen = load("folder", ["source.path=x", "duplicates.embedding.model=sscd", *alone]).duplicates.embedding
    assert (chosen.threshold, chosen.verify) == (0.75, False)
    assert not load("folder", ["source.path=x", "duplicates.embedding.model=resnet18"]).duplicates.embedding.verify


def test_what_the_network_finds_is_verified_by_pixels(folder: Path, tmp_path: Path) -> None:
    """The network takes all images for one; the hashes of windows do not find a turned copy."""
    (tmp_path / "in" / "miku").mkdir(parents=True)
    for seed in range(4):
        scene(seed).save(tmp_path / "in" / "miku" / f"scene{seed}.png")
    turned(90)(scene(0)).save(tmp_path / "in" / "miku" / "turned.png")
    settings = [f'source.path="{tmp_path / "in"}"', 'source.family=""', "duplicates.copies=hash"]

    def build(out: Path, *overrides: str) -> dict[str, dict[str, Any]]:
        animesion.build(animesion.load_recipe("folder", [*settings, *overrides]), out, workers=1)
        return {Path(row["source_id"]).stem: row for row in pq.read_table(out / "curated.parquet").to_pylist()}

    with pytest.raises(UsageError, match="which is not installed"):
        build(tmp_path / "absent", "duplicates.embedding.model=sscd")
    assert not (tmp_path / "absent").exists()
    folder.mkdir()
    torchscript(folder / "sscd.model", Constant())
    assert build(tmp_path / "plain")["turned"]["kept"]
    rows = build(tmp_path / "out", "duplicates.embedding.model=sscd")
    assert {name for name, row in rows.items() if not row["kept"]} == {"turned"}
    assert (rows["turned"]["verdict"], rows["turned"]["how"]) == ("copy", "turned 90°")
    # by the network alone, all are one
    alone = ["duplicates.embedding.model=sscd", "duplicates.embedding.verify=false"]
    assert sum(bool(row["kept"]) for row in build(tmp_path / "alone", *alone).values()) == 1
