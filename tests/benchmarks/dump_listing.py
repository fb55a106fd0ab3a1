"""Rows per CPU-second of listing a dump, compared with parsing its JSON alone.

    python tests/benchmarks/dump_listing.py [--rows 30000] [--present 0.3] [--rounds 3] [--tags] [--profile]

Writes metadata in the layout of Danbooru2018 to 2020 (one JSON object per line with 40 tags of five categories, numbers
as strings, ratings, parents, Pixiv sources, variants, lists of favourites, and a few damaged lines), an empty file for
each post that is present, and a `faces.tsv`. It then runs `list`, the first step of a build, on it: posts are read,
cleaned, looked up, and written as plans of 500 rows. `json.loads` parses the same lines in turn with it. Prints the
medians, and the SHA-256 of all plans, by which two versions of this package are compared.
"""

from __future__ import annotations

import argparse
import cProfile
import hashlib
import json
import os
import pstats
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from animesion import sources
from animesion.config.recipe import Recipe, load
from animesion.pipeline import fetch
from animesion.storage.workspace import Workspace

#: Tags per post by category: general, artist, copyright, character, meta. The number of characters varies.
_TAGS = {"0": 34, "1": 1, "3": 2, "4": 1, "5": 2}
#: Number of different tags by category.
_NAMES = {"0": 30_000, "1": 40_000, "3": 3_000, "4": 8_000, "5": 200}
_WORDS = ("hair", "eyes", "skirt", "looking_at_viewer", "long_sleeves", "ribbon", "(cosplay)", "swimsuit")


def _name(category: str, number: int) -> str:
    """A tag; one in a hundred is not ASCII."""
    word = "pokémon" if number % 100 == 99 else _WORDS[number % len(_WORDS)]
    return f"{'gacmx'[int(category) % 5]}{number}_{word}"


def post(rng: random.Random, number: int) -> dict[str, Any]:
    """One record of the metadata."""
    tags = []
    for category, count in _TAGS.items():
        if category == "4":
            count = rng.choices((0, 1, 2, 3), (20, 55, 18, 7))[0]
        for _ in range(count):
            tag = int(_NAMES[category] * rng.random() ** 3)  # long tail
            tags.append({"id": str(tag + 1), "name": _name(category, tag), "category": category})
    pixiv = str(rng.randrange(1_000_000, 70_000_000)) if rng.random() < 0.55 else "0"
    source = (
        f"https://i.pximg.net/img-original/img/2017/01/02/03/04/05/{pixiv}_p0.jpg"
        if pixiv != "0"
        else rng.choice(
            ("", "https://twitter.com/someone/status/{0}", "http://blog.example.jp/archives/{0}.html", "C93")
        )
    )
    digest = f"{rng.getrandbits(128):032x}"
    dated = f"2017-05-0{rng.randrange(1, 9)} 06:14:50.04321 UTC"
    return {
        "id": str(number),
        "created_at": dated,
        "uploader_id": str(rng.randrange(1, 500_000)),
        "score": str(rng.randrange(-5, 100)),
        "source": source.format(number * 7),
        "md5": digest,
        "last_commented_at": "1970-01-01 00:00:00 UTC",
        "rating": rng.choices(("s", "q", "e"), (78, 14, 8))[0],
        "image_width": str(rng.randrange(300, 4000)),
        "image_height": str(rng.randrange(300, 4000)),
        "is_note_locked": False,
        "file_ext": rng.choices(("jpg", "png", "gif", "zip"), (70, 27, 2, 1))[0],
        "last_noted_at": "1970-01-01 00:00:00 UTC",
        "is_rating_locked": False,
        "parent_id": str(max(1, number - rng.randrange(1, 9))) if rng.random() < 0.15 else "0",
        "has_children": rng.random() < 0.1,
        "approver_id": "0",
        "file_size": str(rng.randrange(20_000, 5_000_000)),
        "is_status_locked": False,
        "up_score": "3",
        "down_score": "0",
        "is_pending": False,
        "is_flagged": False,
        "is_deleted": rng.random() < 0.08,
        "updated_at": dated,
        "is_banned": rng.random() < 0.01,
        "pixiv_id": pixiv,
        "tags": tags,
        "pools": [str(rng.randrange(1, 9000))] if rng.random() < 0.1 else [],
        "favs": [str(rng.randrange(1, 600_000)) for _ in range(rng.randrange(0, 12))],
    }


def write(folder: Path, rows: int, present: float, tags: bool) -> Recipe:
    """Write the metadata, the files and the face table; returns the recipe that lists them."""
    rng = random.Random(0)
    images = folder / "512px"
    for bucket in range(1000):
        (images / f"{bucket:04d}").mkdir(parents=True)
    (folder / "metadata").mkdir()
    number = 0
    with (folder / "faces.tsv").open("w") as faces:
        for start in range(0, rows, 10_000):
            with (folder / "metadata" / f"2018{start:012d}").open("w") as file:
                for row in range(start, min(rows, start + 10_000)):
                    number += rng.randrange(1, 4)
                    text = json.dumps(post(rng, number), ensure_ascii=False)
                    file.write((text[: len(text) // 2] if row % 5000 == 4999 else text) + "\n")
                    name = f"{number % 1000:04d}/{number}.jpg"
                    if rng.random() < present:
                        (images / name).touch()
                        os.utime(images / name, (number, number))  # a plan contains it
                    for _ in range(rng.choices((0, 1, 2), (35, 50, 15))[0]):
                        left, top, score = rng.random() / 2, rng.random() / 2, rng.random()
                        faces.write(
                            f"{name}\t{rng.randrange(8000)}\t"
                            f"{left:.4f}, {top:.4f}, {left + 0.3:.4f}, {top + 0.3:.4f} {score:.4f}\n"
                        )
    settings = [
        f"source.metadata={folder / 'metadata'}",
        f"source.images={images}",
        f"source.faces={folder / 'faces.tsv'}",
    ]
    settings += ['tags.categories=["general"]'] if tags else []
    return load("daf-re", ["source={kind='dump'}", *settings])


def list_posts(recipe: Recipe, out: Path) -> fetch.FetchPlan:
    """The step `list` of a build."""
    workspace = Workspace(out)
    with workspace.claim(recipe.to_toml(), recipe.digest()):
        return fetch.make_plan(workspace, recipe, sources.make(recipe))


def parse(folder: Path) -> int:
    """Parse the metadata and do nothing with it; returns the number of records."""
    records = 0
    for path in sorted((folder / "metadata").iterdir()):
        with path.open("rb") as file:
            for line in file:
                try:
                    json.loads(line)
                except ValueError:
                    continue
                records += 1
    return records


def _timed(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--present", type=float, default=0.3, help="share of the posts whose image is there")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tags", action="store_true", help="list the tags of each post too")
    parser.add_argument("--profile", action="store_true", help="print where the time of one more run goes")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = write(folder, given.rows, given.present, given.tags)
        size = sum(path.stat().st_size for path in (folder / "metadata").iterdir())
        listing, parsing = [], []
        plan = fetch.FetchPlan([], 0, [])
        for round_ in range(given.rounds):
            start = time.process_time()
            plan = list_posts(recipe, folder / f"out{round_}")
            listing.append(time.process_time() - start)
            parsing.append(_timed(lambda: parse(folder)))
        took, floor = statistics.median(listing), statistics.median(parsing)
        print(f"{given.rows:,} rows, {size / given.rows:,.0f} bytes each; medians of {given.rounds} rounds, CPU time")
        print(f"list            {plan.items / took:>9,.0f} rows per CPU-second")
        print(
            f"json.loads only {plan.items / floor:>9,.0f} rows per CPU-second; list takes {took / floor:.1f} times that"
        )
        print(f"sha256 of the {len(plan.parts)} plans: {hashlib.sha256(''.join(plan.parts).encode()).hexdigest()}")
        if given.profile:
            profile = cProfile.Profile()
            profile.runcall(list_posts, recipe, folder / "profiled")
            pstats.Stats(profile).sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
    main()
