"""Types of arguments as objects instead of text, for what reads them at run time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints

F = TypeVar("F", bound=Callable[..., Any])


def with_types(function: F) -> F:
    """Replace the annotations of a function, which postponed evaluation keeps as text, by the types that they name.

    torch.fx writes the annotations of a network's `forward` into the code of a trace as they are, and TorchScript does
    not know the names that result from text.
    """
    function.__annotations__ = get_type_hints(function)
    return function
