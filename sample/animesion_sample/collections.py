"""Drawn collections in the layouts of published sets, read by the readers of those.

They replace downloads in demos and tests: the Ultra-FGVC sets, moeimouto, the benchmarks of
`animesion_sample.benchmarks`, the DAF:re label files and class folders of cultivars. The files are drawn into a
temporary folder when first needed. Readers check the counts of the drawn collection as they check the published ones.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import ClassVar, Literal

from PIL import Image
from pydantic import Field

from animesion.config.settings import Section
from animesion.errors import UsageError
from animesion.schemas import Item, Payload
from animesion.sources.benchmarks import BenchmarkOptions, BenchmarkSource
from animesion.sources.folder import FolderOptions, FolderSource
from animesion.sources.labels import LabelsOptions, LabelsSource
from animesion.sources.moeimouto import MoeimoutoOptions, MoeimoutoSource
from animesion.sources.published_facts import DAF_RE, PUBLISHED
from animesion.sources.tag_tables import TagTables
from animesion.sources.ultra_fgvc import UltraFgvcOptions, UltraFgvcSource
from animesion_sample import benchmarks, leaves
from animesion_sample.characters import CAST
from animesion_sample.written import face, put, text

Layout = Literal[
    "cotton80",
    "soy-local",
    "soy-global",
    "soy-gene",
    "soy-ageing",
    "moeimouto",
    "cub-200-2011",
    "stanford-cars",
    "fgvc-aircraft",
    "stanford-dogs",
    "flowers-102",
    "oxford-pets",
    "food-101",
    "nabirds",
    "vegfru",
    "inaturalist-2017",
    "icartoonface",
    "labels",
    "folder",
]

Reader = BenchmarkSource | FolderSource | LabelsSource | MoeimoutoSource | UltraFgvcSource

#: Default number of classes of each layout.
CLASSES: dict[str, int] = {
    "cotton80": 12, "soy-local": 16, "soy-global": 24, "soy-gene": 12, "soy-ageing": 5, "moeimouto": 10, "labels": 10,
    "folder": 12, **dict.fromkeys(benchmarks.WRITERS, 6),
}  # fmt: skip

LEAF_SIDE, FACE_SIDE, PHOTO_SIDE = 224, 160, 384

#: Numbers of moeimouto's folders, with gaps and outliers as in the original.
_GAPS = (0, 1, 3, 4, 7, 11, 12, 19, 998, 999)


class SampleFilesOptions(Section):
    """Options of the `sample-files` source."""

    layout: Layout = Field(
        description="layout of the drawn files: that of a set, DAF:re's label files, or class folders"
    )
    classes: int = Field(0, ge=0, le=30, description="number of classes; 0 for the layout's default")
    stage: Literal["", "R1", "R3", "R4", "R5", "R6"] = Field("", description="one stage of soy-ageing; empty for all")
    seed: int = Field(0, ge=0, description="another seed draws other images")


class SampleFilesSource:
    """A drawn collection, read by the reader of its layout."""

    Options: ClassVar[type[Section]] = SampleFilesOptions
    summary: ClassVar[str] = "small drawn collections of leaves and faces, in the layouts of published sets"
    #: one process draws and reads
    remote: ClassVar[bool] = True

    def __init__(self, options: SampleFilesOptions) -> None:
        self.options = options
        self.notes: list[str] = []
        self.with_tags = False
        self._reader: Reader | None = None
        self._stack: contextlib.ExitStack | None = None

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Keep the drawn files while the source is open."""
        with contextlib.ExitStack() as self._stack:
            yield
        self._stack = self._reader = None

    def tag_tables(self) -> TagTables:
        """No tables: drawn tags are canonical."""
        return TagTables()

    def items(self) -> Iterator[Item]:
        """The items listed by the layout's reader.

        Raises:
            UsageError: tags are asked for, and the layout has none.
        """
        reader = self._open_reader()
        if isinstance(reader, LabelsSource):
            reader.with_tags = self.with_tags
        elif self.with_tags:
            raise UsageError(f"tags.categories: the layout '{self.options.layout}' has no tags: leave it empty")
        yield from reader.items()
        self.notes += reader.notes

    def read(self, items: Sequence[Item]) -> Iterator[Payload]:
        """The payloads read by the layout's reader."""
        return self._open_reader().read(items) if items else iter(())

    def _open_reader(self) -> Reader:
        if self._reader is None:
            assert self._stack is not None, "the source's session is not open"
            folder = Path(tempfile.mkdtemp(prefix="animesion-sample-"))
            self._stack.callback(shutil.rmtree, folder, ignore_errors=True)
            self._reader = write(self.options, folder)
        return self._reader


def write(options: SampleFilesOptions, folder: Path) -> Reader:
    """Draw a collection into an empty folder and return a reader for it.

    Equal options give equal files, including their dates.
    """
    layout = options.layout
    classes = options.classes or CLASSES[layout]
    if layout == "folder":
        reader: Reader = _folders(options, classes, folder)
    elif layout == "labels":
        reader = _label_files(options, classes, folder)
    elif layout == "moeimouto":
        reader = _moeimouto(options, classes, folder)
    elif layout in benchmarks.WRITERS:
        due = PUBLISHED[layout].with_counts(classes, *benchmarks.write(layout, classes, options.seed, folder))
        reader = BenchmarkSource(BenchmarkOptions.model_validate({"path": str(folder), "set": layout}), due)
    else:
        reader = _cultivars(options, layout, classes, folder)
    for path in folder.rglob("*"):
        os.utime(path, (0, 0))  # listings contain dates, and must not differ between runs
    return reader


def _cultivars(options: SampleFilesOptions, layout: str, classes: int, folder: Path) -> Reader:
    """A set of Ultra-FGVC: the leaves of each cultivar with the published split, and matching counts."""
    due = PUBLISHED[layout]
    species = "cotton" if layout == "cotton80" else "soybean"
    annotated = due.layout[0].endswith(".txt")
    sizes: Counter[str] = Counter()
    for group in due.groups or ("",):
        rows: dict[str, list[str]] = {"train": [], "test": []}
        for number in range(1, classes + 1):
            for split, count in _sizes(layout, number).items():
                for index in range(1, count + 1):
                    leaf = leaves.DrawnLeaf(
                        species, number, f"{options.seed}/{split}/{index}", LEAF_SIDE, group or "R3"
                    )
                    name = f"{number}_{index}_{split}.png" if not annotated else f"{number:03d}_{split[:2]}{index}.png"
                    base = folder / group / "images" if annotated else folder
                    put(base / name, leaves.render(leaf), "PNG")
                    rows[split].append(f"{name} {number}\n")
        for split, lines in rows.items():
            sizes[split] += len(lines)
            if annotated:
                text(folder / group / "anno" / f"{split}.txt", "".join(lines))
    per_class = {split: count * max(1, len(due.groups)) for split, count in _sizes(layout, 1).items()}
    scaled = due.with_counts(classes, sizes, per_class if due.per_class else {})
    return UltraFgvcSource(
        UltraFgvcOptions.model_validate({"path": str(folder), "set": layout, "stage": options.stage}), scaled
    )


def _sizes(layout: str, number: int) -> dict[str, int]:
    """Images per class (and per stage, where there are stages) by split, as in the published set."""
    if layout == "soy-gene":
        return {"train": 3 + number * 5 % 13, "test": 3 + number * 3 % 11}
    return {"train": 5, "test": 5} if layout == "soy-ageing" else {"train": 3, "test": 3}


def _moeimouto(options: SampleFilesOptions, classes: int, folder: Path) -> Reader:
    """Faces in numbered folders, with other files next to them and two images that are not RGB."""
    total = 0
    for rank, design in enumerate(CAST[:classes]):
        number = _GAPS[rank] if rank < len(_GAPS) else 20 + rank
        place = folder / "thumb" / f"{number:03d}_{design.name}"
        count = 10 + Random(f"{options.seed}/{design.name}").randrange(12)
        for index in range(count):
            head = face(design.name, f"{options.seed}/moeimouto/{index}", FACE_SIDE)
            if rank == 1 and index < 2:
                head = head.convert("L")
            put(place / f"face_{index + 1}_{100 + rank}_{37 + index}.png", head, "PNG")
        text(place / "color.csv", "")
        total += count
    scaled = PUBLISHED["moeimouto"].with_counts(classes, {"": total}, {})
    return MoeimoutoSource(MoeimoutoOptions(path=str(folder)), scaled)


def _label_files(options: SampleFilesOptions, classes: int, folder: Path) -> Reader:
    """DAF:re's label files and crops: a long tail, both forms of buckets, and one image in two splits."""
    from animesion.splits import legacy_dafre_sizes

    rng = Random(f"{options.seed}/labels")
    numbers = rng.sample(range(1000, 3_400_000), 40 * classes)
    rows: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for rank, design in enumerate(CAST[:classes]):
        count = max(10, 36 // (rank + 1))
        train, val, test = legacy_dafre_sizes(count)
        parts = ["train"] * train + ["val"] * val + ["test"] * test
        for index, split in enumerate(parts):
            post = numbers.pop()
            seed = 0 if rank == 0 and index == count - 1 else index  # the last of the largest class repeats the first
            three = index % 5 == 4
            place = folder / "faces" / (f"{post % 1000:03d}" if three else f"{post % 1000:04d}")
            put(place / f"{post}.jpg", face(design.name, f"{options.seed}/labels/{seed}", 128), "JPEG", quality=92)
            rows[split].append(f"{rank},{post % 1000:04d}/{post}.jpg\n")
    for split, lines in rows.items():
        header = "class_id,dir\n" if split == "val" else ""
        text(folder / "labels" / f"{split}.csv", header + "".join(lines))
    for split, lines in rows.items():
        table = [_tag_row(line.strip()) for line in lines]
        text(
            folder / "labels" / f"{split}_tags.csv", "id,dir,class_id,tags_cat0,tags_cat3,tags_cat4\n" + "".join(table)
        )
    names = "".join(f"{rank},{design.name}\n" for rank, design in enumerate(CAST[:classes]))
    text(folder / "labels" / "classid_classname.csv", names)
    return LabelsSource(
        LabelsOptions(
            labels=str(folder / "labels"),
            images=str(folder / "faces"),
            page_url="http://sample-booru.invalid/posts/{id}",  # invented ids must not link to real posts
        ),
        DAF_RE.with_counts(classes, {split: len(lines) for split, lines in rows.items()}, {}),
    )


def _tag_row(label: str) -> str:
    """A row of DAF:re's tags for a row of its label files; lists are texts of Python lists."""
    number, _, path = label.partition(",")
    design = CAST[int(number)]
    general = ["solo", design.outfit] if int(number) % 2 else ["solo"]
    lists = ",".join(f'"{tags}"' for tags in (general, [design.work], [design.name.replace("_", " ")]))
    return f"{Path(path).stem},{path},{number},{lists}\n"


def _folders(options: SampleFilesOptions, classes: int, folder: Path) -> Reader:
    """Photographs of cultivars in class folders, with a copy, a thumbnail, a rotated and a broken file."""
    for number in range(1, classes + 1):
        species = "cotton" if number % 4 == 0 else "soybean"
        place = folder / f"{species}-{number:02d}"
        count = 12 + number % 3
        for index in range(count):
            leaf = leaves.DrawnLeaf(species, number, f"{options.seed}/photo/{index}", PHOTO_SIDE, outdoors=True)
            image = leaves.render(leaf)
            path = place / f"{index:03d}.jpg"
            if index == 0 and number == 1:
                put(place / "copy.jpg", image, "JPEG", quality=70)
                put(place / "thumbnail.jpg", image.resize((96, 96)), "JPEG", quality=90)
            if index == 1 and number == 2:
                exif = Image.Exif()
                exif[0x0112] = 6
                put(path, image.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=92, exif=exif.tobytes())
                continue
            put(path, image, "JPEG", quality=92)
            if index == 2 and number == 3:
                path.write_bytes(path.read_bytes()[:3000])
    return FolderSource(FolderOptions(path=str(folder), family=""))
