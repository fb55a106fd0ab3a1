"""`animesion identify`: name the characters in images by a gallery."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from animesion_training.cli.checkpoint import moved_checkpoint_option
from animesion_training.cli.images import download_options, face_options

if TYPE_CHECKING:
    from animesion_training.eval.identify import Identity
    from animesion_training.eval.pieces import FaceOptions


@click.command(epilog="Example: animesion identify holo.gallery image.jpg --detector anime --margin 0.1")
@click.argument("file", metavar="GALLERY", type=click.Path(path_type=Path))
@click.argument("places", metavar="PATH|URL|-...", nargs=-1, required=True)
@moved_checkpoint_option
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="Names per image.")
@click.option("--threshold", type=click.FloatRange(-1, 1), help="Similarity below which an image is unknown.")
@face_options
@download_options
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per image or face.")
@click.pass_context
def identify(
    ctx: click.Context,
    file: Path,
    places: tuple[str, ...],
    checkpoint: Path | None,
    top: int,
    threshold: float | None,
    faces: FaceOptions,
    contact: str,
    allow_private: tuple[str, ...],
    device: str,
    as_json: bool,
) -> None:
    """Name the characters in images, files, folders, URLs or - for standard input, by the most similar of GALLERY.

    The number beside a name is the similarity to the mean of its images, -1 to 1. Below the threshold of the gallery, a
    character is unknown. The exit status is 1 when an image cannot be read, or has no face without --or-whole.
    """
    import json

    from animesion.cli.progress import counted
    from animesion_training.cli.requirements import check_exists, torch_required

    check_exists(file, *(place for place in places if place != "-"))
    with torch_required():
        from animesion_training import api
        from animesion_training.eval import gallery as galleries

    limit = galleries.load(file).card.threshold if threshold is None else threshold
    unread = 0
    found = api.identify(
        file, places, checkpoint=checkpoint, top=top, threshold=limit, contact=contact, allow_private=allow_private,
        device=device, **faces,
    )  # fmt: skip
    for each in counted(found, "identify", prints=True):
        unread += bool(each.problem)
        if as_json:
            click.echo(json.dumps(_line(each, limit), ensure_ascii=False))
        else:
            click.echo(_sentence(each), err=bool(each.problem))
    if unread:
        ctx.exit(1)


def _line(each: Identity, threshold: float) -> dict[str, Any]:
    line: dict[str, Any] = {"path": each.piece.name}
    if each.piece.box:
        line |= {"box": each.piece.box, "score": round(each.piece.score, 6)}
    if each.problem:
        return line | {"problem": each.problem}
    found = [
        {"name": one.name, "similarity": round(one.similarity, 6), "images": one.images, "nearest": one.nearest}
        for one in each.matches
    ]
    name = each.matches[0].name if each.known else None
    return line | {"name": name, "threshold": round(threshold, 6), "matches": found}


def _sentence(each: Identity) -> str:
    from animesion.cli.detect import printable

    where = " at {},{} to {},{}".format(*each.piece.box) if each.piece.box else ""
    if each.problem:
        return printable(f"{each.piece.name}{where}: not identified ({each.problem})")
    names = ", ".join(f"{one.name} {one.similarity:.3f}" for one in each.matches)
    return printable(f"{each.piece.name}{where}: " + (names if each.known else f"unknown (nearest: {names})"))
