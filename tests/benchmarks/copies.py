"""Verdicts on copies by local features, beside what people and names say; `near_duplicates.py` measures altered copies.

    python tests/benchmarks/copies.py labels FACES.tar
    python tests/benchmarks/copies.py leaves LEAVES.tar
    python tests/benchmarks/copies.py judged PICTURES.tar PAIRS.csv

`labels` compares the verdicts with those of people on the pairs of `copy_labels.csv`, by SHA-256 of the files. `leaves`
takes names for the truth: `aug_0_x.jpg` to `aug_4_x.jpg` are copies of `x.jpg`. `judged` reads pairs (test, train) of
CIFAR-10 that people judged.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import itertools
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
from near_duplicates import SAME, Searched
from PIL import Image

from animesion.dedup import search
from animesion.images import hashing

LABELS = Path(__file__).with_name("copy_labels.csv")


def on_labels(tar: Path) -> None:
    """Verdicts beside those of people; every pair that differs is printed."""
    with tarfile.open(tar) as archive:
        files = [archive.extractfile(member) for member in archive if member.isfile()]
        content = {hashlib.sha256(data).hexdigest(): data for file in files if file for data in [file.read()]}
    counts: Counter[tuple[str, str]] = Counter()
    with LABELS.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["first"] in content and row["second"] in content]
    for row in rows:
        pair = [Image.open(io.BytesIO(content[row[name]])).convert("RGB") for name in ("first", "second")]
        verdict = Searched(pair).verdict(0, 1)
        counts[row["label"], verdict.value] += 1
        if (row["label"] in ("copy", "overlay")) != (verdict in SAME):
            print(f"{row['first'][:10]} {row['second'][:10]}: {row['label']}, found {verdict.value} {row['note']}")
    for (label, verdict_name), count in sorted(counts.items()):
        print(f"labelled {label:<10} found {verdict_name:<18} {count:4}")


def on_leaves(tar: Path) -> None:
    names: list[tuple[str, str]] = []
    images: list[Image.Image] = []
    with tarfile.open(tar) as archive:
        for member in archive:
            if member.isfile() and (file := archive.extractfile(member)):
                _, cultivar, name = member.name.split("/")
                names.append((cultivar, re.sub(r"^aug_\d_", "", name)))
                images.append(Image.open(io.BytesIO(file.read())).convert("RGB"))
    digests = [hashing.of_pixels(image) for image in images]
    related = Searched(images).related()
    equal = search.equal_pairs(pa.array([digest.hex() for digest in digests]))
    group = search.components(len(images), [equal, np.array(list(related), dtype=np.int64).reshape(-1, 2)])
    by_leaf: dict[tuple[str, str], list[int]] = {}
    for i, leaf_name in enumerate(names):
        by_leaf.setdefault(leaf_name, []).append(i)
    true = [pair for leaf in by_leaf.values() for pair in itertools.combinations(leaf, 2)]
    together = [group[a] == group[b] for a, b in true]
    by_group: dict[int, list[int]] = {}
    for i, number in enumerate(group.tolist()):
        by_group.setdefault(number, []).append(i)
    joined = [pair for each in by_group.values() for pair in itertools.combinations(each, 2)]
    wrong = [(a, b) for a, b in joined if names[a] != names[b]]
    whole = sum(len({int(group[i]) for i in leaf}) == 1 for leaf in by_leaf.values())
    print(f"{len(images):,} images of {len(by_leaf):,} leaves; verdicts {Counter(v.value for v in related.values())}")
    print(f"pairs of one leaf in one group: {np.mean(together):.4f}; leaves whole: {whole / len(by_leaf):.4f}")
    print(f"pairs in one group: {len(joined):,}, of two leaves: {len(wrong):,}")
    for one, other in sorted({(min(names[a], names[b]), max(names[a], names[b])) for a, b in wrong}):
        print(f"  {'/'.join(one)} and {'/'.join(other)}")


def on_judged(tar: Path, table: Path) -> None:
    images: list[Image.Image] = []
    at: dict[str, int] = {}
    with tarfile.open(tar) as archive:
        for member in archive:
            if member.isfile() and (content := archive.extractfile(member)):
                at[member.name] = len(images)
                images.append(Image.open(io.BytesIO(content.read())).convert("RGB"))
    related = Searched(images).related()
    group = search.components(len(images), [np.array(list(related), dtype=np.int64).reshape(-1, 2)])
    with table.open(newline="") as file:
        pairs = [(row["judgement"], at[row["test"]], at[row["train"]]) for row in csv.DictReader(file)]
    for judgement in sorted({judgement for judgement, _, _ in pairs}):
        chosen = [(min(a, b), max(a, b)) for each, a, b in pairs if each == judgement]
        grouped = sum(group[a] == group[b] for a, b in chosen)
        dropped = sum(related.get(pair) in SAME for pair in chosen)
        shares = f"{grouped / len(chosen):.3f} in one group, {dropped / len(chosen):.3f} copies"
        print(f"{judgement:<16} {len(chosen):4}: {shares}")
    known = {(min(a, b), max(a, b)) for _, a, b in pairs}
    more = {pair: verdict for pair, verdict in related.items() if pair not in known}
    print(f"related pairs that nobody judged: {len(more)}, {sum(v in SAME for v in more.values())} of them copies")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("labels", "leaves", "judged"))
    parser.add_argument("files", nargs="+", type=Path)
    arguments = parser.parse_args()
    {"labels": on_labels, "leaves": on_leaves, "judged": on_judged}[arguments.what](*arguments.files)


if __name__ == "__main__":
    main()
