"""Precision and recall of the near-duplicate search on altered images.

    python tests/benchmarks/near_duplicates.py --faces FACES.tar [--images 1000] [--sweep] [--peers]
        [--embedding resnet18 --weights FILE]

FACES.tar contains `<class>/<name>` images. Every transform makes a copy of each chosen image, and copies and images are
searched together. Recall is the share of copies that are paired with their original. A pair of two different images
counts as wrong, unless the two originals are near duplicates already: a real set has some, and they are not labelled.
Precision therefore describes the pairs that a transform adds. The first line lists the pairs among the originals.

`--sweep` prints recall and wrong pairs for a grid of thresholds. `--peers` compares with imagededup's PHash and CNN in
a separate virtual environment, which this script creates; if the installation fails, it prints the reason.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from animesion.config.recipe import DuplicatesSection, EmbeddingSection
from animesion.dedup import search
from animesion.images import hashing
from animesion.pipeline import embed

PEER_LINES = """
import json, sys
from imagededup.methods import CNN, PHash
folder, method, threshold, out = sys.argv[1:]
if method == "phash":
    found = PHash().find_duplicates(image_dir=folder, max_distance_threshold=int(threshold))
else:
    found = CNN().find_duplicates(image_dir=folder, min_similarity_threshold=float(threshold))
pairs = sorted({tuple(sorted((a, b))) for a, others in found.items() for b in others})
json.dump(pairs, open(out, "w"))
"""


def encoded(image: Image.Image, extension: str, quality: int) -> Image.Image:
    """The image, encoded and decoded again."""
    out = io.BytesIO()
    image.save(out, extension, quality=quality)
    return Image.open(out).convert("RGB")


def cropped(share: float) -> Callable[[Image.Image, random.Random], Image.Image]:
    """Cut away a share of each side, divided randomly between both ends."""

    def cut(image: Image.Image, rng: random.Random) -> Image.Image:
        width, height = image.size
        off = [round(share * side) for side in (width, height)]
        left, top = rng.randint(0, off[0]), rng.randint(0, off[1])
        return image.crop((left, top, left + width - off[0], top + height - off[1]))

    return cut


def marked(image: Image.Image, rng: random.Random) -> Image.Image:
    """The image with semi-transparent text in a corner."""
    layer = Image.new("RGBA", image.size)
    at = (0.45 * image.width, 0.85 * image.height)
    ImageDraw.Draw(layer).text(at, "example.art", fill=(255, 255, 255, 150), font_size=max(9, image.height // 12))
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


def resized(scale: float) -> Callable[[Image.Image, random.Random], Image.Image]:
    """Scale both sides, with a filter that no hash uses."""

    def scaled(image: Image.Image, _: random.Random) -> Image.Image:
        size = (max(8, round(scale * image.width)), max(8, round(scale * image.height)))
        return image.resize(size, Image.Resampling.BICUBIC)

    return scaled


def recoded(kind: str, quality: int) -> Callable[[Image.Image, random.Random], Image.Image]:
    return lambda image, _: encoded(image, kind, quality)


TRANSFORMS: dict[str, Callable[[Image.Image, random.Random], Image.Image]] = {
    "resize 0.5": resized(0.5),
    "resize 0.75": resized(0.75),
    "resize 2": resized(2.0),
    **{f"JPEG {q}": recoded("JPEG", q) for q in (90, 70, 50, 30)},
    "PNG": lambda image, _: encoded(image, "PNG", 0),
    "WebP 80": lambda image, _: encoded(image, "WEBP", 80),
    "crop 2%": cropped(0.02),
    "crop 5%": cropped(0.05),
    "crop 10%": cropped(0.10),
    "flip": lambda image, _: ImageOps.mirror(image),
    "brightness +10%": lambda image, _: ImageEnhance.Brightness(image).enhance(1.1),
    "brightness -10%": lambda image, _: ImageEnhance.Brightness(image).enhance(0.9),
    "brightness +25%": lambda image, _: ImageEnhance.Brightness(image).enhance(1.25),
    "contrast +15%": lambda image, _: ImageEnhance.Contrast(image).enhance(1.15),
    "contrast -15%": lambda image, _: ImageEnhance.Contrast(image).enhance(0.85),
    "watermark": marked,
    "border 2%": lambda image, _: ImageOps.expand(image, max(1, round(0.02 * image.width)), (0, 0, 0)),
    "border 5%": lambda image, _: ImageOps.expand(image, max(1, round(0.05 * image.width)), (255, 255, 255)),
    "resize 0.5, JPEG 50": lambda image, rng: encoded(resized(0.5)(image, rng), "JPEG", 50),
}


#: Transforms that a pHash of the whole image cannot detect at any radius that keeps different images apart.
UNSEEN = ("crop 2%", "crop 5%", "crop 10%", "flip", "brightness +25%", "border 2%", "border 5%")


class Features:
    """Hashes and thumbnails of a list of images."""

    def __init__(self, images: Sequence[Image.Image]) -> None:
        both = np.array([hashing.phashes(image) for image in images], dtype=np.uint64)
        self.hashes, self.flipped = both[:, 0].copy(), both[:, 1].copy()
        self.thumbnails = np.stack([np.frombuffer(hashing.thumbnail(image), dtype=np.uint8) for image in images])

    def joined(self, other: Features) -> Features:
        """The features of both lists, concatenated."""
        both = Features.__new__(Features)
        for name in ("hashes", "flipped", "thumbnails"):
            setattr(both, name, np.concatenate([getattr(self, name), getattr(other, name)]))
        return both

    def pairs(self, settings: DuplicatesSection) -> set[tuple[int, int]]:
        """Pairs that are near duplicates under these settings."""
        found, mirrored = search.found_pairs(self.hashes, self.flipped if settings.flip else None, settings.radius)
        same = search.same_thumbnail(
            self.thumbnails, found, settings.mean_difference, settings.max_difference, mirrored, settings.tone
        )
        return {(a, b) for a, b in found[same].tolist()}


class Embeddings(Features):
    """Features and the embeddings of a timm model."""

    def __init__(self, images: Sequence[Image.Image], settings: EmbeddingSection) -> None:
        super().__init__(images)
        self.vectors = embed.Embedder(settings)(images)

    def alike(self, other: Embeddings, threshold: float) -> set[tuple[int, int]]:
        """Pairs by cosine similarity over both lists, concatenated."""
        both = np.concatenate([self.vectors, other.vectors])
        return {(a, b) for a, b in search.cosine_pairs(both, threshold).tolist()}


def judged(pairs: set[tuple[int, int]], n: int, known: set[tuple[int, int]]) -> tuple[float, int]:
    """Recall of copies (the copy of image i is n + i), and the number of wrong pairs between images and copies."""
    crossed = {(a, b - n) for a, b in pairs if a < n <= b}
    wrong = {(a, b) for a, b in crossed if a != b and (min(a, b), max(a, b)) not in known}
    return sum(a == b for a, b in crossed) / n, len(wrong)


def precision(recall: float, wrong: int, n: int) -> str:
    """Share of correct pairs, as text; a dash if there are no pairs."""
    right = round(recall * n)
    return f"{right / (right + wrong):.3f}" if right + wrong else "-"


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


def peers(images: Sequence[Image.Image], copies: dict[str, list[Image.Image]], known: set[tuple[int, int]]) -> None:
    """Print recall and wrong pairs of imagededup on the same images."""
    venv, folder = Path(tempfile.gettempdir()) / "animesion-peers", Path(tempfile.mkdtemp(prefix="near-duplicates-"))
    python = venv / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    command: list[str | Path] = [python, "-m", "pip", "install", "-q", "imagededup"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode:
        print(f"imagededup left out, its installation failed: {(done.stderr.strip().splitlines() or ['?'])[-1][:200]}")
        return
    n = len(images)
    for method, threshold in (("phash", "4"), ("phash", "10"), ("cnn", "0.9")):
        start, results = time.perf_counter(), []
        for name, altered in copies.items():
            directory = folder / "images"
            directory.mkdir(exist_ok=True)
            for i, image in enumerate([*images, *altered]):
                image.save(directory / f"{i:06d}.png")
            out = folder / "pairs.json"
            command = [python, "-c", PEER_LINES, directory, method, threshold, out]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"imagededup {method} left out: {(done.stderr.strip().splitlines() or ['?'])[-1][:200]}")
                break
            pairs = {(int(a[:6]), int(b[:6])) for a, b in json.loads(out.read_text())}
            results.append((name, *judged({(min(p), max(p)) for p in pairs}, n, known)))
        for name, recall, wrong in results:
            print(f"imagededup {method} {threshold:<4} {name:<22} {recall:8.3f} {wrong:8,}")
        print(f"imagededup {method} {threshold}: {time.perf_counter() - start:.1f} s")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faces", type=Path, required=True, help="tar of images")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--sweep", action="store_true", help="print recall and wrong pairs over thresholds")
    parser.add_argument("--peers", action="store_true", help="compare with imagededup in a separate environment")
    parser.add_argument("--embedding", metavar="MODEL", help="timm model for pairs by cosine similarity")
    parser.add_argument("--weights", default="pretrained", help="as duplicates.embedding.weights")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.9, 0.95, 0.98, 0.99])
    parser.add_argument("--only", nargs="+", default=list(TRANSFORMS), help="transforms to measure")
    arguments = parser.parse_args()
    rng = random.Random(1)
    images = faces(arguments.faces, arguments.images)
    n = len(images)
    copies = {name: [TRANSFORMS[name](image, rng) for image in images] for name in arguments.only}
    base = Features(images)
    features = {name: base.joined(Features(altered)) for name, altered in copies.items()}
    default = DuplicatesSection()
    # pairs of originals under the loosest settings are near duplicates or alternates: they do not count as wrong
    known = base.pairs(DuplicatesSection(radius=12, mean_difference=24.0, max_difference=255, flip=True))
    print(f"{n:,} images; pairs among the originals: default {len(base.pairs(default)):,}, "
          f"with flip {len(base.pairs(DuplicatesSection(flip=True))):,}, loosest {len(known):,}")  # fmt: skip
    if arguments.sweep:
        sweep(features, n, known)
    rows = {"default": default, "flip": DuplicatesSection(flip=True)}
    print(f"{'':<22} " + " ".join(f"{name + ' recall':>16} precision" for name in rows) + f" {'bits 98%':>9}")
    recalls = []
    for name, both in features.items():
        cells = [judged(both.pairs(settings), n, known) for settings in rows.values()]
        bits = np.sort(np.bitwise_count(both.hashes[:n] ^ both.hashes[n:]))[int(0.98 * (n - 1))]
        columns = " ".join(f"{recall:16.3f} {precision(recall, wrong, n):>9}" for recall, wrong in cells)
        print(f"{name:<22} {columns} {bits:9}")
        if name not in UNSEEN:
            recalls.append(cells[0][0])
    if recalls:
        print(f"{'mean of detectable':<22} {sum(recalls) / len(recalls):16.4f}")
    if arguments.embedding:
        model = EmbeddingSection(model=arguments.embedding, weights=arguments.weights)
        first = Embeddings(images, model)
        print(f"{'':<22} " + " ".join(f"{f'cosine {t}':>13} {'wrong':>6}" for t in arguments.thresholds))
        for name, altered in copies.items():
            second = Embeddings(altered, model)
            cells = [judged(first.alike(second, threshold), n, known) for threshold in arguments.thresholds]
            print(f"{name:<22} " + " ".join(f"{r:13.3f} {w:6,}" for r, w in cells), flush=True)
    if arguments.peers:
        peers(images, copies, known)


def sweep(features: dict[str, Features], n: int, known: set[tuple[int, int]]) -> None:
    """Mean and worst recall over the transforms that pHash can detect, and wrong pairs, for a grid of thresholds."""
    seen = {name: both for name, both in features.items() if name not in UNSEEN}
    print(
        f"{'tone':>5} {'radius':>6} {'mean':>6} {'max':>4} {'recall':>8} {'worst':>8} {'':<20} {'wrong':>7} {'own':>6}"
    )
    for tone, radius, mean, most in itertools.product((0.0, 0.2, 0.3), (4, 6, 8), (6.0, 8.0, 12.0), (48, 64, 96)):
        settings = DuplicatesSection(tone=tone, radius=radius, mean_difference=mean, max_difference=most)
        cells = {name: judged(both.pairs(settings), n, known) for name, both in seen.items()}
        worst = min(cells, key=lambda name: cells[name][0])
        own = len({pair for pair in next(iter(seen.values())).pairs(settings) if max(pair) < n})
        recall = sum(r for r, _ in cells.values()) / len(cells)
        print(f"{tone:>5} {radius:>6} {mean:>6} {most:>4} {recall:8.4f} {cells[worst][0]:8.3f} {worst:<20} "
                      f"{sum(w for _, w in cells.values()):>7,} {own:>6,}")  # fmt: skip


if __name__ == "__main__":
    main()
