"""What a run reads besides its recipe: identities of its data and of the weights that it starts from.

A recipe has the paths of weights, and the data is not in it. Both can be others when a run is resumed or when a study
looks for what is done, so the folder of a run states what they were.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from animesion.errors import UsageError
from animesion_training.data import DataSplits
from animesion_training.models.packages import PREFIX, weight_file
from animesion_training.recipe import TrainRecipe
from animesion_training.run_weights import find_weights


def origins(recipe: TrainRecipe, data: DataSplits) -> dict[str, str]:
    """Return the identities of what a run reads, by the place in the recipe that names it.

    Args:
        recipe: of the run.
        data: its data, as it was opened for the recipe.

    Returns:
        For `data.train`, `data.val` and `data.test`, a digest of the split's keys and classes, and of its bytes where
        the dataset has their digests (class folders do not). For `model.init`, `model.pretrained` and
        `teacher.weights`, the SHA-256 of the file. What does not exist, or is no local file, is left out.
    """
    chosen = recipe.data
    splits = {"data.train": chosen.train, "data.val": chosen.val, "data.test": chosen.test}
    found = {
        key: data.splits[name].fingerprint()
        for key, name in splits.items()
        if name in data.splits and len(data.splits[name])
    }
    pretrained = recipe.model.pretrained
    weights = {
        "model.init": recipe.model.init,
        "model.pretrained": pretrained if isinstance(pretrained, str) else "",
        "teacher.weights": recipe.teacher.weights,
    }
    for key, given in weights.items():
        digest = _digest(given) if given else None
        if digest:
            found[key] = digest
    return found


def _digest(given: str) -> str | None:
    try:
        path = weight_file(given) if given.startswith(PREFIX) else find_weights(given)
        found = path.stat()
        return _sha256(path, found.st_size, found.st_mtime_ns)
    except (OSError, UsageError):  # a name on a hub, a folder of one, or what loading will report
        return None


@functools.lru_cache(maxsize=16)  # the runs of a study have few weights in common
def _sha256(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
