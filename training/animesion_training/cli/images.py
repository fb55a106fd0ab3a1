"""Options of commands that read single images: where they are, and which face in them is meant."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from animesion_training.eval.pieces import FaceOptions

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


def face_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a detector to a command, as its argument `faces`: a `FaceOptions`."""

    @functools.wraps(command)
    def called(
        *args: Any,
        detector: str,
        margin: float,
        min_score: float,
        all_faces: bool,
        or_whole: bool,
        settings: Sequence[str],
        **others: Any,
    ) -> Any:
        from animesion.config.settings import apply

        options: dict[str, Any] = {}
        for setting in settings:
            apply(options, setting)
        faces: FaceOptions = {
            "detector": detector,
            "margin": margin,
            "min_score": min_score,
            "all_faces": all_faces,
            "or_whole": or_whole,
            "options": options,
        }
        return command(*args, faces=faces, **others)

    return _add(called, _FACES)


def download_options(command: CommandT) -> CommandT:
    """Add `--contact` and `--allow-private` to a command that downloads images."""
    return _add(command, _DOWNLOADS)


def _add(command: CommandT, options: Sequence[Callable[[CommandT], CommandT]]) -> CommandT:
    for option in reversed(options):
        command = option(command)
    return command
