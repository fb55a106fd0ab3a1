"""A training of the detector from its files to its files: material, checkpoint, network and figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from animesion.detectors import evaluation, matching
from animesion.errors import UsageError
from animesion.storage.workspace import write_atomic
from animesion_training.detection import check, fit, graph, labels, network
from animesion_training.detection.fit import Settings


@dataclass(frozen=True)
class Given:
    """Files to learn from; see the options of `animesion train-detector`."""

    faces: tuple[Path, ...] = ()
    leave_out: tuple[str, ...] = ()
    labels: tuple[Path, ...] = ()
    drawn: tuple[Path, ...] = ()
    images: tuple[Path, ...] = ()
    grounds: tuple[Path, ...] = ()
    share: float = 0.7
    holdout: Path | None = None
    init: Path | None = None


def run(
    given: Given,
    settings: Settings,
    out: Path,
    *,
    device: str = "cpu",
    resume: bool = False,
    report: Callable[[str], None] = print,
) -> None:
    """Train, and write `checkpoint.pt`, `detector.onnx` and `figures.json` into the folder.

    Raises:
        UsageError: there is nothing to learn from, a file is not what it should be, or there is no checkpoint to go on
            from.
    """
    material, tested, known = prepare(given)
    report(
        f"{len(material.faces):,} face crops, {len(material.illustrations):,} windows of labelled images, "
        f"{len(material.grounds):,} grounds; {len(tested):,} labelled images to test on"
    )
    torch.manual_seed(settings.seed)
    module = network.FaceNetwork()
    checkpoint = out / "checkpoint.pt"
    state: dict[str, Any] | None = None
    if resume:
        state = fit.load(checkpoint, module)
        report(f"continues {checkpoint} at step {state['step']:,}")
    elif checkpoint.exists():
        raise UsageError(f"{checkpoint} exists: continue it with --resume, or give another folder")
    elif given.init:
        fit.backbone_weights(given.init, module)
    out.mkdir(parents=True, exist_ok=True)
    average = fit.fit(module, material, settings, checkpoint, device=device, resume=state, report=report)
    module.cpu().load_state_dict(average.state)
    export(module, out, tested, known, report)


def prepare(
    given: Given,
) -> tuple[labels.Material, dict[str, labels.Labelled], dict[str, Any]]:
    """The material, and the images to test on with their labels by digest.

    Raises:
        UsageError: there is nothing to learn from, or labels have no image.
    """
    held = labels.read_labels(given.holdout) if given.holdout else {}
    faces, _ = labels.face_crops(given.faces, given.leave_out) if given.faces else ([], [])
    shown: list[list[labels.Labelled]] = []
    for tables in (given.labels, given.drawn):
        wanted = {digest: of for table in tables for digest, of in labels.read_labels(table).items()}
        found = labels.illustrations({k: v for k, v in wanted.items() if k not in held}, given.images)
        if wanted and not found:
            raise UsageError(f"{tables[0]} labels none of the images: give their folder with --images")
        shown.append(list(found.values()))
    real, drawn = shown
    mixed = [*real, *real, *drawn[: len(real) or len(drawn)]] if drawn else real
    if not faces and not mixed:
        raise UsageError(
            "there is nothing to learn from: give face crops with --faces, or labelled images with --labels"
        )
    grounds = [content for path in given.grounds for _, content in labels.images(path)]
    tested = labels.illustrations(held, given.images) if held else {}
    if held and not tested:
        raise UsageError(f"{given.holdout} labels none of the images: give their folder with --images")
    return labels.Material(faces, mixed, grounds, given.share if mixed else 0.0), tested, held


def export(
    module: network.FaceNetwork,
    out: Path,
    tested: dict[str, labels.Labelled],
    known: dict[str, Any],
    report: Callable[[str], None] = print,
) -> None:
    """Write the network, with calibrated scores if there is something to calibrate them on, and its figures."""
    path = out / "detector.onnx"
    graph.write(module, path)
    figures: dict[str, Any] = {"parameters": sum(weight.numel() for weight in module.parameters())}
    if tested:
        gain, offset = check.calibration(check.judged(path, known, tested))
        graph.write(module, path, gain=gain, offset=offset)
        images = check.judged(path, known, tested)
        rows = evaluation.rows(images, 0.5)
        figures |= {
            "images": len(images),
            "calibration": [round(gain, 4), round(offset, 4)],
            "rows": [row.to_dict() for row in rows],
            "recall_by_kind": {name: list(pair) for name, pair in evaluation.recalls(images, 0.5).items()},
            "operating_points": {
                str(precision): {"min_score": round(score, 4), "recall": round(found / max(1, rows[0].truth), 4)}
                for precision, (score, found, _, _) in evaluation.operating_points(images).items()
            },
        }
        report(f"{'score >= 0.5':<12}  {'faces':>6}  {'recall':<22}  {'precision':<22}  {'AP':>5}")
        for row in rows:
            recall, precision = matching.percent(row.found, row.truth), matching.percent(row.right, row.boxes)
            average = "-" if row.average is None else f"{100 * row.average:.1f}"
            report(f"{row.name:<12}  {row.truth:>6,}  {recall:<22}  {precision:<22}  {average:>5}")
    write_atomic(out / "figures.json", (json.dumps(figures, indent=1) + "\n").encode())
    report(f"{path}: {path.stat().st_size / 1e6:.1f} MB; use it with crop.detector=anime and the option file")
