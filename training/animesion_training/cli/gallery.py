"""`animesion gallery`: build a gallery of known characters, add to it, and list it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from animesion_training.cli.checkpoint import checkpoint_option, moved_checkpoint_option
from animesion_training.cli.images import face_crop, face_options

if TYPE_CHECKING:
    from animesion_training.eval.gallery import Fit, Gallery
    from animesion_training.eval.identify import ImageEmbedder
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
    detector: str,
    margin: float,
    min_score: float,
    all_faces: bool,
    or_whole: bool,
    settings: tuple[str, ...],
    device: str,
    as_json: bool,
) -> None:
    """Write a gallery of the images in DATA, with the embeddings that the network gives them.

    The threshold of unknown images is fitted on images whose own class is left out, so best on a split whose classes
    the network was not trained on. With --detector, the faces that it finds are taken; images of faces need none.
    """
    import json
    import os

    import numpy as np

    from animesion.errors import UsageError
    from animesion_training.cli.requirements import check_exists, torch_required

    check_exists(checkpoint, data, *filter(None, (fit_data,)))
    if threshold is not None and (fit_data or fit_split):
        raise click.UsageError("--threshold is given, so nothing is fitted: leave --fit-data and --fit-split out")
    faces = face_crop(detector, margin, min_score, all_faces, or_whole, settings)
    with torch_required():
        from animesion_training.data import open_data
        from animesion_training.distributed import distributed_context
        from animesion_training.eval import gallery as galleries
        from animesion_training.eval.identify import ImageEmbedder

    opened = open_data(data, images=images)
    present = [name for name, samples in opened.splits.items() if len(samples)]
    chosen = splits or (("train",) if "train" in present else tuple(present[:1]))
    problems: list[str] = []
    with distributed_context(device) as context:
        if context.world_size > 1:
            raise UsageError("a gallery is built by one process: start it without torchrun")
        embedder = ImageEmbedder(checkpoint, context, views)
        parts = [_embedded(embedder, opened, split, faces, problems) for split in chosen]
        vectors, names, keys = (
            np.concatenate([part[0] for part in parts]),
            [name for part in parts for name in part[1]],
            [key for part in parts for key in part[2]],
        )
        if not names:
            raise UsageError(f"no image of {data} can be used: {problems[0] if problems else 'its splits are empty'}")
        classes = tuple(name for name in opened.classes if name in set(names))
        ids = {name: i for i, name in enumerate(classes)}
        card = galleries.GalleryCard(
            network=embedder.card.name,
            digest=embedder.digest,
            weights=os.path.relpath(checkpoint, out.parent),
            img_size=embedder.size,
            crop_pct=embedder.card.crop_pct,
            views=views,
            classes=classes,
            images=tuple(keys),
            threshold=-1.0 if threshold is None else threshold,
            rule="given",
            fitted="",
        )
        built = galleries.Gallery(card, vectors, np.array([ids[name] for name in names], dtype=np.int64))
        fit = None
        if threshold is None:
            source = open_data(fit_data, images=images) if fit_data else opened
            where = fit_split or ("val" if "val" in source.splits and len(source.splits["val"]) else "")
            if fit_data and not where:
                raise UsageError(f"--fit-data {fit_data} has no split 'val': name one of {', '.join(source.splits)}")
            if not where or (not fit_data and where in chosen):
                inside = np.arange(len(vectors), dtype=np.int64)
                fit = galleries.fit_threshold(
                    built, vectors, names, "the gallery itself", false_accept=false_accept, inside=inside
                )
            else:
                others, other_names, _ = _embedded(embedder, source, where, faces, problems)
                fit = galleries.fit_threshold(built, others, other_names, where, false_accept=false_accept)
            built = _with_threshold(built, fit)
    galleries.save(built, out)
    for problem in problems:
        click.echo(_printable(problem), err=True)
    if as_json:
        click.echo(json.dumps(_facts(built, fit, out, len(problems)), ensure_ascii=False))
        return
    _print(built, fit)
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
    detector: str,
    margin: float,
    min_score: float,
    all_faces: bool,
    or_whole: bool,
    settings: tuple[str, ...],
    device: str,
) -> None:
    """Add the images in FOLDER to GALLERY as one character, without training.

    The exit status is 1 when an image cannot be read, or has no face; the others are added.
    """
    import numpy as np

    from animesion.cli.progress import counted
    from animesion.errors import UsageError
    from animesion.images import given
    from animesion_training.cli.requirements import check_exists, torch_required

    check_exists(file, folder)
    faces = face_crop(detector, margin, min_score, all_faces, or_whole, settings)
    if all_faces:
        raise click.UsageError("--all-faces would add other characters under this name: leave it out")
    with torch_required():
        from animesion_training.distributed import distributed_context
        from animesion_training.eval import gallery as galleries
        from animesion_training.eval.identify import embedder_of
        from animesion_training.eval.pieces import load_detector, pieces

    known = galleries.load(file)
    if folder.is_dir() and (below := sorted(each.name for each in folder.iterdir() if each.is_dir())):
        raise UsageError(
            f"{folder} has folders in it, such as {below[0]!r}, and is added as one character: give one at a time, or "
            "build a gallery of all with `animesion gallery build`"
        )
    called = name or folder.resolve().name
    found = []
    with distributed_context(device) as context:
        embedder = embedder_of(known, file, checkpoint, context)
        loaded = load_detector(faces)
        cut = (piece for image in given.from_files([folder]) for piece in pieces(image, loaded, faces))
        for each in counted(embedder(cut), "add"):
            if each.vector is None:
                click.echo(_printable(f"{each.piece.name}: not added ({each.problem})"), err=True)
            found.append(each)
    good = [each for each in found if each.vector is not None]
    if not good:
        raise UsageError(f"no image in {folder} can be used: the gallery stays as it was")
    vectors = np.stack([each.vector for each in good if each.vector is not None])
    new = called not in known.card.classes
    grown = known.add(vectors, [called] * len(good), [Path(each.piece.name).name for each in good])
    galleries.save(grown, out or file)
    what = "a new class" if new else f"a class that had {int(known.counts[known.card.classes.index(called)]):,}"
    click.echo(
        f"{len(good):,} images added as {_printable(called)!r}, {what}; the gallery has {len(grown.card.classes):,} "
        f"classes, and its threshold stays {grown.card.threshold:.4f}"
    )
    if len(good) < len(found):
        ctx.exit(1)


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


def _embedded(
    embedder: ImageEmbedder, data: Any, split: str, faces: Any, problems: list[str]
) -> tuple[Any, list[str], list[str]]:
    """Embeddings (M, D), classes and names of the images of a split, or of the faces in them."""
    if faces is not None:
        found: tuple[Any, list[str], list[str]] = embedder.faces(data, split, faces, problems=problems)
        return found
    each = embedder.split(data, split)
    return each.vectors, [data.classes[i] for i in each.labels.tolist()], list(each.keys)


def _with_threshold(built: Gallery, fit: Fit) -> Gallery:
    from dataclasses import replace

    threshold = fit.threshold
    card = replace(built.card, threshold=threshold.value, rule=threshold.rule, fitted=threshold.split)
    return replace(built, card=card)


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
