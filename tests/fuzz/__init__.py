"""Fuzzing: hypothesis damages whole files, and readers have to refuse them in their own words.

With `pytest` each harness runs for about a second on the same examples every time. `FUZZ_SECONDS=60 pytest tests/fuzz`
runs each for a minute on new ones, as a nightly job does; `FUZZ_SEED` repeats its run, and `-rP` prints how many inputs
each harness has tried. An input that fails is written
to `FUZZ_FOUND` (by default `.fuzz/`); put it into `tests/fuzz/seeds/<harness>/` with the mend, where every run begins.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import time
import unittest
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

SEEDS = Path(__file__).parent / "seeds"
ValueT = TypeVar("ValueT")

#: Bytes that readers treat in their own way: limits of integers, separators, quotes, and marks of formats.
_TELLING = [
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\n",
    b"\r",
    b"\t",
    b'"',
    b"'",
    b",",
    b"[",
    b"{",
    b"../",
    b"\xff\xd8",
    b"=",
]
_TELLING += [
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\0\0\0\0",
    b"-1",
    b"1e999",
    b"NaN",
    b"99999999999999999999",
    b"\xef\xbb\xbf",
]


@st.composite
def damaged(draw: st.DrawFn, wholes: Sequence[bytes]) -> bytes:
    """One of some files with a few edits: bytes replaced, inserted, removed, repeated, or cut off."""
    content = bytearray(draw(st.sampled_from(list(wholes))))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(content)))
        piece = draw(st.one_of(st.sampled_from(_TELLING), st.binary(min_size=1, max_size=8)))
        match draw(st.integers(0, 5)):
            case 0:
                content[at : at + len(piece)] = piece
            case 1:
                content[at:at] = piece
            case 2:
                del content[at : at + draw(st.integers(1, 64))]
            case 3:
                content[at:at] = content[at : at + draw(st.integers(1, 64))] * draw(st.integers(1, 40))
            case 4 if at < len(content):
                content[at] ^= 1 << draw(st.integers(0, 7))
            case 5 if draw(st.booleans()):
                del content[at:]
    return bytes(content)


#: Any JSON, with the numbers and texts that break readers.
JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(),
        st.text(max_size=20),
        st.sampled_from(["../x", "/etc/passwd", "a\0b", "data/train-00000.tar", "x" * 300, "\x1b[31m", "=1+1"]),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """A JSON document in which some values are others, or gone."""
    copy = _copied(document)
    for _ in range(draw(st.integers(1, 3))):
        holder: Any = copy
        while True:
            places = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not places:
                break
            place = draw(st.sampled_from(places))
            inner = holder[place]
            if isinstance(inner, (dict, list)) and inner and draw(st.booleans()):
                holder = inner
                continue
            if isinstance(holder, dict) and draw(st.integers(0, 4)) == 0:
                del holder[place]
            else:
                holder[place] = draw(JSON)
            break
    return copy


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copied(inner) for name, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def fuzz(name: str, inputs: st.SearchStrategy[ValueT], check: Callable[[ValueT], object], examples: int = 150) -> None:
    """Check the seeds of a harness, and then inputs of a strategy, for as long as the run takes.

    Args:
        name: of the harness, and of the folder of its seeds.
        inputs: the inputs; the seeds, which are files, are used where these are bytes.
        check: raises an error for an input that is handled wrongly.
        examples: number of inputs of a short run.
    """
    tried = 0
    for path in sorted((SEEDS / name).glob("*")):
        tried += 1
        check(path.read_bytes())  # type: ignore[arg-type]
    seconds = float(os.environ.get("FUZZ_SECONDS", "0"))
    end: float | None = None  # the first input takes seconds where hypothesis has to list the letters of Unicode
    first = int(os.environ.get("FUZZ_SEED", str(random.SystemRandom().randrange(2**32) if seconds else 0)))
    slow = [
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
        HealthCheck.filter_too_much,
    ]
    for number in range(first, first + 1_000_000):

        @seed(number)
        @settings(
            max_examples=examples if not seconds else 1000,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=slow,
        )
        @given(inputs)
        def run(value: ValueT) -> None:
            nonlocal tried, end
            if end is None:
                end = time.monotonic() + seconds
            if seconds and time.monotonic() > end:
                raise unittest.SkipTest("the time is over")  # which hypothesis passes on at once
            tried += 1
            try:
                check(value)
            except Exception as error:
                error.add_note(f"harness {name}, FUZZ_SEED={number}")  # noqa: B023
                _keep(name, value)
                raise

        with contextlib.suppress(unittest.SkipTest):
            run()
        if end is None or time.monotonic() >= end:
            print(f"{name}: {tried:,} inputs")
            return


def _keep(name: str, value: object) -> None:
    """Write the input that failed last, which is the smallest one when hypothesis is done."""
    content = value if isinstance(value, bytes) else repr(value).encode("utf-8", "backslashreplace")
    folder = Path(os.environ.get("FUZZ_FOUND", ".fuzz")) / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / hashlib.sha256(content).hexdigest()[:16]).write_bytes(content)
