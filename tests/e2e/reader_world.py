"""What a reader of the documentation has: the files that its examples name, and the sites that they ask.

All is drawn. The sites are servers on loopback; every source that is made meanwhile reaches them by names that no
resolver knows. Running the examples is left to `reader`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from click.testing import CliRunner
from PIL import ImageDraw

from animesion.cli import cli
from animesion_sample.api import describe
from animesion_sample.collections import SampleFilesOptions, write
from animesion_sample.faults import local_server
from animesion_sample.server import serve
from animesion_sample.source import HOST
from animesion_sample.store import KeptFiles
from animesion_sample.world import World
from tests import booru_dialects as dialects
from tests import flora
from tests.cascades import BRIGHT
from tests.conftest import draw, draw_folders
from tests.integration import hub_server, s3_server

#: Posts of the drawn booru, as in the build of the sample.
POSTS = 300


def prepare(world: Path, sample: Path, other: Path) -> None:
    """Fill an empty folder.

    Args:
        world: the folder.
        sample: a build of `daf-re --sample`.
        other: a dataset of class folders.
    """
    for name in ("daf-re-sample", "daf-re", "daf-re-old"):
        shutil.copytree(sample, world / "datasets" / name)
    for name in ("datasets/faces", "datasets/faces-old", "datasets/last-year"):
        shutil.copytree(other, world / name)
    _faces(world)
    _images(world)
    _dump(world)
    _sets(world)
    _tables(world)
    _embedded(world)
    _networks(world)


def _faces(world: Path) -> None:
    """Class folders and, beside them, the buckets of DAF:re's label files."""
    write(SampleFilesOptions(layout="labels", classes=2), world)
    shutil.copytree(world / "faces", world / "fullMin256")
    draw_folders(world / "faces")
    listed = sorted(path.relative_to(world) for path in (world / "faces").rglob("*.jpg"))
    (world / "rows.tsv").write_text("".join(f"{path}\t{path.parts[1]}\n" for path in listed), encoding="utf-8")


def _images(world: Path) -> None:
    """Class folders of images with one bright square, which the drawn cascade and network take for a face."""
    for number in range(24):
        image = draw(1000 + number, 192).point(lambda value: value // 3)
        left, top = 40 + number % 5 * 8, 50 + number % 3 * 8
        ImageDraw.Draw(image).rectangle((left, top, left + 64, top + 64), fill=(250, 250, 250))
        path = world / "images" / ("red", "blue")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=92)
    shutil.copy(path, world / "image.jpg")


def _dump(world: Path) -> None:
    """The drawn booru as Danbooru2018 was given out: numbers are texts, all tags are in one list."""
    drawn, kept = World(POSTS), KeptFiles()
    categories = {"general": "0", "artist": "1", "copyright": "3", "character": "4"}
    records = []
    for post in drawn.posts:
        content = kept.read(post) or drawn.file(post)
        told = describe(post, drawn.claim(post, content))
        tags = [
            {"id": "1", "name": tag, "category": number}
            for name, number in categories.items()
            for tag in told[f"tag_string_{name}"].split()
        ]
        records.append(
            {
                "id": str(post.id), "file_ext": told["file_ext"], "rating": told["rating"], "tags": tags,
                "parent_id": str(told["parent_id"] or 0), "pixiv_id": str(told["pixiv_id"] or 0),
                "source": told["source"], "is_deleted": told["is_deleted"],
            }
        )  # fmt: skip
        path = world / "512px" / f"{post.id % 1000:04d}" / f"{post.id}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (world / "2018").mkdir()
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (world / "2018" / "2018000000000000").write_text(lines, encoding="utf-8")
    (world / "faces.tsv").write_bytes(drawn.faces_tsv())
    (world / "tagIds.tsv").write_bytes(drawn.tag_ids_tsv())


def _sets(world: Path) -> None:
    """Parts of published sets in their layouts."""
    for layout, name in (("soy-ageing", "soyageing"), ("soy-gene", "soygene")):
        (world / name).mkdir()
        write(SampleFilesOptions(layout=layout, classes=2), world / name)  # type: ignore[arg-type]
    for layout in ("cub-200-2011", "stanford-cars"):
        (world / layout).mkdir()
        write(SampleFilesOptions(layout=layout, classes=3), world / layout)  # type: ignore[arg-type]
    (world / "cub-200-2011" / "CUB_200_2011").rename(world / "CUB_200_2011")
    (world / "stanford-cars").rename(world / "stanford_cars")
    place = world / "moeimouto"
    place.mkdir()
    write(SampleFilesOptions(layout="moeimouto", classes=3), place)
    with zipfile.ZipFile(world / "animeface-character-dataset.zip", "w", strict_timestamps=False) as archive:
        for path in sorted(place.rglob("*")):
            archive.write(path, path.relative_to(place))


def _tables(world: Path) -> None:
    rng = Random(0)
    counts = [rng.randrange(20, 400) for _ in range(30)]
    rows = "".join(f"{number},class {number},{count},0,0,{count}\n" for number, count in enumerate(counts))
    header = "class_id,class_name,train,val,test,total\n"
    (world / "per_class_counts.csv").write_text(header + rows, encoding="utf-8")
    addresses = [f"http://{HOST}/data/{number}.jpg" for number in range(20)]
    pq.write_table(pa.table({"url": addresses, "label": ["a", "b"] * 10}), world / "urls.parquet")
    (world / "tag_aliases.csv").write_text("antecedent_name,consequent_name,status\nold,new,active\n", encoding="utf-8")
    (world / "tag_implications.csv").write_text(
        "antecedent_name,consequent_name,status\nnew_(costume),new,active\n", encoding="utf-8"
    )
    (world / "lbpcascade_animeface.xml").write_bytes(BRIGHT)


def _embedded(world: Path) -> None:
    """Images inside Parquet files, shards, and a tar with an index; scans in one folder."""
    images = sorted(path for path in (world / "images").rglob("*.jpg"))
    for name in ("food101", "shards", "mirror"):
        (world / name).mkdir()
    rows = [{"bytes": path.read_bytes(), "path": path.name} for path in images]
    labels = [path.parent.name for path in images]
    pq.write_table(pa.table({"image": rows, "label": labels}), world / "food101/train-00000-of-00001.parquet")
    for number in range(4):
        with tarfile.open(world / f"shards/train-{number:05}.tar", "w") as archive:
            for path in images[number::4]:
                (label := world / "label.cls").write_text(path.parent.name, encoding="utf-8")
                archive.add(label, f"{path.stem}.cls")
                archive.add(path, f"{path.stem}.jpg")
                label.unlink()
    with tarfile.open(world / "mirror/0000.tar", "w") as archive:
        for path in images:
            archive.add(path, path.name)
    with tarfile.open(world / "mirror/0000.tar") as archive:
        files = {member.name: {"offset": member.offset_data, "size": member.size} for member in archive}
    (world / "mirror/0000.json").write_text(json.dumps({"files": files}), encoding="utf-8")
    (world / "scans").mkdir()  # split, class and group in the names
    for number, path in enumerate(images):
        split = "test" if number % 4 == 0 else "train"
        shutil.copy(path, world / f"scans/{split}_{path.parent.name}_{number // 2}_{number}.jpg")
    table = "".join(f"{path.stem},{path.parent.name}\n" for path in images)
    (world / "labels.csv").write_text(f"id,label\n{table}", encoding="utf-8")


def _networks(world: Path) -> None:
    """Runs of one epoch, and networks that box what is bright."""
    from tests.integration.test_detect_and_predict import network

    for name in ("faces.onnx", "other.onnx"):
        network(world / name)
    short = ["--img-size", "32", "--epochs", "1", "--model", "vitfs_nano_patch16"]
    data = str(world / "datasets" / "daf-re-sample")
    for name, more in (("first", []), ("teacher-cal", ["--recipe", "cal-teacher", "--set", "model.pretrained=false"])):
        out = str(world / "runs" / name)
        done = CliRunner().invoke(cli, ["train", "--data", data, *more, *short, "--out", out])
        assert done.exit_code == 0, done.output
    for name in ("a", "teacher"):
        shutil.copytree(world / "runs" / "first", world / "runs" / name)


class Sites:
    """Servers on loopback, each started when it is first asked for.

    Attributes:
        stack: ends them.
    """

    def __init__(self, stack: contextlib.ExitStack, home: Path) -> None:
        self.stack = stack
        self.home = home

    def addresses(self, kind: str) -> dict[str, tuple[str, int]]:
        """Where the hosts that a source of this kind asks are."""
        if kind in ("danbooru", "urls"):
            return {HOST: self.booru}
        if kind == "moebooru":
            return {"moebooru.invalid": self._moebooru}
        if kind in ("commons", "inaturalist"):
            return self._plants
        return {}

    @cached_property
    def booru(self) -> tuple[str, int]:
        """The drawn booru."""
        server = self.stack.enter_context(serve(posts=POSTS, processes=1))
        return server.host, server.port

    @cached_property
    def _moebooru(self) -> tuple[str, int]:
        drawn = World(POSTS)
        entries = dialects.of_world(drawn, drawn.posts[:20])
        return self.stack.enter_context(local_server(lambda: dialects.moebooru(entries))).address

    @cached_property
    def _plants(self) -> dict[str, tuple[str, int]]:
        roses = [
            flora.Plant(number, "Rosa rugosa", name) for number, name in enumerate(("Peace", "Hansa", "Alba") * 3, 1)
        ]
        wiki = flora.wiki_of(roses)
        wiki.tree = {**wiki.tree, "Rosa cultivars by name": wiki.tree["Plants"]}
        there = {
            "commons.invalid": lambda: flora.commons(wiki),
            "query.invalid": lambda: flora.commons(flora.Wiki(roses)),
            "inaturalist.invalid": lambda: flora.inaturalist(roses),
        }
        return {host: self.stack.enter_context(local_server(made)).address for host, made in there.items()}

    @cached_property
    def accounts(self) -> dict[str, str]:
        """The environment in which the Hub and a bucket are on loopback, and nothing of this machine's accounts."""
        hub = self.stack.enter_context(hub_server.serving())
        shelf = self.stack.enter_context(s3_server.serving(self.home, "bucket"))
        return shelf.env | {
            "HF_HOME": str(self.home / "hf"), "HF_HUB_DISABLE_XET": "1",
            "HF_ENDPOINT": hub.url, "HF_TOKEN": hub_server.TOKEN,
        }  # fmt: skip


@contextlib.contextmanager
def sites(home: Path) -> Iterator[Sites]:
    """No server runs yet; those that are asked for end with the block."""
    with contextlib.ExitStack() as stack:
        yield Sites(stack, home)


def state_dict() -> dict[str, Any]:
    """Weights of an LRNet as the authors' code saves them."""
    from animesion_training import create_model

    return dict(create_model("lrnet14", 200, 128).state_dict())
