"""`animesion eval`: evaluate a trained model on a split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from animesion_training.eval.tta import TTA


@click.command(
    "eval",
    epilog="Example: animesion eval --checkpoint runs/a/best.safetensors --data datasets/daf-re-sample --split test",
)
@click.option(
    "--checkpoint",
    "weights",
    type=click.Path(path_type=Path),
    required=True,
    help="Weights of a run, or a checkpoint that describes its network.",
)
@click.option("--data", required=True, help="A built dataset, class folders, or label CSVs.")
@click.option("--images", type=click.Path(path_type=Path), help="With label CSVs: root of their paths.")
@click.option("--split", default="test", show_default=True, help="Split to evaluate on.")
@click.option("--batch-size", type=click.IntRange(1), default=128, show_default=True)
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True)
@click.option(
    "--tta",
    type=click.Choice(["none", "flip", "crops"]),
    default="none",
    show_default=True,
    help="Average the predictions of views: mirror image, or five crops and their mirror images.",
)
@click.option(
    "--report", type=click.Path(path_type=Path), help="Write JSON, per-class and confusion CSVs into this folder."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def eval_(
    weights: Path,
    data: str,
    images: Path | None,
    split: str,
    batch_size: int,
    precision: str,
    tta: TTA,
    report: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Evaluate a model on DATA: top-1, macro accuracy, accuracy by class and band, calibration, intervals."""
    from animesion.errors import UsageError
    from animesion_training.cli.requirements import check_exists, torch_required

    check_exists(weights, data)
    with torch_required():
        from animesion_training.data import Augment, open_data
        from animesion_training.distributed import distributed_context
        from animesion_training.eval import evaluate
        from animesion_training.eval import report as reports
        from animesion_training.weights import load_model

    model, card = load_model(weights)
    if not isinstance(card.img_size, int):
        raise UsageError(f"{weights} takes images of {card.img_size}: only square inputs are supported")
    opened = open_data(data, images=images, classes=card.classes or None)
    evaluate.check_classes(card, opened, str(weights))
    normalise = Augment.plain(evaluate.as_rgb(card.mean), evaluate.as_rgb(card.std))
    with distributed_context(device) as context:
        scores = evaluate.score(
            model.to(context.device),
            opened,
            split,
            normalise,
            context,
            img_size=card.img_size,
            crop_pct=card.crop_pct,
            batch_size=batch_size,
            precision=precision,
            tta=tta,
        )
        if not context.is_main:
            return
    # counts of the training data if the weights have them, else of the training split of this data
    counts = card.facts.get("train_counts") or evaluate.train_counts(opened)
    evaluation = evaluate.compute_metrics(scores, opened, split, counts)
    facts = {"data": data, "split": split, "checkpoint": str(weights), "tta": tta}
    if report:
        evaluate.write_report(report, evaluation, facts, scores, opened, split)
    if as_json:
        import json

        click.echo(json.dumps({**facts, **reports.as_json(evaluation, per_class=True)}, ensure_ascii=False))
        return
    import sys

    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for each in reports.tables(evaluation):
        console.print(each)
