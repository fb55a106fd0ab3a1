"""Altered copies of images that each method finds: recall, wrong pairs and time, in one table.

    python tests/benchmarks/near_duplicates.py --faces FACES.tar [--images 1000] [--workers 2]
        [--copies local ...] [--hashes dhash whash ...] [--embedding resnet18 --weights FILE --thresholds 0.98 0.99]

FACES.tar contains `<class>/<name>` images. Every alteration of `alterations.py` makes a copy of each chosen image, and
each method searches originals and copies together. Recall is the share of copies that are paired with their original. A
wrong pair is an original with the copy of another, unless the two originals are related already (by a pHash within 12
bits, or by `duplicates.copies = "local"`): a real set has near duplicates, and they are not labelled.

The methods are the searches of a build, `local` and `hash` (found: in any relation; copy: dropped), pHash with its
check of thumbnails (`off`), each hash by itself at the default radius of `duplicates.hash` and beyond, and, where they
are installed, imagededup's PHash and CNN. `--embedding sscd` measures an installed SSCD, by itself and verified.
`--copies` without a value leaves the slow searches by pixels out. `crop-resistant` takes 300 ms an image, so it is
measured on the first 20.

`copies.py` compares verdicts with what people say, and with names.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import random
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from alterations import ALTERATIONS
from PIL import Image

from animesion.config.recipe import HASHES, DuplicatesSection, EmbeddingSection
from animesion.dedup import candidates, geometry, residual, search
from animesion.dedup.hashes import ImageHashes
from animesion.dedup.verdict import Verdict
from animesion.errors import UsageError
from animesion.images import features, hashing, local_features, other_hashes, windows

SAME = (Verdict.COPY, Verdict.OVERLAY)
Crossed = set[tuple[int, int]]


def faces(path: Path, count: int) -> list[Image.Image]:
    """Images of a tar, the same in every run, no two with equal pixels."""
    with tarfile.open(path) as tar:
        members = sorted((each for each in tar.getmembers() if each.isfile()), key=lambda each: each.name)
        chosen, seen = [], set()
        for member in random.Random(0).sample(members, len(members)):
            file = tar.extractfile(member)
            assert file is not None
            image = Image.open(io.BytesIO(file.read())).convert("RGB")
            if (digest := hashing.of_pixels(image)) not in seen:
                chosen.append(image)
                seen.add(digest)
            if len(chosen) == count:
                break
    return chosen


class Searched:
    """Images with what a build searches them by."""

    def __init__(self, images: Sequence[Image.Image], copies: Sequence[str] = ("local",)) -> None:
        self.images = list(images)
        computed = [features.compute_features(image) for image in images]
        self.phash = np.array([[each.phash, each.phash_flip] for each in computed], dtype=np.uint64).reshape(-1, 2)
        self.thumbnails = [each.thumbnail for each in computed]
        # the hashes of windows are verified by local features too, which a build extracts of candidates alone
        self.points = [local_features.extract(image) for image in images] if copies else []
        self.windows = [windows.window_phashes(image.convert("L")) for image in images] if "hash" in copies else []

    def __add__(self, other: Searched) -> Searched:
        both = Searched([])
        both.images, both.points = self.images + other.images, self.points + other.points
        both.thumbnails, both.windows = self.thumbnails + other.thumbnails, self.windows + other.windows
        both.phash = np.concatenate([self.phash, other.phash])
        return both

    def hashes(self) -> candidates.Hashes:
        first, second = (np.ascontiguousarray(self.phash[:, side]) for side in (0, 1))
        return candidates.Hashes(first, second, self.thumbnails)

    def pairs(self, copies: str = "local", more: search.Pairs | None = None) -> search.Pairs:
        """Candidates, shape (m, 2)."""
        if copies == "hash":
            signatures = candidates.Signatures(self.hashes(), windows=np.stack(self.windows))
        else:
            points = local_features.PointSets.of(self.points) if copies == "local" else None
            signatures = candidates.Signatures(self.hashes(), points=points)
        return candidates.find(signatures, DuplicatesSection(), more).pairs

    def alone(self, settings: DuplicatesSection) -> search.Pairs:
        """Near duplicates by hash and thumbnail, shape (m, 2)."""
        hashes = self.hashes()
        found, mirrored = search.found_pairs(
            hashes.phash, hashes.phash_flip if settings.flip else None, settings.radius
        )
        limits = settings.mean_difference, settings.max_difference, mirrored, settings.tone
        thumbnails = candidates.thumbnails(self.thumbnails, np.arange(len(self.images)))
        return found[search.same_thumbnail(thumbnails, found, *limits)]

    def verdict(self, a: int, b: int) -> Verdict:
        """The verdict on a pair by its local features."""
        sizes = self.images[a].size, self.images[b].size
        match = geometry.match(self.points[a], self.points[b], sizes)
        return Verdict.DIFFERENT if match is None else residual.compare(self.images[a], self.images[b], match).verdict

    def related(self) -> dict[tuple[int, int], Verdict]:
        """Verdicts on all candidates that are not different."""
        every = {(a, b): self.verdict(a, b) for a, b in self.pairs().tolist()}
        return {pair: verdict for pair, verdict in every.items() if verdict is not Verdict.DIFFERENT}


# A method takes features of images and returns pairs of an original and a copy, by columns of the table. Features of
# the originals are computed once.


class Builds:
    """The searches of a build, and pHash with thumbnails."""

    def __init__(self, copies: Sequence[str], embedding: EmbeddingSection | None) -> None:
        self._copies = copies
        self._vectors = Embedded(embedding) if copies and embedding and embedding.model == "sscd" else None

    def features(self, images: Sequence[Image.Image]) -> Any:
        vectors = self._vectors.features(images) if self._vectors else None
        return Searched(images, self._copies), vectors

    def found(self, originals: Any, copies: Any) -> dict[str, Crossed]:
        both, n = originals[0] + copies[0], len(originals[0].images)
        verdicts: dict[tuple[int, int], Verdict] = {}

        def judged(pairs: search.Pairs, wanted: Sequence[Verdict]) -> Crossed:
            for a, b in across(pairs, n):
                verdicts.setdefault((a, b), both.verdict(a, n + b))
            return {pair for pair in across(pairs, n) if verdicts[pair] in wanted}

        columns = {}
        related = [verdict for verdict in Verdict if verdict is not Verdict.DIFFERENT]
        for copies_by in self._copies:
            pairs = both.pairs(copies_by)
            columns[f"{copies_by}: found"] = judged(pairs, related)
            columns[f"{copies_by}: copy"] = judged(pairs, SAME)
        columns["off"] = across(both.alone(DuplicatesSection()), n)
        columns["off, flip"] = across(both.alone(DuplicatesSection(flip=True)), n)
        if self._vectors:
            pairs = search.cosine_pairs(np.concatenate([originals[1], copies[1]]), 0.5)
            columns["SSCD 0.5, verified"] = judged(pairs, related)
        return columns


class Hash:
    """A hash by itself, at its default radius and at the radius within which a build compares images."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        if kind != "phash":
            other_hashes.require(kind)

    def features(self, images: Sequence[Image.Image]) -> ImageHashes:
        if self.kind == "phash":
            both = np.array([hashing.phashes(image) for image in images], dtype=np.uint64)
            return ImageHashes.phashes(both[:, 0].copy(), both[:, 1].copy())
        found = [other_hashes.compute(self.kind, image) for image in images]
        return ImageHashes.of_kind(self.kind, found, found)  # mirror images are not searched here

    def found(self, originals: ImageHashes, copies: ImageHashes) -> dict[str, Crossed]:
        both, n = originals + copies, len(originals.plain.starts) - 1
        default = DuplicatesSection.model_validate({"hash": self.kind})
        return {
            f"{self.kind} {radius}": across(both.pairs(radius, flip=False)[0], n)
            for radius in (default.radius, default.wide_radius)
        }


class ImagededupHash:
    """imagededup's PHash: all pairs of its hashes within 4 and 10 bits, as `find_duplicates` returns them."""

    def __init__(self) -> None:
        from imagededup.methods import PHash

        self._method = PHash(verbose=False)

    def features(self, images: Sequence[Image.Image]) -> np.ndarray:
        codes = [self._method.encode_image(image_array=np.asarray(image)) for image in images]
        return np.array([int(code, 16) for code in codes], dtype=np.uint64)

    def found(self, originals: np.ndarray, copies: np.ndarray) -> dict[str, Crossed]:
        both = np.concatenate([originals, copies])
        pairs = {bits: search.candidate_pairs(both, bits) for bits in (4, 10)}
        return {f"imagededup PHash {bits}": across(pairs[bits], len(originals)) for bits in pairs}


class ImagededupCnn:
    """imagededup's CNN (MobileNetV3): all pairs from a cosine of 0.9; its weights come from torchvision's host."""

    def __init__(self) -> None:
        from imagededup.methods import CNN

        self._method = CNN(verbose=False)

    def features(self, images: Sequence[Image.Image]) -> np.ndarray:
        found = np.concatenate([self._method.encode_image(image_array=np.asarray(image)) for image in images])
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def found(self, originals: np.ndarray, copies: np.ndarray) -> dict[str, Crossed]:
        pairs = search.cosine_pairs(np.concatenate([originals, copies]).astype(np.float32), 0.9)
        return {"imagededup CNN 0.9": across(pairs, len(originals))}


class Embedded:
    """A model of `duplicates.embedding` by cosine similarity alone."""

    def __init__(self, settings: EmbeddingSection, thresholds: Sequence[float] = ()) -> None:
        from animesion.pipeline import embed

        self._embed, self._thresholds = embed.load(settings), thresholds

    def features(self, images: Sequence[Image.Image]) -> np.ndarray:
        return self._embed(images)

    def found(self, originals: np.ndarray, copies: np.ndarray) -> dict[str, Crossed]:
        both = np.concatenate([originals, copies])
        return {
            f"cosine {threshold}": across(search.cosine_pairs(both, threshold), len(originals))
            for threshold in self._thresholds
        }


def across(pairs: search.Pairs, n: int) -> Crossed:
    """Pairs of an original and a copy; the copy of image i is row n + i."""
    return {(a, b - n) for a, b in np.asarray(pairs).reshape(-1, 2).tolist() if a < n <= b}


class Method(NamedTuple):
    """A method, the features of the originals by it, and the number of originals that it is measured on."""

    finder: Any
    originals: Any
    images: int


class Cell(NamedTuple):
    """Recall, and wrong pairs among `images` originals and their copies."""

    recall: float
    wrong: int
    images: int


class Measured(NamedTuple):
    """Cells by column, and CPU-seconds of the features of a copy by method, of one alteration."""

    name: str
    cells: dict[str, Cell]
    spent: dict[str, float]
    notes: list[str]


def measured(name: str) -> Measured:
    """Measure every method on one alteration."""
    rng = random.Random(name)
    copies = [ALTERATIONS[name](image, rng) for image in IMAGES]
    cells: dict[str, Cell] = {}
    spent = {}
    for label, method in METHODS.items():
        start = time.process_time()
        computed = method.finder.features(copies[: method.images])
        spent[label] = (time.process_time() - start) / method.images
        for column, pairs in method.finder.found(method.originals, computed).items():
            wrong = [pair for pair in pairs if pair[0] != pair[1] and (min(pair), max(pair)) not in KNOWN]
            own = sum(a == b for a, b in pairs)
            cells[column] = Cell(own / method.images, len(wrong), method.images)
    print(
        f"{name}: " + ", ".join(f"{c} {cell.recall:.3f} ({cell.wrong})" for c, cell in cells.items()), file=sys.stderr
    )
    return Measured(name, cells, spent, NOTES)


# of this process, by `prepare`
IMAGES: list[Image.Image] = []
METHODS: dict[str, Method] = {}
KNOWN: set[tuple[int, int]] = set()
NOTES: list[str] = []


def prepare(arguments: argparse.Namespace) -> None:
    """Load the images and create the methods that can run here."""
    IMAGES.extend(faces(arguments.faces, arguments.images))
    model = EmbeddingSection(model=arguments.embedding, weights=arguments.weights) if arguments.embedding else None
    wanted: dict[str, Callable[[], Any]] = {"build": lambda: Builds(arguments.copies, model)}
    wanted |= {kind: lambda kind=kind: Hash(kind) for kind in arguments.hashes}
    wanted |= {"imagededup PHash": ImagededupHash, "imagededup CNN": ImagededupCnn}
    if model:
        wanted[f"embedding {model.model}"] = lambda: Embedded(model, arguments.thresholds)
    for label, create in wanted.items():
        try:
            finder = create()
        except (ImportError, OSError, UsageError) as error:
            NOTES.append(f"{label} left out: {' '.join(str(error).split())[:160]}")
            continue
        count = min(len(IMAGES), 20 if label == "crop-resistant" else len(IMAGES))
        METHODS[label] = Method(finder, finder.features(IMAGES[:count]), count)
    originals: Searched = METHODS["build"].originals[0]
    if arguments.copies:
        KNOWN.update(originals.related())
    # related in a way that no alteration has made: near duplicates and alternates, by the loosest settings
    loose = DuplicatesSection(radius=12, mean_difference=24.0, max_difference=255, flip=True)
    KNOWN.update((a, b) for a, b in originals.alone(loose).tolist())
    NOTES.append(f"{len(IMAGES):,} images; {len(KNOWN):,} pairs of originals are related")


def results(arguments: argparse.Namespace) -> Iterator[Measured]:
    if arguments.workers == 1:
        prepare(arguments)
        yield from map(measured, arguments.only)
        return
    # each worker computes the features of the originals: libraries that have started threads do not survive a fork
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, context, initializer=prepare, initargs=(arguments,)) as pool:
        yield from pool.map(measured, arguments.only)


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=Path, required=True, help="tar of images")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=1, help="number of processes")
    parser.add_argument("--copies", nargs="*", choices=("local", "hash"), default=["local", "hash"])
    parser.add_argument("--hashes", nargs="*", choices=list(HASHES), default=list(HASHES))
    parser.add_argument("--embedding", metavar="MODEL", help="timm model, or sscd, for pairs by cosine similarity")
    parser.add_argument("--weights", default="pretrained", help="as duplicates.embedding.weights")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.9, 0.95, 0.98, 0.99])
    parser.add_argument("--only", nargs="+", choices=list(ALTERATIONS), default=list(ALTERATIONS))
    arguments = parser.parse_args()
    rows: dict[str, dict[str, Cell]] = {}
    times: dict[str, list[float]] = {}
    notes: list[str] = []
    for each in results(arguments):
        rows[each.name], notes = each.cells, each.notes
        for label, seconds in each.spent.items():
            times.setdefault(label, []).append(seconds)
    print("\n".join(notes))
    columns = list(next(iter(rows.values())))
    print(f"\n| recall (wrong pairs) | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, cells in rows.items():
        shown = (cells[column] for column in columns)
        print(f"| {name} | {' | '.join(f'{c.recall:.3f}' + (f' ({c.wrong:,})' if c.wrong else '') for c in shown)} |")
    print(f"| wrong pairs, all rows | {' | '.join(f'{sum(c[k].wrong for c in rows.values()):,}' for k in columns)} |")
    print(f"| pairs of two images, all rows | {' | '.join(pairs_of(rows, column) for column in columns)} |")
    print("\nfeatures, CPU-ms an image: " + ", ".join(f"{k} {1000 * np.mean(v):.1f}" for k, v in times.items()))


def pairs_of(rows: dict[str, dict[str, Cell]], column: str) -> str:
    count = sum(cells[column].images * (cells[column].images - 1) for cells in rows.values())
    return f"{count / 1e6:.1f} million"


if __name__ == "__main__":
    main()
