"""`animesion explain`: what a network looks at, what it gets wrong, and what it finds similar."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from animesion.wording import amount

if TYPE_CHECKING:
    from animesion_training.analysis.explain import Explained, Explainer
    from animesion_training.analysis.explain_page import Distances, PageData
    from animesion_training.analysis.layers import LayerSimilarity
    from animesion_training.analysis.neighbours import Neighbours
    from animesion_training.analysis.predictions import Predictions
    from animesion_training.data import DataSplits
    from animesion_training.distributed import DistributedContext
    from animesion_training.weights import WeightsCard

_EXAMPLES = """\b
Examples:
  animesion explain runs/first image.jpg --data datasets/daf-re-sample --out why.html
  animesion explain runs/first --data datasets/daf-re-sample --split test --out test.html --csv test.csv
  animesion explain runs/first --data datasets/daf-re-sample --compare runs/second --out layers.html
"""
_SHEETS = (".png", ".jpg", ".jpeg")

#: Side of the thumbnails of a map in pixels, by the number of images from which on they are smaller.
_THUMBNAILS = ((0, 64), (5000, 40))


@click.command(epilog=_EXAMPLES)
@click.argument("checkpoint", metavar="RUN|FILE", type=click.Path(path_type=Path))
@click.argument("paths", metavar="[IMAGES]...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--data", help="A built dataset, class folders, or label CSVs.")
@click.option("--images", type=click.Path(path_type=Path), help="With label CSVs: root of their paths.")
@click.option(
    "--split",
    "splits",
    multiple=True,
    help="Without IMAGES: split to explain; may be repeated, further ones are on the map only.  [default: test]",
)
@click.option("--out", type=click.Path(path_type=Path), help="Page to write (.html), or rows as an image (.png, .jpg).")
@click.option(
    "--csv", "table", type=click.Path(path_type=Path), help="Write the prediction for each image of the split."
)
@click.option(
    "--method",
    type=click.Choice(["auto", "selection", "rollout", "gradcam", "layercam"]),
    default="auto",
    show_default=True,
    help="How maps are computed; auto takes the one that fits the network, and says which.",
)
@click.option("--target", metavar="CLASS", help="Class that maps are of.  [default: the first guess]")
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="Guesses per image.")
@click.option(
    "--neighbours",
    type=click.IntRange(0, 20),
    default=4,
    show_default=True,
    help="With --data: similar training images.",
)
@click.option("--train-split", default="train", show_default=True, help="Split of the similar training images.")
@click.option(
    "--limit",
    type=click.IntRange(1, 2000),
    default=48,
    show_default=True,
    help="Explained images; without IMAGES, the most confident wrong predictions.",
)
@click.option("--map/--no-map", "with_map", default=True, show_default=True, help="Map of the embeddings (t-SNE).")
@click.option(
    "--compare", type=click.Path(path_type=Path), help="With --data: run or weights whose layers are compared (CKA)."
)
@click.option(
    "--side", type=click.IntRange(32, 1024), default=128, show_default=True, help="For .png, .jpg: side of a panel."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.pass_context
def explain(
    ctx: click.Context,
    checkpoint: Path,
    paths: tuple[Path, ...],
    data: str | None,
    images: Path | None,
    splits: tuple[str, ...],
    out: Path | None,
    table: Path | None,
    method: str,
    target: str | None,
    top: int,
    neighbours: int,
    train_split: str,
    limit: int,
    with_map: bool,
    compare: Path | None,
    side: int,
    device: str,
) -> None:
    """Show what a network looks at in IMAGES, or what it gets wrong in a split of --data.

    Each image is shown with a map of what the network looks at, its guesses, and the most similar training images. A
    page of a split has the wrong predictions by pair of classes, a map of all embeddings, the similarity of classes,
    attention distances of a transformer, and with --compare the similarity of layers.

    The exit status is 1 when an image cannot be read.
    """
    from animesion.errors import UsageError
    from animesion_training.cli.requirements import check_exists, torch_required

    check_exists(checkpoint, *paths, *(place for place in (data, compare) if place))
    _check_options(paths, data, splits, out, table, compare)
    with torch_required():
        from animesion_training.analysis.explain import Explainer, sheet
        from animesion_training.analysis.explain_page import PageData
        from animesion_training.data import open_data
        from animesion_training.distributed import distributed_context
        from animesion_training.eval import evaluate
        from animesion_training.weights import load_model

    model, card = load_model(checkpoint)
    with distributed_context(device) as context:
        if context.world_size > 1:
            raise UsageError("explain runs in one process: start it without torchrun")
        model = model.to(context.device)
        if card.is_tagger and not paths:
            raise UsageError(f"{checkpoint} is of tags, and a page of a split is of classes: give IMAGES to explain")
        known = None if card.is_tagger else card.classes or None
        opened = None if data is None else open_data(data, images=images, classes=known)
        if opened is not None and not paths:
            evaluate.check_classes(card, opened, str(checkpoint))
            evaluate.check_trained(card, opened, (splits or ("test",))[0])
        explainer = None
        if out is not None:
            explainer = Explainer(model, card, context, method=method, target=target, top=top)
            click.echo(f"maps by {explainer.reason}", err=True)
            explainer.neighbours = _neighbours(model, card, opened, train_split, neighbours, context)
        title = (
            checkpoint.resolve().name
            if checkpoint.is_dir()
            else f"{checkpoint.resolve().parent.name}/{checkpoint.name}"
        )
        about = "" if paths or data is None else f"{', '.join(splits or ('test',))} of {data}"
        page = PageData(title, f"{card.name}, {card.img_size} px", about, explainer.reason if explainer else "")
        rows: list[Explained] = []
        if paths:
            assert explainer is not None
            rows = _rows(explainer, paths, limit)
            page.rows(rows)
        else:
            assert opened is not None
            found = _predictions(model, card, opened, splits or ("test",), top, context, out, with_map)
            if table is not None:
                _write(table, found[0].to_csv().encode("utf-8", "backslashreplace"))
                click.echo(f"{len(found[0]):,} predictions in {table}")
            if explainer is not None:
                rows = _mistakes(explainer, opened, found[0], limit, page)
                _split_parts(page, found, model, card, opened, compare, with_map, context)
        if out is None:
            return
        if not any(not row.problem for row in rows) and (paths or out.suffix.lower() in _SHEETS):
            if paths:
                raise UsageError("none of the paths is a readable image")
            raise UsageError("all images of the split are predicted as labelled, so there is nothing to draw")
        content = _image(sheet(rows, side), out) if out.suffix.lower() in _SHEETS else _page(page)
        _write(out, content)
    count = sum(not row.problem for row in rows)
    what = amount(count, "image")
    if not paths:
        what = f"{count:,} of {len(found[0].wrong):,} wrong predictions"
        what += " (--limit)" * (len(rows) < len(found[0].wrong))
    click.echo(f"{what} explained in {out}")
    for row in rows:
        if row.problem:
            click.echo(_printable(f"{row.name}: not explained ({row.problem})"), err=True)
    if any(row.problem for row in rows):
        ctx.exit(1)


def _check_options(
    paths: tuple[Path, ...],
    data: str | None,
    splits: tuple[str, ...],
    out: Path | None,
    table: Path | None,
    compare: Path | None,
) -> None:
    from animesion.errors import UsageError

    if out is None and table is None:
        raise click.UsageError("give --out for a page or an image, or --csv for a table of predictions")
    if out is not None and out.suffix.lower() not in (".html", *_SHEETS):
        raise UsageError(f"{out}: give an --out that ends in .html, .png or .jpg")
    if not paths and data is None:
        raise click.UsageError("give IMAGES to explain, or --data for a split")
    if paths and (splits or table or compare):
        raise click.UsageError("--split, --csv and --compare are for a split of --data: leave IMAGES out")
    if compare and (out is None or out.suffix.lower() != ".html"):
        raise click.UsageError("--compare needs a page: give an --out that ends in .html")


def _neighbours(
    model: Any, card: WeightsCard, data: DataSplits | None, split: str, count: int, context: DistributedContext
) -> Neighbours | None:
    from animesion.cli.progress import one_task
    from animesion.errors import UsageError
    from animesion_training.analysis.neighbours import Neighbours

    if data is None or not count:
        return None
    if split not in data.splits or not len(data.splits[split]):
        click.echo(f"note: {data.path} has no split '{split}', so no similar training images are shown", err=True)
        return None
    try:
        with one_task("training images", len(data.splits[split])) as shown:
            return Neighbours.of_split(model, card, data, split, context, count=count, advance=shown.advanced)
    except UsageError as error:
        click.echo(_printable(f"note: no similar training images are shown: {error}"), err=True)
        return None


def _rows(explainer: Explainer, paths: tuple[Path, ...], limit: int) -> list[Explained]:
    from itertools import islice

    from animesion.cli.progress import counted
    from animesion.images import given
    from animesion_training.eval.pieces import Piece

    found = given.from_files(paths)
    pieces = (Piece(each.name, each.content, each.problem) for each in islice(found, limit))
    rows = list(counted(explainer(pieces), "explain"))
    if next(found, None) is not None:
        click.echo(f"note: only the first {limit:,} images are explained: raise --limit for more", err=True)
    return rows


def _predictions(
    model: Any,
    card: WeightsCard,
    data: DataSplits,
    splits: tuple[str, ...],
    top: int,
    context: DistributedContext,
    out: Path | None,
    with_map: bool,
) -> list[Predictions]:
    from animesion.cli.progress import one_task
    from animesion_training.analysis.predictions import predict_split

    mapped = out is not None and out.suffix.lower() == ".html" and with_map
    total = sum(len(data.select(split)) for split in splits)
    side = [pixels for least, pixels in _THUMBNAILS if total >= least][-1] if mapped else 0
    found = []
    for split in dict.fromkeys(splits):
        with one_task(f"predict {split}", len(data.select(split))) as shown:
            found.append(
                predict_split(model, card, data, split, context, top=top, thumbnails=side, advance=shown.advanced)
            )
    return found


def _mistakes(
    explainer: Explainer, data: DataSplits, found: Predictions, limit: int, page: PageData
) -> list[Explained]:
    """Explain the most confident wrong predictions, and add them to the page."""
    from animesion.cli.progress import counted
    from animesion_training.eval.pieces import Piece

    samples = data.select(found.split)
    place = {key: i for i, key in enumerate(samples.keys)}
    chosen = found.wrong[:limit].tolist()
    pieces = [Piece(found.keys[i], bytes(samples.read(place[found.keys[i]]))) for i in chosen]
    labels = [found.classes[found.labels[i]] for i in chosen]
    rows = list(counted(explainer(pieces, labels), "explain"))
    by_place = dict(zip(chosen, rows, strict=True))
    page.mistakes(found, by_place.get, limit)
    return rows


def _split_parts(
    page: PageData,
    found: list[Predictions],
    model: Any,
    card: WeightsCard,
    data: DataSplits,
    compare: Path | None,
    with_map: bool,
    context: DistributedContext,
) -> None:
    """Add the map, the classes and the layers."""
    import numpy as np

    from animesion_training.analysis.class_similarity import class_similarity
    from animesion_training.analysis.embedding_map import tsne

    page.classes(class_similarity(found[0]), found[0].classes)
    vectors = np.concatenate([part.vectors for part in found])
    if with_map and not vectors.shape[1]:
        click.echo("note: the network has no embeddings, so there is no map of them", err=True)
    elif with_map and len(vectors) >= 4 and found[0].thumbnails.shape[1]:
        click.echo(f"placing {len(vectors):,} embeddings", err=True)
        page.map(found, tsne(vectors), "t-SNE of the input of the last layer")
    cka, other = _compared(model, card, data, found[0].split, compare, context)
    page.layers(cka, card.name, other, _distances(model, card, data, found[0].split, context))


def _compared(
    model: Any, card: WeightsCard, data: DataSplits, split: str, compare: Path | None, context: DistributedContext
) -> tuple[LayerSimilarity | None, str]:
    from animesion.cli.progress import one_task
    from animesion_training.analysis.layers import layer_similarity
    from animesion_training.weights import load_model

    if compare is None:
        return None, ""
    other, other_card = load_model(compare)
    with one_task("layers", len(data.select(split))) as shown:
        pair = (model, card), (other.to(context.device), other_card)
        return layer_similarity(*pair, data, split, context, advance=shown.advanced), other_card.name


def _distances(
    model: Any, card: WeightsCard, data: DataSplits, split: str, context: DistributedContext
) -> Distances | None:
    from animesion.errors import UsageError
    from animesion_training.analysis.explain_page import Distances
    from animesion_training.analysis.layers import mean_attention_distance

    most = min(256, len(data.select(split)))
    try:
        values = mean_attention_distance(model, card, data, split, context, most=most)
    except UsageError:  # no transformer with attention over all patches
        return None
    assert isinstance(card.img_size, int)
    return Distances(values, card.img_size, most)


def _page(page: PageData) -> bytes:
    from animesion.report.page import render

    return render(page.json).encode("utf-8", "replace")


def _image(drawn: Any, out: Path) -> bytes:
    import io

    content = io.BytesIO()
    drawn.save(content, "PNG" if out.suffix.lower() == ".png" else "JPEG", quality=90)
    return content.getvalue()


def _write(path: Path, content: bytes) -> None:
    from animesion.storage.workspace import write_atomic

    write_atomic(path, content)


def _printable(text: str) -> str:
    from animesion.cli.detect import printable

    return printable(text)
