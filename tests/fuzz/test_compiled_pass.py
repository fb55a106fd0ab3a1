"""The compiled pass: the same figures as the portable code, and no step outside its buffers on hostile arguments.

A nightly job runs this with a module that is compiled with AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import assume
from hypothesis import strategies as st
from PIL import Image

from animesion.images import features, hashing
from tests.fuzz import fuzz

SIDES = st.one_of(st.integers(1, 90), st.sampled_from([32, 33, 127, 128, 129, 255, 256, 300, 1023, 1024, 1025]))
NUMBERS = st.sampled_from([0, -1, 1, 2, 3, 31, 32, 127, 128, 129, 255, 16384, 16385, 2**31 - 1, -(2**31)])


def image(side: tuple[int, int], kind: int, seed: int) -> Image.Image:
    width, height = side
    random = np.random.default_rng(seed)
    if kind == 0:
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    elif kind == 1:
        pixels = random.integers(0, 2, (height, width, 3), dtype=np.uint8) * np.uint8(255)
    else:
        pixels = np.tile(random.integers(0, 256, (height, 1, 3), dtype=np.uint8), (1, width, 1))
    return Image.fromarray(np.ascontiguousarray(pixels))


def test_same_figures_as_the_portable_code() -> None:
    module = features._compiled()
    if module is None:
        pytest.skip(f"the compiled pass is not used: {features.lacking()}")

    def check(given: tuple[tuple[int, int], int, int]) -> None:
        picture = image(*given)
        found = features._compiled_look(module, picture)
        assert found is None or found == features._portable(picture)
        hashing.of_pixels(picture)

    fuzz("pixels", st.tuples(st.tuples(SIDES, SIDES), st.integers(0, 2), st.integers(0, 2**32)), check, 80)


@st.composite
def calls(draw: st.DrawFn) -> tuple[bytes, int, list[Any]]:
    """Arguments of the pass with a few that do not fit."""
    plan = features._plan((draw(st.integers(33, 120)), draw(st.integers(33, 120))))
    assume(plan is not None)
    assert plan is not None
    arguments: list[Any] = list(plan)
    channels = draw(st.sampled_from([3, 4, 0, -1, 5]))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(arguments) - 1))
        value = arguments[at]
        if isinstance(value, bytes):
            content = bytearray(value)
            for _ in range(draw(st.integers(1, 4))):
                place = draw(st.integers(0, max(0, len(content) // 4 - 1))) * 4
                content[place : place + 4] = draw(NUMBERS).to_bytes(4, "little", signed=True)
            arguments[at] = bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)
        elif isinstance(value, int):
            arguments[at] = draw(st.one_of(NUMBERS, st.just(value + 1), st.just(value - 1)))
    size = max(0, plan[0] * plan[1] * max(channels, 0) + draw(st.sampled_from([0, 0, 1, -1, 4])))
    return bytes(size), channels, arguments


def test_hostile_arguments() -> None:
    if hashing.compiled is None:
        pytest.skip("the compiled pass is not installed")

    def check(given: tuple[bytes, int, list[Any]]) -> None:
        pixels, channels, arguments = given
        with contextlib.suppress(ValueError, TypeError, OverflowError, MemoryError):
            hashing.compiled.look(pixels, channels, *arguments)

    fuzz("pixels-arguments", calls(), check, 200)
