"""`animesion predict`: name the characters or classes in images, or their tags."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from animesion_training.cli.checkpoint import checkpoint_option
from animesion_training.cli.images import download_options, face_options

if TYPE_CHECKING:
    from animesion_training.eval.pieces import FaceOptions
    from animesion_training.eval.predict import Prediction


@click.command(epilog="Example: animesion predict --checkpoint runs/a image.jpg --json")
@click.argument("places", metavar="PATH|URL|-...", nargs=-1, required=True)
@checkpoint_option
@click.option(
    "--top",
    type=click.IntRange(1),
    help="Guesses per image, 5 by default; of a tagger, most tags per category, by default all above their threshold.",
)
@face_options
@download_options
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per image or face.")
@click.pass_context
def predict(
    ctx: click.Context,
    places: tuple[str, ...],
    checkpoint: Path,
    top: int | None,
    faces: FaceOptions,
    contact: str,
    allow_private: tuple[str, ...],
    device: str,
    as_json: bool,
) -> None:
    """Predict the classes or tags of images: files, folders, URLs or - for standard input.

    With --detector, predict the classes of the faces that it finds; boxes are in pixels of the upright image, margin
    included. The exit status is 1 when an image cannot be read, or has no face without --or-whole.
    """
    import json

    from animesion.cli.detect import printable
    from animesion.cli.progress import counted
    from animesion_training.cli.requirements import check_exists, torch_required

    check_exists(checkpoint, *(place for place in places if place != "-"))
    with torch_required():
        import torch  # noqa: F401  # what is missing is said here

        from animesion_training import api

    unread = 0
    found = api.predict(
        checkpoint, places, top=top, contact=contact, allow_private=allow_private, device=device, **faces
    )
    for each in counted(found, "predict", prints=True):
        unread += bool(each.problem)
        if as_json:
            click.echo(json.dumps(_line(each), ensure_ascii=False))
        elif each.problem:
            click.echo(printable(f"{each.path}: no prediction ({each.problem})"), err=True)
        else:
            where = " at {},{} to {},{}".format(*each.box) if each.box else ""
            click.echo(printable(f"{each.path}{where}: {_listed(each.guesses)}").rstrip())
            for category, tags in each.tags.items():
                click.echo(printable(f"  {category}: {_listed(tags) or '-'}"))
    if unread:
        ctx.exit(1)


def _line(each: Prediction) -> dict[str, Any]:
    line: dict[str, Any] = {"path": each.path}
    if each.guesses or not each.tags:
        line["guesses"] = _named(each.guesses)
    if each.tags:
        line["tags"] = {category: _named(tags) for category, tags in each.tags.items()}
    if each.box:
        line |= {"box": each.box, "score": round(each.score, 6)}
    return line | ({"problem": each.problem} if each.problem else {})


def _named(guesses: Iterable[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{"name": name, "probability": round(value, 6)} for name, value in guesses]


def _listed(guesses: Iterable[tuple[str, float]]) -> str:
    return ", ".join(f"{name} {100 * value:.1f}%" for name, value in guesses)
