"""The folder of a run: what it keeps, what it can be resumed from, and what a failed command leaves behind."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from animesion.errors import UsageError
from animesion.storage.workspace import write_atomic
from animesion_training.distributed import DistributedContext
from animesion_training.engine import checkpoint, loop, runs
from animesion_training.engine.meter import DivergedError
from animesion_training.engine.origins import origins
from animesion_training.engine.trainer import Trainer
from animesion_training.engine.watcher import Watcher
from animesion_training.recipe import TrainRecipe, load
from tests import ranks

ALONE = DistributedContext(0, 1, torch.device("cpu"))


class StoppedError(Exception):
    pass


class Follower(Watcher):
    """Keeps messages, calls a function after each step, and stops the run after one of them."""

    def __init__(self, stop: int = 0) -> None:
        self.messages: list[str] = []
        self.steps, self.stop = 0, stop

    def message(self, text: str) -> None:
        self.messages.append(text)

    def stepped(self, loss: float, rate: float, speed: float) -> None:
        self.steps += 1
        self.after(self.steps)
        if self.steps == self.stop:
            raise StoppedError

    def after(self, step: int) -> None:
        """Called after each step."""


def recipe(*overrides: str) -> TrainRecipe:
    return load("scratch", [*ranks.SMALL, "run.batch_size=4", "schedule.epochs=3", "run.log_steps=1", *overrides])


def train(out: Path, *overrides: str, watcher: Follower | None = None, resume: bool = False) -> Trainer:
    """Train three epochs of three steps."""
    with runs.lock_folder(out, recipe(*overrides), origins(recipe(*overrides), ranks.drawn(11)), resume=resume):
        trainer = Trainer(recipe(*overrides), ranks.drawn(11), out, ALONE, watcher or Follower())
        if resume:
            trainer.resume()
        trainer.run()
    return trainer


def stop(out: Path, step: int, *overrides: str) -> None:
    with pytest.raises(StoppedError):
        train(out, *overrides, watcher=Follower(step))


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return list(trainer.model.state_dict().values())


def train_losses(out: Path) -> list[str]:
    with (out / "epochs.csv").open(newline="") as lines:
        return [line["train_loss"] for line in csv.DictReader(lines)]


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["weight", "momentum"])
def test_what_is_not_finite_is_not_kept(tmp_path: Path, part: str) -> None:
    watcher = Follower()
    trainer = Trainer(recipe(), ranks.drawn(11), tmp_path, ALONE, watcher)

    def poison(step: int) -> None:
        if step == 9:  # after the last loss, which is finite
            weight = trainer.model.get_parameter("blocks.0.mlp.fc1.weight")
            broken = weight if part == "weight" else trainer.update.optimizer.state[weight]["momentum_buffer"]
            with torch.no_grad():
                broken[1, 2] = torch.inf

    watcher.after = poison  # type: ignore[method-assign]
    name = r"model\.blocks\.0\.mlp\.fc1\.weight" if part == "weight" else r"optimizer\.\d+\.momentum_buffer"
    with pytest.raises(DivergedError, match=rf"{name} is not finite after step 9: .* is .*last\.ckpt"):
        trainer.run()
    assert [checkpoint.load(tmp_path / name)["step"] for name in (runs.LAST, runs.PREVIOUS)] == [6, 3]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["kind"] == "step"


@pytest.mark.parametrize("fault", ["cut", "missing"])
def test_a_run_goes_on_from_the_checkpoint_before_a_bad_one(tmp_path: Path, fault: str) -> None:
    whole = train(tmp_path / "whole")
    out = tmp_path / "cut"
    stop(out, 8, "run.save_steps=2")
    if fault == "cut":
        (out / runs.LAST).write_bytes((out / runs.LAST).read_bytes()[:-100])
    else:  # killed between two renames
        (out / runs.LAST).unlink()
    watcher = Follower()
    resumed = train(out, watcher=watcher, resume=True)
    assert watcher.steps == 5  # from step 4; the newest was of step 6
    assert ("previous.ckpt" in "".join(watcher.messages)) == (fault == "cut")
    assert all(map(torch.equal, weights(resumed), weights(whole)))
    for bad in (b"bad", b"", b"PK\x03\x04" + bytes(99), b"\x80\x02]"):
        (out / runs.LAST).write_bytes(bad)
        (out / runs.PREVIOUS).write_bytes(bad)
        with pytest.raises(UsageError, match=r"previous\.ckpt is not a checkpoint of a run"):
            train(out, resume=True)


# -- resuming --------------------------------------------------------------------------------------------------------


def test_a_resumed_run_may_change_what_cannot_change_the_result(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    stop(tmp_path / "cut", 5, "run.save_steps=1")
    free = ("data.workers=2", "run.save_steps=2", "run.log_steps=3", "run.checkpointing=true", "run.tensorboard=false")
    resumed = train(tmp_path / "cut", *free, resume=True)
    assert all(map(torch.equal, weights(resumed), weights(whole)))
    # the loss of the interrupted epoch is that of all its images
    assert train_losses(tmp_path / "cut") == train_losses(tmp_path / "whole")


@pytest.mark.parametrize("step", [2, 3])
def test_a_run_that_was_stopped_by_a_signal_resumes(tmp_path: Path, step: int) -> None:
    """In the middle of an epoch, and after its last step."""
    whole = train(tmp_path / "whole")
    watcher = Follower()

    def kill(done: int) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    watcher.after = kill  # type: ignore[method-assign,assignment]
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", watcher=watcher)
    assert checkpoint.load(tmp_path / "cut" / runs.LAST)["step"] == watcher.steps == step
    resumed = train(tmp_path / "cut", resume=True)
    assert all(map(torch.equal, weights(resumed), weights(whole)))
    assert train_losses(tmp_path / "cut") == train_losses(tmp_path / "whole")


def test_a_resumed_run_may_not_change_the_result(tmp_path: Path) -> None:
    stop(tmp_path, 4)
    changed = r"optimizer\.lr was 0\.02 and is now 0\.1, run\.seed was 0 and is now 1"
    with pytest.raises(UsageError, match=rf"holds a run with other settings \({changed}\)"):
        train(tmp_path, "optimizer.lr=0.1", "run.seed=1", resume=True)
    with pytest.raises(UsageError, match="add --resume"):
        train(tmp_path)
    with pytest.raises(UsageError, match="has 3 epochs, and fewer would change the steps that are done"):
        train(tmp_path, "schedule.epochs=2", resume=True)


def test_a_resumed_run_starts_from_the_same_weights(tmp_path: Path) -> None:
    """The weights under the path of `model.init` are others when the run is resumed."""
    first, other = train(tmp_path / "first"), train(tmp_path / "other", "run.seed=1")
    weights_of = tmp_path / "init.safetensors"
    shutil.copyfile(first.out / "last.safetensors", weights_of)
    out, given = tmp_path / "out", f"model.init={weights_of}"
    stop(out, 4, given)
    assert set(json.loads((out / "origins.json").read_bytes())) == {"data.train", "model.init"}
    shutil.copyfile(other.out / "last.safetensors", weights_of)
    with pytest.raises(UsageError, match=r"read something else as model\.init: give the same data and weights"):
        train(out, given, resume=True)
    shutil.copyfile(first.out / "last.safetensors", weights_of)
    train(out, given, resume=True)


def test_a_checkpoint_of_another_shape_is_a_sentence(tmp_path: Path) -> None:
    stop(tmp_path, 4)
    (tmp_path / runs.PREVIOUS).unlink(missing_ok=True)
    content = checkpoint.load(tmp_path / runs.LAST)
    faults = [
        {key: value for key, value in content.items() if key != "losses"},
        {**content, "best": 3},
        {**content, "model": {**content["model"], "cls_token": torch.zeros(3)}},
        {**content, "generators": [{"torch": "x"}]},
        {**content, "optimizer": {"state": {}, "param_groups": []}},
    ]
    for fault in faults:
        torch.save(fault, tmp_path / runs.LAST)
        with pytest.raises(UsageError, match=r"last\.ckpt is not of this run, or is damaged \("):
            train(tmp_path, resume=True)
    (tmp_path / "recipe.toml").write_bytes(b"\xff[")
    (tmp_path / ".digest").write_bytes(b"\xff")
    with pytest.raises(UsageError, match=r"holds a run with other settings \(see its recipe.toml\)"):
        train(tmp_path, resume=True)


def test_a_run_of_another_version_is_a_sentence(tmp_path: Path) -> None:
    stop(tmp_path, 4)
    (tmp_path / ".digest").write_text("0" * 64)  # every value is equal, and there were fewer of them
    with pytest.raises(UsageError, match=r"other settings \(of another version of this package, which has other"):
        train(tmp_path, resume=True)


def test_a_run_can_be_extended(tmp_path: Path) -> None:
    kind = "schedule.kind=cosine"
    train(tmp_path, kind)
    longer = train(tmp_path, kind, "schedule.epochs=5", resume=True)
    assert longer.step == 15
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if line["kind"] == "step"]
    # from the tenth step on, the rates are those of a run of five epochs
    train(tmp_path / "five", kind, "schedule.epochs=5")
    others = [json.loads(line) for line in (tmp_path / "five" / "metrics.jsonl").read_text().splitlines()]
    assert rates[9:] == [line["lr"] for line in others if line["kind"] == "step"][9:]
    assert rates[8] < rates[9]


def test_a_run_ends_when_validation_stops_improving(tmp_path: Path) -> None:
    still = ("data.val=val", "optimizer.lr=1e-12", "schedule.epochs=5")  # the accuracy stays that of the first epoch
    watcher = Follower()
    ended = train(tmp_path, *still, "schedule.patience=2", watcher=watcher)
    assert (ended.step, ended.best_epoch) == (9, 1)
    assert watcher.messages[-1] == (
        "the run ends after epoch 3: no validation was better than that of epoch 1 (schedule.patience = 2)"
    )
    assert train(tmp_path, *still, "schedule.patience=2", resume=True).step == 9
    longer = train(tmp_path, *still, "schedule.patience=3", resume=True)
    assert longer.step == 12
    for mine, theirs in zip(
        weights(longer), weights(train(tmp_path / "b", *still[:2], "schedule.epochs=4")), strict=True
    ):
        assert torch.equal(mine, theirs)
    with pytest.raises(UsageError, match="compares validation accuracies"):
        train(tmp_path / "c", "schedule.patience=2")


# -- failed commands -------------------------------------------------------------------------------------------------


def test_a_command_that_fails_before_its_first_step_leaves_nothing(tmp_path: Path, class_folders: Path) -> None:
    out = tmp_path / "run"
    settings = [*ranks.SMALL, "data.train=all", "run.batch_size=16"]
    for mistake in ("optimizer.name=sgdd", "model.head=clss", "teacher.views=true", "run.batch_size=99"):
        failing = load("scratch", [*settings, mistake, "data.last=drop"])
        with pytest.raises(UsageError):
            loop.train(failing, class_folders, out, device="cpu")
        assert not out.exists()
    out.mkdir()
    with pytest.raises(UsageError):
        loop.train(load("scratch", [*settings, "optimizer.name=sgdd"]), class_folders, out, device="cpu")
    assert not list(out.iterdir())
    assert loop.train(load("scratch", settings), class_folders, out, device="cpu").steps == 3


def test_a_run_without_a_checkpoint_leaves_its_folder_free(tmp_path: Path) -> None:
    stop(tmp_path, 2)
    assert (tmp_path / "recipe.toml").exists()
    train(tmp_path, "optimizer.lr=0.01")
    assert load(str(tmp_path / "recipe.toml")).optimizer.lr == 0.01
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 10))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "file").touch()
    with pytest.raises(UsageError, match="is not empty and is not a run"):
        train(tmp_path / "foreign")


@pytest.mark.parametrize("writes", [0, 1])
def test_a_kill_at_the_start_leaves_a_folder_that_the_next_run_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    out = tmp_path / "run"
    done: list[Path] = []

    def killed(path: Path, content: bytes) -> None:
        if len(done) == writes:  # as a kill leaves it: the file under its temporary name only
            path.with_name(f".tmp-1-{path.name}").write_bytes(content[:10])
            raise StoppedError
        done.append(path)
        write_atomic(path, content)

    monkeypatch.setattr(runs, "write_atomic", killed)
    stop(out, 1)
    (out / ".lock").touch()
    monkeypatch.undo()
    if writes:
        (out / "report").mkdir()
        (out / "report" / ".tmp-1-page.html").touch()
    with runs.lock_folder(out, recipe(), {}, resume=False):
        assert not list(out.rglob(".tmp-*"))
        runs.claim(out, recipe(), {})
    assert (out / ".digest").read_text() == recipe().digest()
