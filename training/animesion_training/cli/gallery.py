"""`animesion gallery`: build a gallery of known characters, add to it, and list it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from animesion.wording import amount
from animesion_training.cli.checkpoint import checkpoint_option, moved_checkpoint_option
from animesion_training.cli.images import face_options

if TYPE_CHECKING:
    from animesion_training.eval.gallery import Fit, Gallery
    from animesion_training.eval.pieces import FaceOptions
    from animesion_training.eval.tta import TTA


@click.group()
def gallery() -> None:
    """Galleries of known characters, by which `animesion identify` names those in images."""


@gallery.command(epilog="Example: animesion gallery build --checkpoint runs/a --data faces/ --out g")
@checkpoint_option
@click.option("--data", required=True, help="A built dataset, class folders, or label CSVs.")
@click.option("--images", type=click.Path(path_type=Path), help="With label CSVs: root of their paths.")
@click.option(
    "--split", "splits", multiple=True, help="Splits to take; may be repeated.  [default: train, or the only]"
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File to write.")
@click.option("--threshold", type=click.FloatRange(-1, 1), help="Similarity below which an image is unknown.")
@click.option(
    "--false-accept",
    type=click.FloatRange(0, 1),
    default=0.05,
    show_default=True,
    help="Without --threshold: share of images of unknown classes that may get a name.",
)
@click.option("--fit-data", help="Data that the threshold is fitted on.  [default: --data]")
@click.option("--fit-split", help="Split of it.  [default: val if there is one, else the gallery itself]")
@click.option(
    "--tta",
    "views",
    type=click.Choice(["none", "flip", "crops"]),
    default="flip",
    show_default=True,
    help="Views of an image whose embeddings are averaged, also when identifying.",
)
@face_options
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def build(
    checkpoint: Path,
    data: str,
    images: Path | None,
    splits: tuple[str, ...],
    out: Path,
    threshold: float | None,
    false_accept: float,
    fit_data: str | None,
    fit_split: str | None,
    views: TTA,
    faces: FaceOptions,
    device: str,
    as_json: bool,
) -> None:
    """Write a gallery of the images in DATA, with the embeddings that the network gives them.

    The threshold of unknown images is fitted on images whose own class is left out, so best on a split whose classes
    the network was not trained on. With --detector, the faces that it finds are taken; images of faces need none.
    """
    import json

    from animesion.cli.progress import for_main_process
    from animesion_training.cli.requirements import check_exists, torch_required

    check_exists(checkpoint, data, *filter(None, (fit_data,)))
    with torch_required():
        import torch  # noqa: F401  # what is missing is said here

        from animesion_training import api

    with for_main_process() as progress:
        result = api.build_gallery(
            checkpoint, data, out, images=images, splits=splits, threshold=threshold, false_accept=false_accept,
            fit_data=fit_data, fit_split=fit_split or "", tta=views, device=device, progress=progress, **faces,
        )  # fmt: skip
    for problem in result.problems:
        click.echo(_printable(problem), err=True)
    if as_json:
        click.echo(json.dumps(_facts(result.gallery, result.fit, out, len(result.problems)), ensure_ascii=False))
        return
    _print(result.gallery, result.fit)
    click.echo(f"written to {out}: animesion identify {out} IMAGE")


@gallery.command(epilog="Example: animesion gallery add holo.gallery faces/gura/")
@click.argument("file", metavar="GALLERY", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--name", help="Name of the character.  [default: that of the folder]")
@moved_checkpoint_option
@click.option("--out", type=click.Path(path_type=Path), help="File to write.  [default: GALLERY]")
@face_options
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.pass_context
def add(
    ctx: click.Context,
    file: Path,
    folder: Path,
    name: str | None,
    checkpoint: Path | None,
    out: Path | None,
    faces: FaceOptions,
    device: str,
) -> None:
    """Add the images in FOLDER to GALLERY as one character, without training.

    The exit status is 1 when an image cannot be read, or has no face; the others are added.
    """
    from animesion.cli.progress import for_main_process
    from animesion_training.cli.requirements import check_exists, torch_required

    check_exists(file, folder)
    with torch_required():
        import torch  # noqa: F401  # what is missing is said here

        from animesion_training import api

    with for_main_process() as progress:
        result = api.add_to_gallery(
            file, folder, name=name or "", checkpoint=checkpoint, out=out, device=device, progress=progress, **faces
        )
    for problem in result.problems:
        click.echo(_printable(f"not added: {problem}"), err=True)
    called, card = name or folder.resolve().name, result.gallery.card
    before = int(result.gallery.counts[card.classes.index(called)]) - result.added
    click.echo(
        f"{amount(result.added, 'image')} added as {_printable(repr(called))}, "
        f"{f'a class that had {before:,}' if before else 'a new class'}; the gallery has "
        f"{amount(len(card.classes), 'class', 'classes')}, and its threshold stays {card.threshold:.4f}"
    )
    if result.problems:
        ctx.exit(1)


@gallery.command(
    epilog="Example: animesion gallery whiten --checkpoint runs/a --data faces/ --out whitened.safetensors"
)
@checkpoint_option
@click.option("--data", required=True, help="A built dataset, class folders, or label CSVs.")
@click.option("--images", type=click.Path(path_type=Path), help="With label CSVs: root of their paths.")
@click.option("--split", default="train", show_default=True, help="Split to fit it on.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Weights file to write.")
@click.option(
    "--tta",
    "views",
    type=click.Choice(["none", "flip", "crops"]),
    default="flip",
    show_default=True,
    help="Views of an image whose embeddings are averaged.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
def whiten(checkpoint: Path, data: str, images: Path | None, split: str, out: Path, views: TTA, device: str) -> None:
    """Write weights whose embeddings are whitened on the classes in DATA, best those of the training.

    Directions in which images of one class differ weigh less, so that new classes differ more clearly. The logits
    stay, and so does the network; build galleries with the new file.
    """
    from animesion.cli.progress import for_main_process
    from animesion_training.cli.requirements import check_exists, torch_required

    check_exists(checkpoint, data)
    with torch_required():
        import torch  # noqa: F401  # what is missing is said here

        from animesion_training import api

    with for_main_process() as progress:
        card = api.whiten(
            checkpoint, data, out, images=images, split=split, tta=views, device=device, progress=progress
        )
    facts = card.facts["whitening"]
    click.echo(
        f"whitened on {amount(facts['images'], 'image')} of the split {facts['split']}; written to {out}: animesion "
        f"gallery build --checkpoint {out}"
    )


@gallery.command(epilog="Example: animesion gallery show holo.gallery")
@click.argument("file", metavar="GALLERY", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def show(file: Path, as_json: bool) -> None:
    """List the classes of GALLERY, with their numbers of images, and its threshold."""
    import json

    from animesion_training.cli.requirements import torch_required

    with torch_required():
        from animesion_training.eval import gallery as galleries

    found = galleries.load(file)
    if as_json:
        click.echo(json.dumps(_facts(found, None, file, 0), ensure_ascii=False))
        return
    _print(found, None)
    for name, count in zip(found.card.classes, found.counts.tolist(), strict=True):
        click.echo(f"{name}: {count:,}")


def _facts(built: Gallery, fit: Fit | None, path: Path, problems: int) -> dict[str, Any]:
    card = built.card
    facts: dict[str, Any] = {
        "gallery": str(path),
        "network": card.network,
        "digest": card.digest,
        "images": len(card.images),
        "classes": dict(zip(card.classes, built.counts.tolist(), strict=True)),
        "threshold": card.threshold,
        "rule": card.rule,
        "fitted": card.fitted,
    }
    if fit is not None:
        facts |= {"fit_images": fit.images, "recognised": fit.recognised, "auroc": fit.auroc}
    return facts | ({"problems": problems} if problems else {})


def _print(built: Gallery, fit: Fit | None) -> None:
    card = built.card
    click.echo(f"{len(card.images):,} images of {len(card.classes):,} classes, {card.network} {card.digest[:12]}")
    fitted = f", fitted on {card.fitted}" if card.fitted else ""
    click.echo(f"an image is unknown below a similarity of {card.threshold:.4f} ({card.rule}{fitted})")
    if fit is not None and fit.recognised is not None and fit.auroc is not None:
        click.echo(f"there, {fit.recognised:.1%} of images of known classes get their name; AUROC {fit.auroc:.1%}")


def _printable(text: str) -> str:
    from animesion.cli.detect import printable

    return printable(text)
