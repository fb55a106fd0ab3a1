"""The folder of a run: lock, recipe, and metrics as JSON lines, CSV and for optional trackers.

- `recipe.toml`: the resolved recipe
- `origins.json`: identities of the data and weights that it reads (`animesion_training.engine.origins`)
- `metrics.jsonl`: one line every few steps and at the end of each epoch; `epochs.csv`: the epochs as a table
- `last.ckpt`: the checkpoint that the run resumes from (`animesion_training.engine.checkpoint`); `previous.ckpt`: the
  one before
- `best.safetensors`: weights of the best epoch (`animesion_training.weights`); `last.safetensors`: those of the last
- `report/`: the final evaluation
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from animesion.errors import AnimesionError, BusyError, UsageError
from animesion.storage.workspace import TEMPORARY, full_disk_is_clear, sweep, write_atomic
from animesion_training.recipe import TrainRecipe, load

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
RECIPE, ORIGINS = "recipe.toml", "origins.json"
_METRICS, _EPOCHS = "metrics.jsonl", "epochs.csv"
#: Digest of what determines the result of the run, so that a resume with other settings is refused.
_MARKER, _LOCK = ".digest", ".lock"


@contextlib.contextmanager
def lock_folder(out: Path, recipe: TrainRecipe, origins: Mapping[str, str], *, resume: bool) -> Iterator[None]:
    """Lock the folder of a run, and create it where needed.

    A folder without a checkpoint has nothing to resume and is free for any recipe. Nothing of a run that fails before
    `claim` is left behind.

    Args:
        out: the folder.
        recipe: of the run.
        origins: identities of what it reads, see `animesion_training.engine.origins`.
        resume: whether it may contain a run of this recipe.

    Raises:
        BusyError: another process has locked it.
        UsageError: it contains a run of another recipe or of other data or weights, a run without `resume`, or other
            files.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file: give a folder")
    marker, existed = out / _MARKER, out.is_dir()
    if existed and not marker.exists() and any(_is_foreign(path) for path in out.iterdir()):
        raise UsageError(f"the folder {out} is not empty and is not a run: give another --out")
    lock = FileLock(out / _LOCK)
    try:
        with full_disk_is_clear(out):
            out.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
    except Timeout:
        raise BusyError(f"another process is training in {out}: wait for it, or give another --out") from None
    try:
        sweep(out)  # a killed run leaves its temporary file
        if newest_checkpoint(out):
            _check_same_run(out, recipe, origins, resume=resume)
        yield
    finally:
        lock.release()
        if not marker.exists():
            (out / _LOCK).unlink(missing_ok=True)
            if not existed:
                with contextlib.suppress(OSError):  # not empty
                    out.rmdir()


def claim(out: Path, recipe: TrainRecipe, origins: Mapping[str, str]) -> None:
    """Write the recipe and what the run reads into its locked folder, which then belongs to it."""
    write_atomic(out / _MARKER, recipe.digest().encode())  # first: a folder with files and no marker is not a run
    write_atomic(out / ORIGINS, (json.dumps(origins, indent=1) + "\n").encode())
    write_atomic(out / RECIPE, recipe.to_toml().encode())


def _is_foreign(path: Path) -> bool:
    return path.name != _LOCK and not path.name.startswith(TEMPORARY)


def newest_checkpoint(out: Path) -> Path | None:
    """Return the newest checkpoint in the folder of a run; a kill between two renames leaves only the previous one."""
    return next((path for path in (out / LAST, out / PREVIOUS) if path.exists()), None)


def _check_same_run(out: Path, recipe: TrainRecipe, origins: Mapping[str, str], *, resume: bool) -> None:
    if (out / _MARKER).read_text(errors="replace") != recipe.digest():
        raise UsageError(f"{out} holds a run with other settings{_differences(out, recipe)}: give another --out")
    if not resume:
        raise UsageError(f"{out} already holds a run: add --resume to continue it, or give another --out")
    if changed := changed_origins(out, origins):
        raise UsageError(
            f"{out} holds a run that read something else as {', '.join(changed)}: give the same data and weights, or "
            "another --out"
        )


def changed_settings(out: Path, recipe: TrainRecipe) -> list[str]:
    """List the settings that differ from those of the run in a folder, its number of epochs included.

    Raises:
        UsageError: the recipe of the run cannot be read.
    """
    theirs, ours = (
        {**each.decisive(), "schedule.epochs": each.schedule.epochs} for each in (load(str(out / RECIPE)), recipe)
    )
    return [f"{key} was {theirs.get(key)!r} and is now {ours[key]!r}" for key in ours if ours[key] != theirs.get(key)]


def changed_origins(out: Path, origins: Mapping[str, str]) -> list[str]:
    """List where the run in a folder read other data or weights than these.

    What is not known of the run is not compared, and neither are weights that are gone: loading them reports that.
    """
    try:
        theirs = json.loads((out / ORIGINS).read_bytes())
    except (OSError, ValueError):
        return []
    if not isinstance(theirs, dict):
        return []
    keys = {key for key in theirs if key in origins or key.startswith("data.")} | origins.keys()
    return [key for key in sorted(keys) if theirs.get(key) != origins.get(key)]


def _differences(out: Path, recipe: TrainRecipe) -> str:
    """The first settings that differ from those of the run, in brackets."""
    try:
        changed = changed_settings(out, recipe)
    except (OSError, AnimesionError):  # of another version, or edited
        return " (see its recipe.toml)"
    if not changed:
        return " (of another version of this package, which has other settings)"
    more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
    return f" ({', '.join(changed[:3])}{more})"


class Log:
    """Log of a run's metrics: JSON lines and CSV, optionally TensorBoard and Weights & Biases."""

    def __init__(self, out: Path, recipe: TrainRecipe, from_step: int) -> None:
        """Open the log, without the lines that were written after the checkpoint of a resumed run.

        Args:
            out: folder of the run.
            recipe: names the optional trackers.
            from_step: lines of later steps are removed.

        Raises:
            UsageError: the package of a requested tracker is not installed.
        """
        self._out = out
        self._lines = [line for line in read_log(out) if line["step"] <= from_step]
        write_atomic(out / _METRICS, "".join(json.dumps(line) + "\n" for line in self._lines).encode())
        self._file = (out / _METRICS).open("a", encoding="utf-8")
        self._board = _tensorboard(out) if recipe.run.tensorboard else None
        self._wandb = _wandb(out, recipe) if recipe.run.wandb != "off" else None

    def write(self, kind: str, step: int, epoch: int, numbers: Mapping[str, float]) -> None:
        """Add one line.

        Args:
            kind: `step` or `epoch`.
            step: number of optimizer steps so far.
            epoch: current epoch, from 1.
            numbers: finite values by name.
        """
        line = {"kind": kind, "step": step, "epoch": epoch, **numbers}
        self._lines.append(line)
        with full_disk_is_clear(self._out / _METRICS):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if kind == "epoch":  # rewritten as a whole: validation adds columns
            self._write_csv()
        if self._board:
            for name, value in numbers.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)
        if self._wandb:
            self._wandb.log({f"{kind}/{name}": value for name, value in numbers.items()}, step=step)

    def close(self) -> None:
        """Close the file and the trackers."""
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


def read_log(out: Path) -> list[dict[str, Any]]:
    """Read the metrics of the run in a folder as `Log.write` wrote them, without a line that a kill cut off."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for text in (out / _METRICS).read_text(encoding="utf-8").splitlines():
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
        id=_tracked_id(out),
        resume="allow",
        settings=wandb.Settings(console="off", silent=True),
    )


def _tracked_id(out: Path) -> str:
    """The identity of the run at Weights & Biases, which a resumed run continues; it must be unique there."""
    path = out / "wandb-id.txt"
    if not path.exists():
        write_atomic(path, secrets.token_hex(8).encode())
    return path.read_text().strip()
