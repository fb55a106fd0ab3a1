"""`animesion train-detector`: train the network of the detector `anime` on one's own images."""

from __future__ import annotations

from pathlib import Path

import click

_PATH = click.Path(path_type=Path)


@click.command(
    epilog="Example: animesion train-detector --faces faces/ --labels boxes.csv --images images/ --init lite0.pth "
    "--out runs/detector"
)
@click.option("--faces", multiple=True, type=_PATH, help="Folder or tar of square face crops; may be repeated.")
@click.option("--leave-out", multiple=True, metavar="NAME", help="Folder of face crops that are not learnt from.")
@click.option("--labels", multiple=True, type=_PATH, help="Labelled boxes with digests; may be repeated.")
@click.option("--drawn", multiple=True, type=_PATH, help="As --labels, but shown half as often in all.")
@click.option("--images", multiple=True, type=_PATH, help="Folder or tar of the labelled images; may be repeated.")
@click.option("--grounds", multiple=True, type=_PATH, help="Folder or tar of images without faces.")
@click.option("--share", type=click.FloatRange(0, 1), default=0.7, show_default=True, help="Scenes from illustrations.")
@click.option("--holdout", type=_PATH, help="Labelled boxes to test and calibrate on; never learnt from.")
@click.option("--init", type=_PATH, help="State dict of EfficientNet-lite0 to start from.")
@click.option("--steps", type=click.IntRange(1), default=2000, show_default=True, help="Batches in all.")
@click.option("--decay", type=click.FloatRange(0, 1), default=0.4, show_default=True, help="Share with a falling rate.")
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Scenes of 256 px in a batch.")
@click.option("--lr", type=click.FloatRange(0, 1, min_open=True), default=2e-3, show_default=True, help="Rate.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the scenes.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--resume", is_flag=True, help="Continue from the checkpoint in the folder.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
def train_detector(
    faces: tuple[Path, ...],
    leave_out: tuple[str, ...],
    labels: tuple[Path, ...],
    drawn: tuple[Path, ...],
    images: tuple[Path, ...],
    grounds: tuple[Path, ...],
    share: float,
    holdout: Path | None,
    init: Path | None,
    steps: int,
    decay: float,
    batch: int,
    lr: float,
    seed: int,
    device: str,
    resume: bool,
    out: Path,
) -> None:
    """Train the network of the detector `anime`, and write it as OUT/detector.onnx.

    It learns from scenes that are composed as it goes: face crops pasted on grounds, and windows of labelled images.
    A build uses the network with `crop.detector = "anime"` and the option `file`.
    """
    from animesion.cli.progress import one_task
    from animesion_training.cli.requirements import check_exists, torch_required

    check_exists(*faces, *labels, *drawn, *images, *grounds, *filter(None, (holdout, init)))
    with torch_required():
        from animesion_training.detection import fit, run

        with one_task("train-detector", prints=True):
            run.run(
                run.Given(faces, leave_out, labels, drawn, images, grounds, share, holdout, init),
                fit.Settings(steps=steps, decay=decay, batch=batch, rate=lr, seed=seed),
                out,
                device=device,
                resume=resume,
                report=click.echo,
            )
