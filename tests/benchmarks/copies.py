"""Copies by local features or hashes of windows: recall and verdicts on altered images, on leaves and on judged pairs.

    python tests/benchmarks/copies.py faces FACES.tar [--images 1000] [--copies local|hash]
    python tests/benchmarks/copies.py labels FACES.tar
    python tests/benchmarks/copies.py leaves LEAVES.tar
    python tests/benchmarks/copies.py judged PICTURES.tar PAIRS.csv

`faces` alters each image in every way of `TRANSFORMS` and searches originals and copies together, as a build does.
*Found* is the share of copies in any relation with their original, which share a split; *copy* is the share that a
build drops. A wrong pair is a copy in relation with another original, unless the two originals are related themselves.

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
import random
import re
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from near_duplicates import TRANSFORMS as MILD
from near_duplicates import cropped, encoded, faces, resized
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from animesion.config.recipe import DuplicatesSection
from animesion.dedup import candidates, geometry, residual, search
from animesion.dedup.residual import Verdict
from animesion.images import features, hashing, local_features, windows

Transform = Callable[[Image.Image, random.Random], Image.Image]
LABELS = Path(__file__).with_name("copy_labels.csv")
SAME = (Verdict.COPY, Verdict.OVERLAY)


def bordered(share: float, colour: tuple[int, int, int]) -> Transform:
    return lambda image, _: ImageOps.expand(image, max(1, round(share * image.width)), colour)


def one_side(share: float) -> Transform:
    """Cut a share from one of the four sides."""

    def cut(image: Image.Image, rng: random.Random) -> Image.Image:
        box = [0, 0, *image.size]
        side = rng.randrange(4)
        off = round(share * image.size[side % 2])
        box[side] += off if side < 2 else -off
        return image.crop((box[0], box[1], box[2], box[3]))

    return cut


def captioned(image: Image.Image, rng: random.Random) -> Image.Image:
    """A bar of 18 % below the image, with a line of text."""
    bar, ink = rng.choice((("white", "black"), ("black", "white")))
    height = round(0.18 * image.height)
    taller = ImageOps.expand(image, (0, 0, 0, height), bar)
    ImageDraw.Draw(taller).text((4, image.height + 3), "when you see it", fill=ink, font_size=max(8, height // 2))
    return taller


def turned(degrees: float) -> Transform:
    return lambda image, _: image.rotate(degrees, Image.Resampling.BICUBIC, expand=True, fillcolor=(255, 255, 255))


def with_sticker(share: float) -> Transform:
    """A disc with a word that covers a share of the area."""

    def covered(image: Image.Image, rng: random.Random) -> Image.Image:
        image = image.copy()
        side = round((share * image.width * image.height * 4 / np.pi) ** 0.5)
        x, y = rng.randrange(max(1, image.width - side)), rng.randrange(max(1, image.height - side))
        pen = ImageDraw.Draw(image)
        colour = tuple(rng.randrange(256) for _ in range(3))
        pen.ellipse((x, y, x + side, y + side), fill=colour, outline=(0, 0, 0), width=2)
        pen.text((x + 0.2 * side, y + 0.3 * side), "wow", fill=(255, 255, 255), font_size=max(8, side // 3))
        return image

    return covered


def tiled(image: Image.Image, _: random.Random) -> Image.Image:
    """A translucent word, tiled over the image."""
    layer = Image.new("RGBA", image.size)
    pen, step = ImageDraw.Draw(layer), max(8, image.height // 5)
    for row, y in enumerate(range(0, image.height, step)):
        for x in range(-20 * (row % 2), image.width, max(20, image.width // 3)):
            pen.text((x, y), "SAMPLE", fill=(255, 255, 255, 110), font_size=max(8, image.height // 12))
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


TRANSFORMS: dict[str, Transform] = {
    **{name: MILD[name] for name in ("resize 0.5", "JPEG 30", "crop 2%", "crop 5%", "crop 10%")},
    "crop 20%": cropped(0.2),
    "crop 30%": cropped(0.3),
    "side 10%": one_side(0.1),
    "border 2%": bordered(0.02, (0, 0, 0)),
    "border 5%": bordered(0.05, (255, 255, 255)),
    "border 10%": bordered(0.1, (0, 0, 0)),
    "caption bar 18%": captioned,
    "flip": MILD["flip"],
    "flip, crop 10%": lambda image, rng: ImageOps.mirror(cropped(0.1)(image, rng)),
    **{f"turn {degrees}": turned(degrees) for degrees in (90, 180, 270, 15, 30, -30)},
    "sticker 6%": with_sticker(0.06),
    "sticker 12%": with_sticker(0.12),
    "watermark": MILD["watermark"],
    "tiled watermark": tiled,
    "brightness +25%": lambda image, _: ImageEnhance.Brightness(image).enhance(1.25),
    "brightness -25%": lambda image, _: ImageEnhance.Brightness(image).enhance(0.75),
    "contrast +25%": lambda image, _: ImageEnhance.Contrast(image).enhance(1.25),
    "contrast -25%": lambda image, _: ImageEnhance.Contrast(image).enhance(0.75),
    "crop 10%, half, JPEG 50": lambda image, rng: encoded(resized(0.5)(cropped(0.1)(image, rng), rng), "JPEG", 50),
}


class Searched:
    """Images with what a build searches them by."""

    def __init__(self, images: Sequence[Image.Image], copies: str) -> None:
        self.images = list(images)
        computed = [features.compute_features(image) for image in images]
        self.phash = np.array([[each.phash, each.phash_flip] for each in computed], dtype=np.uint64).reshape(-1, 2)
        self.thumbnails = [each.thumbnail for each in computed]
        # the hashes of windows are verified by local features too, which a build extracts of candidates alone
        self.points = [local_features.extract(image) for image in images]
        self.windows = [windows.window_phashes(image.convert("L")) for image in images] if copies == "hash" else []

    def __add__(self, other: Searched) -> Searched:
        both = Searched([], "local")
        both.images, both.points = self.images + other.images, self.points + other.points
        both.thumbnails, both.windows = self.thumbnails + other.thumbnails, self.windows + other.windows
        both.phash = np.concatenate([self.phash, other.phash])
        return both

    def pairs(self) -> search.Pairs:
        """Candidates, shape (m, 2)."""
        return self._candidates().pairs

    def _candidates(self) -> candidates.Candidates:
        first, second = (np.ascontiguousarray(self.phash[:, side]) for side in (0, 1))
        hashes = candidates.Hashes(first, second, self.thumbnails)
        if self.windows:
            signatures = candidates.Signatures(hashes, windows=np.stack(self.windows))
        else:
            signatures = candidates.Signatures(hashes, points=self.points)
        return candidates.find(signatures, DuplicatesSection())

    def verdict(self, a: int, b: int) -> Verdict:
        """The verdict on a pair by its local features."""
        sizes = self.images[a].size, self.images[b].size
        match = geometry.match(self.points[a], self.points[b], sizes)
        return Verdict.DIFFERENT if match is None else residual.compare(self.images[a], self.images[b], match).verdict

    def related(self) -> dict[tuple[int, int], Verdict]:
        """Verdicts on all candidates that are not different."""
        every = {(a, b): self.verdict(a, b) for a, b in self.pairs().tolist()}
        return {pair: verdict for pair, verdict in every.items() if verdict is not Verdict.DIFFERENT}


def on_faces(tar: Path, count: int, copies: str, only: Sequence[str]) -> None:
    images = faces(tar, count)
    n = len(images)
    base = Searched(images, copies)
    known = set(base.related())
    print(f"{n:,} images, `{copies}`; {len(known):,} related pairs among the originals")
    print(f"{'':<24} {'found':>7} {'copy':>7} {'wrong':>6} {'CPU-s':>7}")
    for name in only:
        rng, start = random.Random(name), time.process_time()
        both = base + Searched([TRANSFORMS[name](image, rng) for image in images], copies)
        crossed = {(a, b - n): verdict for (a, b), verdict in both.related().items() if a < n <= b}
        own = [verdict for (a, b), verdict in crossed.items() if a == b]
        wrong = [pair for pair in crossed if pair[0] != pair[1] and (min(pair), max(pair)) not in known]
        dropped = sum(verdict in SAME for verdict in own)
        spent = time.process_time() - start
        print(f"{name:<24} {len(own) / n:7.3f} {dropped / n:7.3f} {len(wrong):6} {spent:7.1f}", flush=True)


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
        verdict = Searched(pair, "local").verdict(0, 1)
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
    related = Searched(images, "local").related()
    equal = search.equal_pairs([digest.hex() for digest in digests])
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
    related = Searched(images, "local").related()
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
    parser.add_argument("what", choices=("faces", "labels", "leaves", "judged"))
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--copies", choices=("local", "hash"), default="local")
    parser.add_argument("--only", nargs="+", default=list(TRANSFORMS))
    arguments = parser.parse_args()
    if arguments.what == "faces":
        on_faces(arguments.files[0], arguments.images, arguments.copies, arguments.only)
    elif arguments.what == "judged":
        on_judged(arguments.files[0], arguments.files[1])
    else:
        {"labels": on_labels, "leaves": on_leaves}[arguments.what](arguments.files[0])


if __name__ == "__main__":
    main()
