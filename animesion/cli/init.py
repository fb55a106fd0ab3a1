"""`animesion init`: write a recipe for a folder of images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from animesion.wording import amount

if TYPE_CHECKING:
    from animesion.pipeline.survey import Survey

#: Classes that are listed.
_SHOWN = 3


@click.command(epilog="Example: animesion init faces/ --size 128 --yes")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="File to write.  [default: NAME.toml]")
@click.option("--name", help="Name of the dataset.  [default: that of the folder]")
@click.option("--size", type=click.IntRange(0, 8192), help="Shorter side of the packed images; 0 keeps their own.")
@click.option("--detector", help="Crop a face from each image: `anime`, or another of `animesion detectors`.")
@click.option("--minimum", type=click.IntRange(1), help="Drop classes with fewer images.")
@click.option("--licence", help="Licence of the images, as the Hugging Face Hub spells it.")
@click.option("--yes", is_flag=True, help="Ask nothing: take the defaults of what is not given.")
def init(
    path: Path,
    out: Path | None,
    name: str | None,
    size: int | None,
    detector: str | None,
    minimum: int | None,
    licence: str | None,
    yes: bool,
) -> None:
    """Write a recipe for a folder of images.

    PATH is the folder, or a tar or zip of one. The command says what it holds, and what cannot be used.

    What is not given by an option is asked in a terminal.
    """
    import tomli_w

    from animesion.cli.build import name_of
    from animesion.config import recipe, settings
    from animesion.errors import UsageError
    from animesion.pipeline import survey
    from animesion.storage.workspace import write_atomic

    if not path.exists() and "://" not in str(path):
        raise UsageError(f"file or folder {path} not found")
    found = survey.survey(path)
    for sentence in _sentences(found):
        click.echo(sentence)
    asks = sys.stdin.isatty() and not yes

    def answer(given: Any, question: str, default: Any) -> Any:
        if given is not None or not asks:
            return default if given is None else given
        return click.prompt(question, default=default, show_default=default != "")

    chosen = answer(name, "Name of the dataset", name_of(str(path.resolve())))
    if chosen != name_of(chosen):
        raise UsageError(
            f"{chosen!r} cannot be a name, which has up to 64 letters, digits, '.', '_' and '-': "
            f"give {name_of(chosen)!r}"
        )
    cropped = answer(detector, "Crop faces with a detector: none, anime, ...", "none")
    # how large the faces are is not known yet: at the size of whole images, most would be enlarged
    suggested = found.size if cropped == "none" else 0
    values = survey.draft(
        found,
        path,
        name=chosen,
        size=answer(size, "Shorter side of the packed images in pixels, 0 for their own", suggested),
        detector=cropped,
        minimum=answer(minimum, "Drop classes with fewer images than", 1),
        licence=answer(licence, "Licence of the images, such as cc-by-4.0 (empty: leave open)", ""),
    )
    settings.check(recipe.Recipe, values, "the answers")
    out = out or Path(f"{chosen}.toml")
    if out.exists():
        raise UsageError(f"{out} exists: give another --out, or remove it")
    heading = "".join(f"# {sentence}\n" for sentence in _sentences(found))
    write_atomic(out, (heading + tomli_w.dumps(values)).encode())
    place = out if "/" in str(out) else f"./{out}"
    click.echo(f"wrote {out}\nNext:\n  animesion build {place} --dry-run\n  animesion build {place}")


def _sentences(found: Survey) -> list[str]:
    """What was found, for people; file names in it have no control characters."""
    labels = list(found.classes.items())
    sentences = [f"{amount(found.images, 'image')}, {amount(len(labels), 'class', 'classes')}"]
    if labels:
        shown = ", ".join(f"{label} {count:,}" for label, count in labels[:_SHOWN])
        sentences[0] += f": {shown}" + (f" ... {labels[-1][0]} {labels[-1][1]:,}" if len(labels) > _SHOWN else "")
    if found.unlabelled and not any(" no class" in note for note in found.notes):  # what a folder's note says
        sentences.append(amount(found.unlabelled, "image has no label", "images have no label"))
    if found.several:
        sentences.append(amount(found.several, "image has several labels", "images have several labels"))
    if found.splits:
        sentences.append(f"it publishes the splits {', '.join(found.splits)}")
    if found.sides:
        shorter = sorted(side for side, _ in found.sides)
        sides = f"{shorter[0]:,} to {shorter[-1]:,} pixels, median {shorter[len(shorter) // 2]:,}"
        if shorter[0] == shorter[-1]:
            sides = f"{shorter[0]:,} pixels"
        sentences.append(f"shorter sides of {amount(len(shorter), 'image')}: {sides}")
    if found.unread:
        decoded = len(found.sides) + sum(found.unread.values())
        tried = "images" if decoded >= found.images else f"of {decoded:,} images that were tried, those"
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in found.unread.items())
        sentences.append(f"{tried} that cannot be used: {reasons}")
    every = [*sentences, *found.notes]
    return ["".join(letter if letter.isprintable() else "?" for letter in sentence) for sentence in every]
