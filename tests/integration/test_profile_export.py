"""`animesion models`, `profile` and `export` as a user runs them."""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from animesion.errors import AnimesionError, UsageError
from animesion_training import create_model, export, load_model, save_model
from animesion_training.cli.export import export as export_command
from animesion_training.cli.models import models as models_command
from animesion_training.cli.profile import profile as profile_command

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3}
CLASSES = ["初音ミク", "b", "c"]


def run(command, *arguments):
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Weight files by head, with weights that differ from their initial ones."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(3)
    made = {
        "resnet": create_model("resnet18", 3, 40),
        "ifa": create_model("vit_tiny_patch16", 3, (32, 48), "ifa", **SMALL),
        "cosine": create_model("vit_tiny_patch16", 3, 32, "cosine", **SMALL),
        "eps": create_model("vit_tiny_patch16", 3, 32, norm_eps=1e-12, **SMALL),
    }
    for name, model in made.items():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 1.5)
        save_model(model, folder / f"{name}.safetensors", CLASSES)
    return folder


def test_models_are_listed_with_parameters():
    assert "vit_large_patch32 " in run(models_command).stdout
    rows = [
        json.loads(line) for line in run(models_command, "vit_tiny*ifa", "--parameters", "--json").stdout.splitlines()
    ]
    assert [row["name"] for row in rows] == ["vit_tiny_patch16_ifa"]
    assert 5.6e6 < rows[0]["parameters"] < 5.8e6
    assert "resnet50d" in run(models_command, "resnet50").stdout
    with pytest.raises(UsageError, match="no model's name matches"):
        run(models_command, "nonsense")


def test_profile_counts_and_times():
    arguments = ["--model", "resnet18", "--img-size", 32, "--seconds", 0, "--batch-size", 2, "--num-classes", 10]
    row = json.loads(run(profile_command, *arguments, "--json").stdout)
    assert row["parameters"] == 11_181_642
    assert row["img_size"] == [32, 32]
    assert row["images_per_second"] > 0
    assert row["peak_memory"] > 4 * row["parameters"]
    table = run(profile_command, *arguments).stdout
    assert "resnet18" in table
    assert "attention included" in table


def test_profile_takes_several_models_and_sizes_and_refuses_what_cannot_run():
    arguments = [
        "--model",
        "resnet18",
        "--model",
        "vit_tiny_patch16",
        "--img-size",
        32,
        "--img-size",
        64,
        "--no-timing",
    ]
    rows = [json.loads(line) for line in run(profile_command, *arguments, "--json").stdout.splitlines()]
    assert [(row["model"], row["img_size"][0]) for row in rows] == [
        ("resnet18", 32), ("resnet18", 64), ("vit_tiny_patch16", 32), ("vit_tiny_patch16", 64)
    ]  # fmt: skip
    assert "images_per_second" not in rows[0]
    with pytest.raises(UsageError, match="cannot use device 'nonsense'"):
        run(profile_command, "--model", "resnet18", "--device", "nonsense")
    with pytest.raises(UsageError, match="has no class token"):
        run(profile_command, "--model", "resnet18", "--head", "ifa")


@pytest.mark.parametrize("name", ["resnet", "ifa", "cosine"])
def test_onnx_computes_the_same(trained, tmp_path, name):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnx

    out = tmp_path / "model.onnx"
    result = json.loads(
        run(export_command, trained / f"{name}.safetensors", "--to", "onnx", "--out", out, "--json").stdout
    )
    assert result["max_abs_difference"] <= export.TOLERANCE
    proto = onnx.load(out)
    (images,) = proto.graph.input
    assert images.type.tensor_type.shape.dim[0].dim_param  # any batch size
    card = json.loads(next(entry.value for entry in proto.metadata_props if entry.key == "animesion"))
    assert card["classes"] == CLASSES
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_torchscript_computes_the_same_and_says_so(trained, tmp_path):
    out = tmp_path / "model.pt"
    output = run(export_command, trained / "ifa.safetensors", "--to", "torchscript", "--out", out).stdout
    assert "differ from the original's by" in output
    model, _ = load_model(trained / "ifa.safetensors")
    files = {"animesion.json": ""}
    with warnings.catch_warnings(action="ignore"):
        scripted = torch.jit.load(out, _extra_files=files)
    images = torch.randn(5, 3, 32, 48)
    assert torch.allclose(scripted(images), model(images), atol=1e-5)
    assert json.loads(files["animesion.json"])["head"] == "ifa"


@pytest.mark.parametrize("name", ["resnet", "ifa"])
def test_timm_loads_the_hf_folder(trained, tmp_path, name):
    out = tmp_path / "folder"
    output = run(export_command, trained / f"{name}.safetensors", "--to", "hf", "--out", out).stdout
    assert f'timm.create_model("local-dir:{out}", pretrained=True)' in output
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["label_names"] == CLASSES
    assert not {"tag", "hf_hub_id", "test_input_size"} & config["pretrained_cfg"].keys()
    assert str(tmp_path) not in (out / "config.json").read_text(encoding="utf-8")
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}
    model, card = load_model(trained / f"{name}.safetensors")
    size = card.img_size if isinstance(card.img_size, tuple) else (card.img_size, card.img_size)
    images = torch.randn(2, 3, *size)
    assert torch.equal(timm.create_model(f"local-dir:{out}", pretrained=True).eval()(images), model(images))


def test_what_cannot_be_exported_is_said_and_nothing_written(trained, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("keep me")
    before = sorted(tmp_path.rglob("*"))
    for name, kind, out, sentence in [
        ("cosine", "hf", "new", "timm has no name .* onnx"),
        ("eps", "hf", "new", "norm_eps=1e-12"),
        ("ifa", "hf", "full", "is a folder with files in it"),
        ("ifa", "onnx", "full", "is a folder"),
        ("ifa", "hf", "full/notes.txt", "is a file"),
        ("absent", "onnx", "x.onnx", "cannot read the weights file"),
    ]:
        with pytest.raises(UsageError, match=sentence):
            export.export(trained / f"{name}.safetensors", kind, tmp_path / out)
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(AnimesionError, match="differs from the original"):
        export.export(trained / "eps.safetensors", "torchscript", tmp_path / "x.pt")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_package_is_named_with_its_extra(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs onnx, onnxscript, onnxruntime: pip install \"animesion\[export\]\""):
        export.export(trained / "ifa.safetensors", "onnx", tmp_path / "x.onnx")


def test_without_torch_the_commands_say_what_to_install(monkeypatch):
    for module in [name for name in sys.modules if name.startswith("animesion_training")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "torch", None)
    for command, arguments in [(models_command, []), (profile_command, ["--model", "resnet18"])]:
        with pytest.raises(UsageError, match=r"needs torch: pip install .animesion\[train\]"):
            run(command, *arguments)
