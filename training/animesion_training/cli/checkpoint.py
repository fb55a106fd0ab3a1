"""The option `--checkpoint`, one word for trained networks in all commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


def checkpoint_option(command: CommandT) -> CommandT:
    """Add the required option `--checkpoint` to a command, as its argument `checkpoint`.

    `animesion_training.weights.load_model` says what it may be.
    """
    option = click.option(
        "--checkpoint",
        metavar="RUN|FILE",
        type=click.Path(path_type=Path),
        required=True,
        help="A run, or a weights file or checkpoint that describes its network.",
    )
    return option(command)


def moved_checkpoint_option(command: CommandT) -> CommandT:
    """Add the option `--checkpoint` to a command that reads galleries, as its argument `checkpoint`."""
    option = click.option(
        "--checkpoint",
        metavar="RUN|FILE",
        type=click.Path(path_type=Path),
        help="The gallery's network, if it was moved.",
    )
    return option(command)
