"""Measure the loader of a training run without training: `animesion train --profile-data`."""

from __future__ import annotations

from pathlib import Path

from animesion.errors import UsageError
from animesion_training.data import Stream
from animesion_training.data.stages import StageTimes, measure_stages
from animesion_training.distributed import distributed_context
from animesion_training.engine import batch_size, setup
from animesion_training.recipe import TrainRecipe

#: Any mean and deviation take the same time.
_MEAN, _STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def profile_data(
    recipe: TrainRecipe, data_path: Path | str, *, images: Path | str | None = None, device: str = "auto"
) -> StageTimes:
    """Measure the stages of a run's loader; no network is built, and no file is written.

    Args:
        recipe: the recipe.
        data_path: a built dataset, class folders or label files.
        images: image root of label files.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        UsageError: a recipe that does not fit the data, a cache, or several processes.
    """
    data, _ = setup.open_datasets(recipe, data_path, images)
    with distributed_context(device) as context:
        if context.world_size > 1:
            raise UsageError("--profile-data runs in one process: start it without torchrun")
        recipe = batch_size.settle(recipe, data, context, notify=lambda _: None)
        teacher = setup.load_teacher(recipe, data, context.device)
        if recipe.data.cache != "none":
            raise UsageError(
                f"data.cache is {recipe.data.cache!r}: a run decodes images before it starts and reads none later; "
                "profile without --cache"
            )
        if recipe.data.decoder == "gpu":
            raise UsageError("data.decoder is 'gpu', whose stages are not measured: profile with 'cpu'")
        stream = setup.open_stream(recipe, data, context, teacher=teacher, pairs=False, notify=lambda _: None)
        assert isinstance(stream, Stream)
        augment = setup.training_augment(recipe.augment, _MEAN, _STD)
        return measure_stages(stream, augment, context.device)
