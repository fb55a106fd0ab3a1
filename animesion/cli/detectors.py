"""`animesion detectors`: list the detectors, install the model files that some of them need, and evaluate one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from animesion.cli.installing import install_command
from animesion.errors import UsageError
from animesion.wording import amount

if TYPE_CHECKING:
    from animesion.detectors.evaluation import Judged
    from animesion.detectors.scan import Scanned


@click.group(invoke_without_command=True, epilog="Example: animesion detectors")
@click.pass_context
def detectors(ctx: click.Context) -> None:
    """List the detectors, and whether they are ready to use.

    Their names are values of the recipe key `crop.detector` and of `predict --detector`.
    """
    if ctx.invoked_subcommand:
        return
    from animesion import detectors as installed
    from animesion import model_files

    width = max(map(len, installed.names()))
    for name in installed.names():
        hint = model_files.setup_hint(name)
        click.echo(f"{name:<{width}}  {'missing' if hint else 'ready':<7}  {installed.summary(name)}")
        if hint:
            click.echo(f"{'':<{width}}  {hint}")


detectors.add_command(install_command("detector", "lbp --from lbpcascade_animeface.xml"))


@detectors.command("eval", epilog="Example: animesion detectors eval images/ --boxes labels.csv --detector lbp")
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--boxes",
    "file",
    required=True,
    type=click.Path(path_type=Path),
    help="Labelled boxes: a table, JSON, COCO's JSON, or a folder of YOLO's.",
)
@click.option(
    "--detector",
    default="anime",
    show_default=True,
    help="NAME or NAME:FILE; several with commas: boxes that they agree on.",
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Option of the detector, or of NAME.KEY.")
@click.option("--min-score", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="Lowest score of a box.")
@click.option(
    "--iou", type=click.FloatRange(0.01, 1), default=0.5, show_default=True, help="Overlap of a box that is found."
)
@click.option("--ignore", multiple=True, metavar="KIND", help="Kind or flag that need not be found; may be repeated.")
@click.option(
    "--sheet", type=click.Path(path_type=Path), help="Contact sheet of the mistakes: .png, .jpg, .webp or .html."
)
@click.option("--sheet-images", type=click.IntRange(1, 5000), default=240, show_default=True, help="Most images on it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(
    paths: tuple[Path, ...],
    file: Path,
    detector: str,
    settings: tuple[str, ...],
    min_score: float,
    iou: float,
    ignore: tuple[str, ...],
    sheet: Path | None,
    sheet_images: int,
    as_json: bool,
) -> None:
    """Measure recall, precision and average precision on labelled images.

    PATHS are the images, or folders of images; by default the folder of the labels. Images are found by the digest of
    their bytes if the labels have digests, else by their path. Images without labels are passed over.
    """
    from animesion.cli.detect import load, printable
    from animesion.cli.progress import counted
    from animesion.dataset import box_tables
    from animesion.detectors import evaluation, scan, sheets

    if sheet:
        sheets.check(sheet)
    labels = scan.Labels(box_tables.read(file))
    known = {name for image in labels.images for each in image.boxes for name in (each.kind, *each.flags)}
    if unknown := sorted(set(ignore) - known):
        raise UsageError(f"--ignore {unknown[0]}: {file} has {', '.join(sorted(known - {''})) or 'no kinds'}")
    names = [name.strip() for name in detector.split(",") if name.strip()]
    made = load(names, settings, iou, together=True)
    judged: list[tuple[Scanned, Judged]] = []
    used: set[int] = set()
    without = unread = copies = 0
    seconds = 0.0
    scanned = scan.scan(paths or (file if file.is_dir() else file.parent,), made, wanted=labels)
    for each in counted(scanned, "eval"):
        if each.problem:
            without += each.problem == scan.NO_LABELS and not each.no_image
            if each.problem != scan.NO_LABELS and not each.no_image:
                unread += 1
                click.echo(printable(f"{each.name}: {each.problem}"), err=True)
            continue
        of = labels.of(each.name, each.sha256)
        assert of is not None
        if id(of) in used:  # the same bytes, or a path that fits twice
            copies += 1
            continue
        scan.check_size(each, of)
        used.add(id(of))
        [boxes] = each.boxes.values()
        seconds += sum(each.seconds.values())
        judged.append((each, evaluation.judge(boxes, of.boxes, ignore, iou, each.width, each.height)))
    if not judged:
        raise UsageError(f"{file} labels none of the images: give their folder, or check the digests and paths")
    missing = len(labels.images) - len(used)
    for count, what in (
        (without, "without labels passed over"),
        (missing, "with labels not found"),
        (copies, "whose entry labels another already passed over"),
    ):
        if count:
            click.echo(f"{amount(count, 'image')} {what}", err=True)
    of_images = [each for _, each in judged]
    _print_evaluation(of_images, detector, min_score, iou, 1000 * seconds / len(judged), as_json=as_json)
    if sheet:
        _mistakes(sheet, judged, min_score, sheet_images)
    if missing or unread:
        raise SystemExit(1)


def _print_evaluation(
    images: Sequence[Judged], detector: str, min_score: float, iou: float, milliseconds: float, *, as_json: bool
) -> None:
    from animesion.cli.detect import printable
    from animesion.detectors import evaluation, matching

    rows = evaluation.rows(images, min_score)
    recalls = evaluation.recalls(images, min_score)
    points = evaluation.operating_points(images)
    ignored = sum(sum(image.ignored) for image in images)
    if as_json:
        document = {
            "detector": detector,
            "images": len(images),
            "iou": iou,
            "min_score": min_score,
            "ignored": ignored,
            "rows": [row.to_dict() for row in rows],
            "recall_by_kind": {name: {"found": a, "truth": b} for name, (a, b) in recalls.items()},
            "operating_points": [
                {"precision": p, "min_score": s, "found": f, "right": r, "boxes": b}
                for p, (s, f, r, b) in points.items()
            ],
            "ms_per_image": round(milliseconds, 1),
        }
        click.echo(json.dumps(document, indent=1, ensure_ascii=False))
        return
    truth = rows[0].truth
    click.echo(
        f"{detector}: {len(images):,} images, {truth:,} boxes, {ignored:,} ignored; overlap of at least {iou:g}, "
        f"score of at least {min_score:g}, 95% intervals; {milliseconds:.0f} ms per image"
    )
    click.echo(f"{'':<10}  {'boxes':>6}  {'recall':<22}  {'precision':<22}  {'AP':>5}")
    for row in rows:
        recall, precision = matching.percent(row.found, row.truth), matching.percent(row.right, row.boxes)
        average = "-" if row.average is None else f"{100 * row.average:.1f}"
        click.echo(f"{row.name:<10}  {row.truth:>6,}  {recall:<22}  {precision:<22}  {average:>5}")
    for name, (found, all_of) in recalls.items():
        click.echo(f"{printable(name[:40]):<10}  {all_of:>6,}  {matching.percent(found, all_of):<22}")
    for least, (score, found, right, boxes) in points.items():
        click.echo(
            f"precision of at least {100 * least:.0f}%: recall {matching.percent(found, truth)} at score {score:.3f} "
            f"({right:,} of {boxes:,} boxes right)"
        )


def _mistakes(path: Path, judged: Sequence[tuple[Scanned, Judged]], min_score: float, most: int) -> None:
    """Write the sheet of images with a missed or a wrong box, those with the most first."""
    from animesion.detectors import sheets

    faults = [(len(each.missed(min_score)) + len(each.wrong(min_score)), scanned, each) for scanned, each in judged]
    chosen = sorted((fault for fault in faults if fault[0]), key=lambda fault: (-fault[0], fault[1].name))[:most]
    cells = []
    for _, scanned, each in chosen:
        missed, wrong = each.missed(min_score), each.wrong(min_score)
        marks = [
            sheets.Mark(
                label.box,
                sheets.IGNORED if each.ignored[i] else sheets.MISSED if i in missed else sheets.RIGHT,
                label.kind if i in missed or each.ignored[i] else "",
                thin=i not in missed,
            )
            for i, label in enumerate(each.truth)
        ]
        marks += [sheets.Mark(each.boxes[i], sheets.WRONG, f"{each.boxes[i].score:.2f}") for i in wrong]
        cells.append(
            sheets.Cell(scanned.path, f"{scanned.name}\n{len(missed)} missed, {len(wrong)} wrong", tuple(marks))
        )
    legend = [(sheets.MISSED, "missed"), (sheets.WRONG, "wrong"), (sheets.RIGHT, "found"), (sheets.IGNORED, "ignored")]
    sheets.write(path, cells, legend)
    total = sum(bool(fault[0]) for fault in faults)
    click.echo(f"{path} shows {len(cells):,} of {total:,} images with mistakes", err=True)
