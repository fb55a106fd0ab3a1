"""How many short lists of names are read in the right legacy encoding, refused, or read wrongly.

    python -m tests.benchmarks.legacy_encodings [--draws 40]

Draws names from the lists of `tests/unit/test_legacy_encodings.py`, as a table of numbers and names.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter

from animesion_scrapers.url_tables import legacy
from tests.unit.test_legacy_encodings import CASES, NAMES, table

SIZES = (1, 2, 3, 5, 10, 20)


def outcome(content: bytes, encoding: str) -> str:
    """`right`, `refused` or `wrong`; `plain` if every encoding reads the same."""
    if content.isascii():
        return "plain"
    found = legacy.guess(content)
    if found.rival or not found.encoding:
        return "refused"
    return "right" if content.decode(found.encoding) == content.decode(encoding) else "wrong"


def main() -> None:
    """Print a row for each number of names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=40, help="lists for each language, encoding and size")
    draws = parser.parse_args().draws
    chance = random.Random(0)
    for size in SIZES:
        counts: Counter[str] = Counter()
        for language, encoding in CASES:
            names = NAMES[language][1].split("|")
            for _ in range(draws):
                chosen = chance.sample(names, min(size, len(names)))
                counts[outcome(table(chosen).encode(encoding), encoding)] += 1
        total = counts["right"] + counts["refused"] + counts["wrong"]
        shares = ", ".join(f"{counts[each] / total:.1%} {each}" for each in ("right", "refused", "wrong"))
        print(f"{size:2} names: {shares} of {total:,} lists")


if __name__ == "__main__":
    main()
