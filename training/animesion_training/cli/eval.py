"""`animesion eval`: evaluate a trained model on a split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from animesion_training.cli.checkpoint import checkpoint_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from animesion_training.eval.tta import TTA


@click.command(
    "eval",
    epilog="Example: animesion eval --checkpoint runs/a --data datasets/daf-re-sample --split test",
)
@checkpoint_option
@click.option("--data", required=True, help="A built dataset, class folders, or label CSVs.")
@click.option("--images", type=click.Path(path_type=Path), help="With label CSVs: root of their paths.")
@click.option("--split", default="test", show_default=True, help="Split to evaluate on.")
@click.option(
    "--task",
    "tasks",
    type=click.Choice(["classification", "retrieval", "verification", "open-set"]),
    multiple=True,
    default=("classification",),
    show_default=True,
    help="What is evaluated; the last three compare embeddings, and may be given together.",
)
@click.option("--fit-split", default="val", show_default=True, help="Split that thresholds are fitted on.")
@click.option(
    "--threshold", type=click.FloatRange(-1, 1), help="Threshold of the similarity, in place of a fitted one."
)
@click.option("--shots", type=click.IntRange(1), default=5, show_default=True, help="Known images of each class.")
@click.option("--draws", type=click.IntRange(1), default=20, show_default=True, help="Random choices of known images.")
@click.option(
    "--false-accept",
    type=click.FloatRange(0, 1),
    default=0.05,
    show_default=True,
    help="Share of unknown images that may get a name, for the threshold of open-set.",
)
@click.option("--batch-size", type=click.IntRange(1), default=128, show_default=True)
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True)
@click.option(
    "--tta",
    type=click.Choice(["none", "flip", "crops"]),
    default="none",
    show_default=True,
    help="Average the predictions of views: mirror image, or five crops and their mirror images.",
)
@click.option("--tags", is_flag=True, help="Give a network that reads tags those of each image; else they are unknown.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="How a network with CAL classifies: views=raw, single or full; top_k, votes, upsampling, pool.",
)
@click.option(
    "--report", type=click.Path(path_type=Path), help="Write JSON, per-class and confusion CSVs into this folder."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def eval_(
    checkpoint: Path,
    data: str,
    images: Path | None,
    split: str,
    tasks: tuple[str, ...],
    fit_split: str,
    threshold: float | None,
    shots: int,
    draws: int,
    false_accept: float,
    batch_size: int,
    precision: str,
    tta: TTA,
    tags: bool,
    overrides: tuple[str, ...],
    report: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Evaluate a model on DATA.

    By default as a classifier: top-1, macro accuracy, accuracy by class and band, calibration, intervals. A tagger is
    evaluated by its tags: mAP and F1 by category and band. With --task, by its embeddings, also on classes that it was
    not trained on: retrieval (R@1, mAP@R, identification from a few images), verification (error rate and F1 of pairs),
    open-set (are unknown classes told apart?).
    """
    from animesion.cli.progress import for_main_process
    from animesion.config.settings import apply
    from animesion_training.cli.requirements import check_exists, torch_required

    check_exists(checkpoint, data)
    with torch_required():
        from animesion_training.eval.similarity_report import Settings
        from animesion_training.evaluation import evaluate

    evaluation: dict[str, Any] = {}
    for override in overrides:
        apply(evaluation, override)
    with for_main_process() as progress:
        result = evaluate(
            checkpoint,
            data,
            split=split,
            images=images,
            tasks=tasks,
            fit_split=fit_split,
            settings=Settings(shots, draws, false_accept, threshold),
            batch_size=batch_size,
            precision=precision,
            tta=tta,
            read_tags=tags,
            evaluation=evaluation,
            device=device,
            progress=progress,
        )
    if result is None:
        return
    if report:
        result.write(report)
    if as_json:
        import json

        click.echo(json.dumps(result.as_json(), ensure_ascii=False))
        return
    _print(result.tables())
    for note in result.notes:
        click.echo(f"note: {note}")


def _print(tables: Sequence[RenderableType]) -> None:
    import sys

    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for each in tables:
        console.print(each)
