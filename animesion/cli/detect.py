"""`animesion detect`: the boxes of a detector in image files, and how far detectors agree."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from animesion.errors import UsageError
from animesion.wording import amount

if TYPE_CHECKING:
    from animesion.detectors.scan import Scanned

_EXAMPLES = """\b
Examples:
  animesion detect images/ --detector lbp --format csv --out boxes.csv --sheet boxes.html
  animesion detect images/ --compare lbp,onnx:faces.onnx --sheet differences.png
"""

_SHOWN = 120


@click.command(epilog=_EXAMPLES)
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--detector", help="NAME or NAME:FILE; several with commas: boxes that they agree on. [default: anime]")
@click.option("--compare", default="", metavar="NAME,NAME...", help="Compare these detectors instead.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Option of the detector, or of NAME.KEY.")
@click.option("--min-score", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="Lowest score of a box.")
@click.option(
    "--iou", type=click.FloatRange(0, 1), default=0.3, show_default=True, help="Overlap of boxes that are the same."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["json", "csv", "coco", "yolo"]),
    help="Form of the boxes; json has one line per image.  [default: json, a table with --compare]",
)
@click.option("--kind", default="face", show_default=True, help="What the boxes are, in the output.")
@click.option("--out", type=click.Path(path_type=Path), help="File to write; a folder for yolo.  [default: stdout]")
@click.option(
    "--sheet", type=click.Path(path_type=Path), help="Also write a contact sheet: .png, .jpg, .webp or .html."
)
@click.option(
    "--sheet-images", type=click.IntRange(1, 5000), default=_SHOWN, show_default=True, help="Most images on the sheet."
)
@click.pass_context
def detect(
    ctx: click.Context,
    paths: tuple[Path, ...],
    detector: str | None,
    compare: str,
    settings: tuple[str, ...],
    min_score: float,
    iou: float,
    form: str | None,
    kind: str,
    out: Path | None,
    sheet: Path | None,
    sheet_images: int,
) -> None:
    """Find boxes in PATHS (images, or folders of images).

    Boxes are in pixels of the upright image: left, top, right, bottom. With --compare, print how far detectors agree;
    the sheet then shows the images where they differ most. The exit status is 1 when an image cannot be read.
    """
    from animesion import detectors
    from animesion.cli.progress import counted
    from animesion.dataset import box_tables
    from animesion.detectors import scan, sheets

    if compare and detector:
        raise click.UsageError("give --detector or --compare, one of them")
    chosen = compare or ("anime" if detector is None else detector)
    names = [name.strip() for name in chosen.split(",") if name.strip()]
    if not names:
        raise click.UsageError(f"--detector names none; there are {', '.join(detectors.names())}")
    if compare and (out or form not in (None, "json") or len(names) < 2):
        raise click.UsageError(
            "--compare takes two or more detectors, prints a table or --format json, and has no --out"
        )
    as_json, form = form == "json", form or "json"
    if form == "yolo" and not out:
        raise click.UsageError("--format yolo writes a folder: give --out DIR")
    if sheet:
        sheets.check(sheet)
    made = load(names, settings, iou, together=not compare)
    seen: list[Scanned] = []
    stream = form == "json" and not out and not compare
    for each in counted(scan.scan(paths, made, min_score), "detect", prints=stream):
        if each.problem:
            if not each.no_image:
                click.echo(printable(f"{each.name}: {each.problem}"), err=True)
        elif stream:
            click.echo(box_tables.line(_image_boxes(each, kind)))
        seen.append(each)
    good = [each for each in seen if not each.problem]
    if not good:
        raise UsageError(f"no image was found in {', '.join(map(str, paths[:3]))}")
    others = sum(each.no_image for each in seen)
    if compare:
        _compare(good, list(made), iou, as_json=as_json)
    elif form == "yolo" and out:
        box_tables.write_yolo([_image_boxes(each, kind) for each in good], out)
    elif not stream:
        text = box_tables.text((_image_boxes(each, kind) for each in good), form)
        if out:
            from animesion.storage.workspace import write_atomic

            out.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(out, text.encode())
        else:
            click.echo(text, nl=False)
    if not compare:
        counts = [len(boxes) for each in good for boxes in each.boxes.values()]
        spent = sum(sum(each.seconds.values()) for each in good)
        click.echo(
            f"{len(good):,} images: {counts.count(0):,} without a box, {counts.count(1):,} with one, "
            f"{sum(count > 1 for count in counts):,} with several; {1000 * spent / len(good):.0f} ms per image",
            err=True,
        )
    if others:
        click.echo(amount(others, "file is no image", "files are no images"), err=True)
    if sheet:
        _sheet(sheet, good, list(made), iou, sheet_images)
    if any(each.problem and not each.no_image for each in seen):
        ctx.exit(1)


def printable(text: str) -> str:
    """Replace control characters: names are untrusted and may hold escape sequences of the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def load(names: Sequence[str], settings: Sequence[str], iou: float, *, together: bool) -> Mapping[str, Any]:
    """Create detectors by name.

    Args:
        names: as in `crop.detector`.
        settings: `KEY=VALUE` of one detector, `NAME.KEY=VALUE` of several.
        iou: overlap of boxes on which several agree.
        together: whether several names are one detector.
    """
    from animesion import detectors
    from animesion.config.settings import apply

    options: dict[str, Any] = {}
    for setting in settings:
        apply(options, setting)
    if any(detectors.name_of(name) == "boxes" for name in names):
        raise UsageError("the detector 'boxes' needs the boxes of a source, which single images do not have")
    if len(names) == 1:
        return {names[0]: detectors.load(names[0], options)}
    if together:
        return {",".join(names): detectors.load(names, options, agreement=iou)}
    options_of = detectors.options_by_detector(names, options)
    return {name: detectors.load(name, options_of[name]) for name in names}


def _image_boxes(each: Scanned, kind: str) -> Any:
    from animesion.dataset.box_tables import ImageBoxes, KindBox

    [boxes] = each.boxes.values()
    return ImageBoxes(each.name, each.sha256, each.width, each.height, tuple(KindBox(box, kind) for box in boxes))


def _compare(seen: Sequence[Scanned], names: Sequence[str], iou: float, *, as_json: bool) -> None:
    from animesion.detectors import evaluation

    found = {name: [each.boxes[name] for each in seen] for name in names}
    pairs = evaluation.agreements(found, iou)
    facts = []
    for name in names:
        counts = [len(boxes) for boxes in found[name]]
        milliseconds = 1000 * sum(each.seconds[name] for each in seen) / len(seen)
        several = sum(count > 1 for count in counts)
        facts.append([sum(counts), counts.count(0), counts.count(1), several, round(milliseconds, 1)])
    if as_json:
        keys = ("boxes", "images_without", "images_with_one", "images_with_several", "ms_per_image")
        document = {
            "images": len(seen),
            "iou": iou,
            "detectors": [
                {"name": name, **dict(zip(keys, row, strict=True))} for name, row in zip(names, facts, strict=True)
            ],
            "pairs": [pair.to_dict() for pair in pairs],
        }
        click.echo(json.dumps(document, indent=1))
        return
    width = max(8, *map(len, names))
    click.echo(f"{len(seen):,} images")
    click.echo(f"{'detector':<{width}}  {'boxes':>7}  {'none':>6}  {'one':>6}  {'several':>7}  {'ms':>6}")
    for name, row in zip(names, facts, strict=True):
        click.echo(f"{name:<{width}}  {row[0]:>7,}  {row[1]:>6,}  {row[2]:>6,}  {row[3]:>7,}  {row[4]:>6}")
    click.echo(f"\nboxes that overlap by {iou:g} or more are the same")
    for pair in pairs:
        share = "-" if pair.agreement is None else f"{100 * pair.agreement:.1f}%"
        click.echo(
            f"{pair.first} and {pair.second}: {pair.both:,} of {sum(pair.boxes) - pair.both:,} different boxes are of "
            f"both ({share}, mean overlap {pair.iou:.2f}); {pair.images:,} images have equal boxes"
        )


def _sheet(path: Path, seen: Sequence[Scanned], names: Sequence[str], iou: float, most: int) -> None:
    """Write the sheet: evenly spaced images, or those where detectors differ most."""
    from animesion.detectors import sheets

    chosen = [seen[i] for i in sheets.evenly(len(seen), most)]
    if len(names) > 1:
        chosen = sorted(seen, key=lambda each: (-_differences(each, names, iou), each.name))[:most]
    cells = []
    for each in chosen:
        marks = tuple(
            sheets.Mark(box, sheets.COLOURS[i % len(sheets.COLOURS)], f"{box.score:.2f}")
            for i, name in enumerate(names)
            for box in each.boxes[name]
        )
        counts = ", ".join(str(len(each.boxes[name])) for name in names)
        cells.append(sheets.Cell(each.path, f"{each.name}\n{counts} {'box' if counts == '1' else 'boxes'}", marks))
    legend = [(sheets.COLOURS[i % len(sheets.COLOURS)], name) for i, name in enumerate(names)]
    sheets.write(path, cells, legend)
    click.echo(f"{path} shows {len(cells):,} of {len(seen):,} images", err=True)


def _differences(each: Scanned, names: Sequence[str], iou: float) -> int:
    """Number of boxes of one detector that another does not have."""
    from animesion.detectors.evaluation import agreements

    pairs = agreements({name: [each.boxes[name]] for name in names}, iou)
    return sum(sum(pair.boxes) - 2 * pair.both for pair in pairs)
