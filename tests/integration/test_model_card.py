"""The model card of a run states the facts of its files, and which facts are unknown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from animesion.errors import UsageError
from animesion_training.cli.card import card
from animesion_training.engine import loop
from animesion_training.recipe import load

FAST = ("model.name=resnet10t", "model.img_size=32", "run.batch_size=16", "data.workers=0", "schedule.epochs=1")


@pytest.fixture(scope="module")
def run(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "faces <b>v1</b>"
    loop.train(load("scratch", FAST), small_dataset, out, device="cpu")
    return out


def render(path: Path) -> str:
    result = CliRunner().invoke(card, [str(path)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_figures_are_those_of_the_report(run: Path) -> None:
    text = render(run)
    report = json.loads((run / "report" / "evaluation.json").read_bytes())
    low, high = report["top_1_interval"]["low"], report["top_1_interval"]["high"]
    assert f"| top-1 | {100 * report['top_1']:.2f}% | {100 * low:.2f}% to {100 * high:.2f}% |" in text
    assert f"| macro accuracy | {100 * report['macro_accuracy']:.2f}% |" in text
    assert f"| few (< 20) | {report['bands']['few']['classes']} |" in text
    assert 'name = "resnet10t"' in text
    assert "<b>" not in text.partition("---\n\n")[2]


def test_the_hub_reads_the_header(run: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    read = hub.ModelCard(render(run)).data
    report = json.loads((run / "report" / "evaluation.json").read_bytes())
    results = {each.metric_name: each.metric_value for each in read.eval_results}
    assert results == {"top-1": report["top_1"], "macro accuracy": report["macro_accuracy"]}
    assert read.pipeline_tag == "image-classification"


def test_weights_without_a_report(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "best.safetensors", tmp_path / "alone.safetensors")
    text = render(tmp_path / "alone.safetensors")
    assert "so its accuracy is not known" in text
    assert "model-index" not in text


def test_the_report_of_other_weights_is_not_theirs(run: Path) -> None:
    assert "so its accuracy is not known" in render(run / "last.safetensors")


@pytest.mark.parametrize("content", ["[]", "{", '{"weights": "best.safetensors"}'])
def test_a_damaged_report(run: Path, tmp_path: Path, content: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "report" / "evaluation.json").write_text(content)
    with pytest.raises(UsageError, match=r"evaluation\.json"):
        render(folder)


def test_a_folder_of_neither_kind(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        render(tmp_path)
