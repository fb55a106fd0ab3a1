"""`animesion train`: train a network by a recipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from animesion_training.cli import completion

if TYPE_CHECKING:
    from animesion_training.data.stages import StageTimes
    from animesion_training.engine.loop import Outcome
    from animesion_training.engine.lr_range import RangeTest


@click.command(epilog="Example: animesion train --data datasets/daf-re-sample --img-size 64 --epochs 8 --out runs/a")
@click.option("--data", required=True, help="A built dataset, class folders, or label CSVs.")
@click.option("--images", type=click.Path(path_type=Path), help="With label CSVs: root of their paths.")
@click.option(
    "--recipe",
    default="scratch",
    show_default=True,
    shell_complete=completion.recipes,
    help="Name of a training recipe, see `animesion recipes --train`, or a TOML file.",
)
@click.option("--model", shell_complete=completion.models, help="Network; `animesion models` lists them.")
@click.option("--img-size", type=int, help="Side of the input in pixels.")
@click.option("--epochs", type=int, help="Passes over the data.")
@click.option("--batch-size", help="Images per step, over all processes, or `auto` for the largest that fits.")
@click.option("--lr", type=float, help="Learning rate.")
@click.option("--cache", type=click.Choice(["none", "ram", "device"]), help="Decode once, into this memory.")
@click.option("--head", help="Classifier: linear, cosine, ifa, cla, ...")
@click.option("--selector", help="Part selection: cal, glsim, ...")
@click.option("--reduction", help="Token reduction: evit, tome, ...")
@click.option("--keep-rate", type=float, help="Share of tokens that each reduction keeps.")
@click.option("--token-cache", help="Cross-layer cache: clc.")
@click.option("--adapter", help="Adapter: ila, adapter, lora, ...")
@click.option("--teacher", metavar="RUN|FILE", help="Trained network to distil from.")
@click.option("--teacher-size", type=int, help="Side of the teacher's input in pixels; by default its own.")
@click.option(
    "--init", metavar="RUN|FILE", help="Weights to start from; a head of another number of classes is replaced."
)
@click.option("--freeze", multiple=True, help="Parameters to freeze: `backbone`, a name, a shell pattern.")
@click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    shell_complete=completion.keys,
    help="Override one value of the recipe.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run.")
@click.option("--find-lr", is_flag=True, help="Do not train: test learning rates, and suggest one.")
@click.option("--profile-data", is_flag=True, help="Do not train: show where the loader spends its time.")
@click.option("--resume", is_flag=True, help="Continue from the last checkpoint in the folder.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def train(
    data: str,
    images: Path | None,
    recipe: str,
    model: str | None,
    img_size: int | None,
    epochs: int | None,
    batch_size: str | None,
    lr: float | None,
    cache: str | None,
    head: str | None,
    selector: str | None,
    reduction: str | None,
    keep_rate: float | None,
    token_cache: str | None,
    adapter: str | None,
    teacher: str | None,
    teacher_size: int | None,
    init: str | None,
    freeze: tuple[str, ...],
    overrides: tuple[str, ...],
    out: Path | None,
    find_lr: bool,
    profile_data: bool,
    resume: bool,
    device: str,
    as_json: bool,
) -> None:
    """Train a classifier on DATA. Under torchrun, the processes share each batch.

    The same command with --resume continues a run that was stopped or killed. With --find-lr, the loss is measured
    while the learning rate grows, and nothing is written. With --profile-data, each stage of the loader is measured.
    """
    from animesion_training.cli.requirements import check_exists, torch_required
    from animesion_training.recipe import load

    changes: dict[str, Any] = {
        "model.name": model,
        "model.img_size": img_size,
        "model.head": head,
        "model.selector": selector,
        "model.reduction": reduction,
        "model.keep_rate": keep_rate,
        "model.cache": token_cache,
        "model.adapter": adapter,
        "teacher.weights": teacher,
        "teacher.img_size": teacher_size,
        "model.init": init,
        "model.freeze": list(freeze) or None,
        "schedule.epochs": epochs,
        "run.batch_size": _batch_size(batch_size),
        "optimizer.lr": lr,
        "data.cache": cache,
    }
    if out is None and not (find_lr or profile_data):
        raise click.UsageError("Missing option '--out'.")
    chosen = load(recipe, overrides, changes)
    check_exists(data, *filter(None, (chosen.model.init, chosen.teacher.weights)))
    with torch_required():
        from animesion_training.cli.progress import screen
        from animesion_training.engine import loop

    if find_lr:
        from animesion_training.engine import lr_range

        def notify(text: str) -> None:
            click.echo(text, err=True)

        _print_range(lr_range.find_lr(chosen, data, images=images, device=device, notify=notify), as_json)
        return
    if profile_data:
        from animesion_training.engine import data_profile

        _print_stages(data_profile.profile_data(chosen, data, images=images, device=device), as_json)
        return
    assert out is not None
    try:
        with screen() as watcher:
            outcome = loop.train(chosen, data, out, images=images, resume=resume, device=device, watcher=watcher)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            click.echo(
                f"stopped: run the same command with --resume to continue from the checkpoint in {out}", err=True
            )
        raise SystemExit(130) from None
    if watcher.silent:
        return
    if as_json:
        import json

        click.echo(json.dumps(_facts(outcome)))
    else:
        _print(outcome)


def _batch_size(given: str | None) -> int | None:
    """The value of --batch-size for a recipe, where 0 stands for `auto`."""
    if given is None:
        return None
    if given == "auto":
        return 0
    if not given.isascii() or not given.isdecimal() or not int(given):
        raise click.UsageError(f"Invalid value for '--batch-size': '{given}' is neither a number from 1 nor auto.")
    return int(given)


def _facts(outcome: Outcome) -> dict[str, Any]:
    facts = {"out": str(outcome.out), "steps": outcome.steps, "seconds": round(outcome.seconds, 1)}
    facts |= {"best_epoch": outcome.best_epoch, outcome.best_metric: outcome.best_val if outcome.best_epoch else None}
    if outcome.test:
        facts |= {"test_top_1": outcome.test.top_1, "test_top_5": outcome.test.top_5}
        facts["test_macro"] = outcome.test.macro_accuracy
    if outcome.similarity:
        from animesion_training.eval.similarity_report import as_json

        facts["test_similarity"] = as_json(outcome.similarity)
    if outcome.tagging:
        from animesion_training.eval.tag_report import as_json as tags_as_json

        facts["test_tags"] = tags_as_json(outcome.tagging)
    return facts


def _print(outcome: Outcome) -> None:
    click.echo(f"{outcome.steps:,} steps in {outcome.seconds:.1f} s")
    if outcome.best_epoch:
        metric = {"val_map_at_r": "mAP@R", "val_map": "mAP of tags"}.get(outcome.best_metric, "top-1")
        click.echo(f"best validation {metric} {100 * outcome.best_val:.2f}% after epoch {outcome.best_epoch}")
    if outcome.test:
        test = outcome.test
        low, high = 100 * test.top_1_interval.low, 100 * test.top_1_interval.high
        click.echo(
            f"test top-1 {100 * test.top_1:.2f}% [{low:.2f}, {high:.2f}], top-5 {100 * test.top_5:.2f}%, "
            f"macro {100 * test.macro_accuracy:.2f}% over {test.samples:,} images"
        )
    if outcome.similarity and (found := outcome.similarity.retrieval):
        shots = "".join(f", {few.shots}-shot R@1 {100 * few.r_at_1:.2f}%" for few in found.few_shot)
        click.echo(
            f"test, {outcome.similarity.classes} classes that were not trained on: R@1 {100 * found.r_at_1:.2f}%, "
            f"mAP@R {100 * found.map_at_r:.2f}%{shots}"
        )
    if outcome.similarity and (pairs := outcome.similarity.verification):
        click.echo(f"pairs: equal error rate {100 * pairs.eer:.2f}%, F1 {100 * pairs.balanced.f1:.2f}%")
    if outcome.tagging and (tags := outcome.tagging.overall).map is not None:
        click.echo(
            f"test mAP {100 * tags.map:.2f}% over {tags.tested:,} tags (base rate {100 * (tags.base_rate or 0):.2f}%), "
            f"macro F1 {100 * (tags.macro_f1 or 0):.2f}%, micro F1 {100 * (tags.micro_f1 or 0):.2f}% over "
            f"{outcome.tagging.samples:,} images"
        )
    from animesion_training.run_weights import BEST, FINAL

    where = outcome.out
    weights = where / (BEST if outcome.best_epoch else FINAL)
    report = f", report {where / 'report'}" if (where / "report").is_dir() else ""
    click.echo(f"weights {weights}, metrics {where / 'epochs.csv'}{report}")


def _print_range(test: RangeTest, as_json: bool) -> None:
    if as_json:
        import json
        from dataclasses import asdict

        click.echo(json.dumps(asdict(test)))
        return
    click.echo("learning rate   loss")
    for i in range(0, len(test.rates), max(1, len(test.rates) // 20)):
        click.echo(f"{test.rates[i]:13.2e}   {test.smoothed[i]:.4f}")
    end = f"it diverges from {test.diverged:.2g}" if test.diverged else "it does not diverge"
    click.echo(f"the loss is lowest at {test.lowest:.2g}, {end}")
    if test.suggested is None:
        click.echo("the loss does not fall: no learning rate is suggested")
    else:
        click.echo(f"it falls fastest at {test.suggested:.2g}: --lr {test.suggested:.2g}")


#: Headings of the stages by where they run.
_PLACES = {
    "threads": "in the threads",
    "first": "in the threads, in the first epoch only",
    "main": "in the loop over batches",
}


def _print_stages(times: StageTimes, as_json: bool) -> None:
    if as_json:
        import json
        from dataclasses import asdict

        click.echo(json.dumps(asdict(times)))
        return
    for where, heading in _PLACES.items():
        stages = [stage for stage in times.stages if stage.where == where]
        total = sum(stage.seconds for stage in stages)
        click.echo(f"{heading:<40} us per image   share")
        for stage in stages:
            click.echo(f"  {stage.name:<38} {1e6 * stage.seconds:12.1f}   {stage.seconds / total:5.0%}")
    click.echo(f"measured on {times.images:,} images, one stage at a time, in one thread")
    click.echo(
        f"stream and augmentation with {times.workers} threads: {times.stream:,.0f} images/s; "
        f"threads that only decode: {times.decoding:,.0f} images/s"
    )
