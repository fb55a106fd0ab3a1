"""`animesion eval`: evaluate a trained model on a split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from animesion_training.cli.checkpoint import checkpoint_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType
    from torch import nn

    from animesion_training.data import Augment, DataSplits
    from animesion_training.eval.similarity_report import Settings
    from animesion_training.eval.tta import TTA
    from animesion_training.text.tokenizer import Texts
    from animesion_training.weights import WeightsCard


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
    from animesion.cli.progress import one_task
    from animesion.errors import UsageError
    from animesion_training.cli.requirements import check_exists, torch_required

    check_exists(checkpoint, data)
    with torch_required():
        from animesion_training.data import Augment, open_data
        from animesion_training.distributed import distributed_context
        from animesion_training.eval import evaluate
        from animesion_training.eval import report as reports
        from animesion_training.weights import load_model

    on_embeddings = [task for task in dict.fromkeys(tasks) if task != "classification"]
    if on_embeddings and tags:
        raise click.UsageError("--tags is for the classifier: embeddings are those of images alone")
    if on_embeddings and "classification" in tasks:
        raise click.UsageError("--task classification cannot be combined with the others: evaluate twice")
    model, card = load_model(checkpoint)
    if not isinstance(card.img_size, int):
        raise UsageError(f"{checkpoint} takes images of {card.img_size}: only square inputs are supported")
    normalise = Augment.plain(evaluate.as_rgb(card.mean), evaluate.as_rgb(card.std))
    facts: dict[str, Any] = {"data": data, "split": split, "checkpoint": str(checkpoint), "tta": tta}
    if on_embeddings:
        from animesion_training.eval.similarity_report import Settings

        # any classes: those of the weights do not matter to embeddings
        opened = open_data(data, images=images)
        given = Settings(shots, draws, false_accept, threshold)
        options = {"batch_size": batch_size, "precision": precision, "views": tta}
        _similarity(
            model, card, opened, split, fit_split, on_embeddings, given, options, facts, report, device, as_json
        )
        return
    if card.is_tagger:
        if tags:
            raise UsageError(f"--tags: {checkpoint} predicts tags, and reads none: leave --tags out")
        _tags(model, card, data, split, normalise, facts, report, device, as_json, batch_size, precision, tta)
        return
    opened = open_data(data, images=images, classes=card.classes or None)
    evaluate.check_classes(card, opened, str(checkpoint))
    evaluate.check_trained(card, opened, split)
    texts = _texts(model, card, opened, split, checkpoint) if tags else None
    with (
        distributed_context(device) as context,
        one_task("eval", len(opened.select(split)) if context.world_size == 1 else None) as shown,
    ):
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
            texts=texts,
            advance=shown.advanced,
        )
        if not context.is_main:
            return
    # counts of the training data if the weights have them, else of the training split of this data
    counts = card.facts.get("train_counts") or evaluate.train_counts(opened)
    evaluation = evaluate.compute_metrics(scores, opened, split, counts)
    if report:
        evaluate.write_report(report, evaluation, facts, scores, opened, split)
    if as_json:
        import json

        click.echo(json.dumps({**facts, **reports.as_json(evaluation, per_class=True)}, ensure_ascii=False))
        return
    _print(reports.tables(evaluation))


def _tags(
    model: nn.Module,
    card: WeightsCard,
    data: str,
    split: str,
    normalise: Augment,
    facts: dict[str, Any],
    report: Path | None,
    device: str,
    as_json: bool,
    batch_size: int,
    precision: str,
    tta: TTA,
) -> None:
    """Evaluate a tagger at its thresholds, and print or write the result."""
    from dataclasses import replace

    from animesion.cli.progress import one_task
    from animesion_training.data import open_data
    from animesion_training.distributed import distributed_context
    from animesion_training.eval import evaluate, tag_report
    from animesion_training.eval.tag_metrics import evaluate_tags

    opened = open_data(data, tags=True)
    found = evaluate.tags_of(opened)
    unknown = sorted(set(card.classes) - set(found.names))
    tags = found.named(card.classes)
    opened = replace(opened, tags=tags)
    samples = opened.select(split)
    with (
        distributed_context(device) as context,
        one_task("eval", len(samples) if context.world_size == 1 else None) as shown,
    ):
        size: Any = card.img_size  # a square, as `eval_` has checked
        scores = evaluate.score_tags(
            model.to(context.device),
            opened,
            split,
            normalise,
            context,
            img_size=size,
            crop_pct=card.crop_pct,
            batch_size=batch_size,
            precision=precision,
            tta=tta,
            advance=shown.advanced,
        )
        if not context.is_main:
            return
    evaluation = evaluate_tags(
        scores,
        tags.assigned[split],
        card.classes,
        card.categories,
        thresholds=card.thresholds,
        train_counts=card.facts.get("train_counts"),
        expected=len(samples),
    )
    if unknown:
        facts["unknown_tags"] = len(unknown)
    if report:
        tag_report.write(report, evaluation, facts)
    if as_json:
        import json

        click.echo(json.dumps({**facts, **tag_report.as_json(evaluation, per_tag=True)}, ensure_ascii=False))
        return
    _print(tag_report.tables(evaluation))
    if unknown:
        shown_names = ", ".join(unknown[:3])
        click.echo(f"note: {len(unknown):,} tags of the weights are not in the data, such as {shown_names}")


def _texts(model: nn.Module, card: WeightsCard, data: DataSplits, split: str, weights: Path) -> Texts:
    """The tags of a split as the network reads them.

    Raises:
        UsageError: it reads none, or the data have none.
    """
    from animesion.errors import UsageError
    from animesion_training.engine.setup import text_length
    from animesion_training.engine.texts import read_facts, texts_of
    from animesion_training.text.tokenizer import TagTokenizer

    names, categories = read_facts(card.facts, str(weights))
    if not names:
        raise UsageError(f"--tags: {weights} is a network of images alone, or does not name its tags: leave --tags out")
    return texts_of(TagTokenizer(names, text_length(model)), data, split, categories)


def _similarity(
    model: nn.Module,
    card: WeightsCard,
    data: DataSplits,
    split: str,
    fit_split: str,
    tasks: Sequence[str],
    settings: Settings,
    options: dict[str, Any],
    facts: dict[str, Any],
    report: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Run tasks on embeddings, and print or write their results."""
    from animesion.errors import UsageError
    from animesion_training.data import Augment
    from animesion_training.distributed import distributed_context
    from animesion_training.eval import evaluate, similarity_report
    from animesion_training.eval.embed import embed_split

    fits = settings.threshold is None and bool({"verification", "open-set"} & set(tasks))
    if fits and fit_split == split:
        raise UsageError(f"--fit-split is the split '{split}' that is evaluated: name another, or give --threshold")
    if fits:
        data.select(fit_split)
    normalise = Augment.plain(evaluate.as_rgb(card.mean), evaluate.as_rgb(card.std))
    with distributed_context(device) as context:
        model = model.to(context.device)
        size: Any = card.img_size  # a square, as `eval_` has checked
        found = [
            embed_split(model, data, each, normalise, context, img_size=size, crop_pct=card.crop_pct, **options)
            for each in (split, *([fit_split] if fits else []))
        ]
        if not context.is_main:
            return
    result = similarity_report.measure(found[0], tasks, settings, *((found[1], fit_split) if fits else ()))
    notes = evaluate.trained_notes(card, data, split, fit_split if fits else "")
    if report:
        similarity_report.write(report, result, {**facts, "notes": notes})
    if as_json:
        import json

        click.echo(json.dumps({**facts, "notes": notes, **similarity_report.as_json(result)}, ensure_ascii=False))
        return
    _print(similarity_report.tables(result))
    for note in notes:
        click.echo(f"note: {note}")


def _print(tables: Sequence[RenderableType]) -> None:
    import sys

    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for each in tables:
        console.print(each)
