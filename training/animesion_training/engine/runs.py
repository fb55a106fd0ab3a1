"""The folder of a run: who holds it, its recipe, its metrics as JSON lines and CSV, other trackers when asked for.

- `recipe.toml`: the resolved recipe
- `metrics.jsonl`: one line every few steps and at each epoch's end; `epochs.csv`: the epochs' lines as a table
- `last.ckpt`: everything to go on from (`animesion_training.engine.checkpoint`)
- `best.safetensors`: weights of the best epoch (`animesion_training.weights`); `last.safetensors`: those of the last
- `report/`: the final evaluation
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from animesion.errors import BusyError, UsageError
from animesion.storage.workspace import write_atomic
from animesion_training.recipe import TrainRecipe

LAST, BEST, FINAL = "last.ckpt", "best.safetensors", "last.safetensors"
_METRICS, _EPOCHS, _RECIPE = "metrics.jsonl", "epochs.csv", "recipe.toml"


@contextlib.contextmanager
def claimed(out: Path, recipe: TrainRecipe, *, resume: bool) -> Iterator[None]:
    """Hold a run's folder.

    Raises:
        BusyError: another run is at work in it.
        UsageError: it holds a run that was not asked to be resumed, or one of another recipe.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"the run's folder {out} is a file; give a folder with --out")
    marker = out / ".digest"
    if out.is_dir() and any(out.iterdir()):
        if not marker.exists():
            raise UsageError(f"the folder {out} is not empty and is no run: give another with --out")
        if marker.read_text() != recipe.digest():
            raise UsageError(f"{out} holds a run of other settings (see its recipe.toml): give another with --out")
        if (out / LAST).exists() and not resume:
            raise UsageError(f"{out} holds a run already: add --resume to go on with it, or give another with --out")
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError(f"another run is at work in {out}: wait for it, or give another folder with --out") from None
    try:
        write_atomic(out / _RECIPE, recipe.to_toml().encode())
        write_atomic(marker, recipe.digest().encode())
        yield
    finally:
        lock.release()


class Log:
    """Metrics of a run: always as JSON lines and CSV, to TensorBoard and Weights & Biases when the recipe says so."""

    def __init__(self, out: Path, recipe: TrainRecipe, from_step: int) -> None:
        """Open, forgetting what was written after a checkpoint that the run goes on from.

        Args:
            out: folder of the run.
            recipe: what else to log to.
            from_step: lines of later steps are dropped.

        Raises:
            UsageError: a tracker was asked for that is not installed.
        """
        self._out = out
        self._lines = [line for line in _read(out / _METRICS) if line["step"] <= from_step]
        write_atomic(out / _METRICS, "".join(json.dumps(line) + "\n" for line in self._lines).encode())
        self._file = (out / _METRICS).open("a", encoding="utf-8")
        self._board = _tensorboard(out) if recipe.run.tensorboard else None
        self._wandb = _wandb(out, recipe) if recipe.run.wandb != "off" else None

    def write(self, kind: str, step: int, epoch: int, numbers: Mapping[str, float]) -> None:
        """Add one line.

        Args:
            kind: `step` or `epoch`.
            step: optimizer steps done.
            epoch: epochs begun, from 1.
            numbers: finite numbers by name.
        """
        line = {"kind": kind, "step": step, "epoch": epoch, **numbers}
        self._lines.append(line)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if kind == "epoch":
            self._write_csv()
        if self._board:
            for name, value in numbers.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)
        if self._wandb:
            self._wandb.log({f"{kind}/{name}": value for name, value in numbers.items()}, step=step)

    def close(self) -> None:
        """End what was opened."""
        self._file.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()

    def _write_csv(self) -> None:
        epochs = [line for line in self._lines if line["kind"] == "epoch"]
        names = list(dict.fromkeys(name for line in epochs for name in line if name != "kind"))
        out = io.StringIO()
        writer = csv.DictWriter(out, names, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(epochs)
        write_atomic(self._out / _EPOCHS, out.getvalue().encode())


def _read(path: Path) -> list[dict[str, Any]]:
    """Lines of the metrics file; one that a kill cut short is no line."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for text in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError):
                line = json.loads(text)
                if isinstance(line["step"], int):
                    lines.append(line)
    return lines


def _tensorboard(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("run.tensorboard needs the tensorboard package: pip install tensorboard") from None
    return SummaryWriter(str(out / "tensorboard"))


def _wandb(out: Path, recipe: TrainRecipe) -> Any:
    try:
        import wandb
    except ImportError:
        raise UsageError("run.wandb needs the wandb package: pip install wandb") from None
    return wandb.init(
        project="animesion",
        name=out.name,
        dir=out,
        mode="online" if recipe.run.wandb == "online" else "offline",
        config=recipe.model_dump(),
        resume="allow",
        settings=wandb.Settings(console="off", silent=True),
    )
