"""Options of commands that read single images: where they are, and which face in them is meant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from animesion_training.eval.pieces import FaceCrop

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

_FACES = (
    click.option("--detector", default="none", show_default=True, help="Crop the face first: see animesion detectors."),
    click.option(
        "--margin",
        type=click.FloatRange(0, 4),
        default=0.0,
        show_default=True,
        help="Added around a face, as a share of its side.",
    ),
    click.option(
        "--min-score", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="Lowest score of a face."
    ),
    click.option("--all-faces", is_flag=True, help="Use every face, not only the one with the highest score."),
    click.option("--or-whole", is_flag=True, help="Use the whole image where no face is found."),
    click.option(
        "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Option of the detector; may be repeated."
    ),
)
_DOWNLOADS = (
    click.option("--contact", default="", help="For URLs: e-mail address or URL under which their host can reach you."),
    click.option(
        "--allow-private",
        multiple=True,
        metavar="HOST:PORT",
        help="For URLs: a host on your network that may be asked; may be repeated.",
    ),
)


def face_options(command: CommandT) -> CommandT:
    """Add the options that `face_crop` takes to a command."""
    return _add(command, _FACES)


def download_options(command: CommandT) -> CommandT:
    """Add `--contact` and `--allow-private` to a command that downloads images."""
    return _add(command, _DOWNLOADS)


def _add(command: CommandT, options: Sequence[Callable[[CommandT], CommandT]]) -> CommandT:
    for option in reversed(options):
        command = option(command)
    return command


def face_crop(
    detector: str, margin: float, min_score: float, all_faces: bool, or_whole: bool, settings: Sequence[str]
) -> FaceCrop | None:
    """Return how faces are cropped; None for whole images.

    Raises:
        UsageError: a setting that is no `KEY=VALUE`.
        click.UsageError: options of a detector without one.
    """
    from animesion.config.settings import apply
    from animesion_training.cli.requirements import torch_required

    options: dict[str, Any] = {}
    for setting in settings:
        apply(options, setting)
    if detector == "none":
        if all_faces or or_whole or options or margin or min_score:
            raise click.UsageError("--margin, --min-score, --all-faces, --or-whole and --set need a --detector")
        return None
    with torch_required():
        from animesion_training.eval.pieces import FaceCrop
    return FaceCrop(detector, margin, all_faces, min_score, or_whole, options)
