"""Checkpoints and weights are written without a second copy in memory, while training goes on."""

from __future__ import annotations

import re
import resource
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file
from torch import nn

from animesion.errors import FullDiskError
from animesion_training.distributed import DistributedContext
from animesion_training.engine import checkpoint
from animesion_training.engine.trainer import Trainer
from animesion_training.engine.watcher import Watcher
from animesion_training.engine.writer import Writer, kept_state
from animesion_training.models import create_model
from animesion_training.recipe import load as load_recipe
from animesion_training.run_weights import FINAL
from animesion_training.weights import card_of, load_model, write_weights
from tests import ranks

ALONE = DistributedContext(0, 1, torch.device("cpu"))


def peak() -> int:
    """The largest resident memory of this process since the last call, in bytes."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not tell the peak of memory")
def test_files_are_written_without_a_copy_in_memory(tmp_path: Path) -> None:
    large = torch.arange(48 << 20, dtype=torch.float32)  # 192 MiB
    model = create_model("vit_tiny_patch16", 3, 32, depth=1, embed_dim=16, num_heads=2)
    peak()
    before = peak()
    checkpoint.save(tmp_path / "last.ckpt", {"model": {"large": large}}, previous=tmp_path / "previous.ckpt")
    write_weights(tmp_path / "w.safetensors", card_of(model), {"large": large})
    assert peak() - before < 64 << 20
    assert torch.equal(checkpoint.load(tmp_path / "last.ckpt")["model"]["large"], large)
    assert torch.equal(load_file(tmp_path / "w.safetensors")["large"], large)


def test_a_weights_file_holds_any_tensor_in_any_layout(tmp_path: Path) -> None:
    model = create_model("resnet10t", 3, 32).to(memory_format=torch.channels_last)
    tied = torch.randn(3, 4)
    tensors = {
        **model.state_dict(),
        "é": tied.t(),
        "tied": tied,
        "again": tied,
        "scalar": torch.tensor(7),
        "none": torch.zeros(0, 3),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False, True]),
    }
    write_weights(tmp_path / "w.safetensors", card_of(model), tensors)
    found = load((tmp_path / "w.safetensors").read_bytes())
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_the_state_of_a_model_stays_what_it_was_during_the_next_pass() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    state = kept_state(model)
    mean = state["1.running_mean"].clone()
    model(torch.randn(2, 3, 4, 4))
    assert torch.equal(state["1.running_mean"], mean)
    assert not torch.equal(model.state_dict()["1.running_mean"], mean)
    assert state["0.weight"].data_ptr() == model.state_dict()["0.weight"].data_ptr()  # not a copy


def test_a_writer_calls_in_order_and_reports_the_first_error() -> None:
    writer, gate = Writer(), threading.Event()
    done: list[int] = []
    waited: list[bool] = []
    writer.submit(lambda: waited.append(gate.wait()))
    writer.submit(lambda: done.append(1))
    assert not done  # the caller goes on
    gate.set()
    writer.wait()
    assert done == [1]

    def full() -> None:
        raise FullDiskError("no space")

    writer.submit(full)
    writer.submit(lambda: done.append(2))  # as a checkpoint whose weights were not written
    with pytest.raises(FullDiskError, match="no space"):
        writer.close()
    assert done == [1]


def test_a_checkpoint_on_a_full_disk_is_one_sentence_and_leaves_the_one_before(tmp_path: Path) -> None:
    path, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    checkpoint.save(path, {"step": 1}, previous=previous)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.raises(FullDiskError, match=r"no space to write .*last.new"):
            checkpoint.save(path, {"step": 2, "model": [torch.zeros(5000) for _ in range(9)]}, previous=previous)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert checkpoint.load(path)["step"] == 1
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_step_computes_while_a_checkpoint_is_written_and_changes_nothing_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk: the next forward and backward pass run meanwhile, and what is written is the state of its step."""
    save, gate = checkpoint.save, threading.Event()
    passed: list[bool] = []

    def slow(*args: object, **options: object) -> None:
        passed.append(gate.wait(30))
        save(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "save", slow)
    settings = [*ranks.SMALL, "run.batch_size=4", "run.save_steps=1", "optimizer.name=adamw", "run.ema=0.9"]
    states: list[dict[str, torch.Tensor]] = []

    class Follower(Watcher):
        def stepped(self, loss: float, rate: float, speed: float) -> None:
            both = {"model": trainer.model, "ema": trainer.ema.module if trainer.ema else trainer.model}
            states.append(
                {f"{part}.{n}": v.clone() for part, each in both.items() for n, v in each.state_dict().items()}
            )

    trainer = Trainer(load_recipe("scratch", settings), ranks.drawn(12), tmp_path, ALONE, Follower())
    change = trainer.update.before_change

    def before_change() -> None:
        gate.set()  # the pass of the next step is done
        change()

    trainer.update.before_change = before_change
    forward = trainer.model.forward
    written: list[dict[str, torch.Tensor]] = []

    def checked(*args: object, **options: object) -> object:
        gate.clear()
        return forward(*args, **options)

    monkeypatch.setattr(trainer.model, "forward", checked)
    replace = Path.replace

    def keep(path: Path, target: Path) -> Path:
        if path.name == "last.new":
            content = checkpoint.load(path)
            written.append({f"{part}.{n}": v for part in ("model", "ema") for n, v in content[part].items()})
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", keep)
    trainer.run()
    assert all(passed)
    assert len(written) == 3  # after the first two steps, and at the end of the epoch
    for mine, theirs in zip(written, states, strict=True):
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert load_model(tmp_path / FINAL)[1].facts["epoch"] == 1
