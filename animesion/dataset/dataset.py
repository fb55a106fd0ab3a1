"""A built dataset as an object: classes, splits, tables, and samples in order, by position or by key.

No file is trusted: every field of `dataset.json` is checked, its paths cannot leave the folder, and offsets in
`index.parquet` cannot leave their shard. `animesion.verification.checks` checks whether the content is right.
"""

from __future__ import annotations

import functools
import json
import operator
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from animesion import schemas
from animesion.config.recipe import Name, Recipe, read_back
from animesion.config.settings import explain
from animesion.dataset import fiftyone_samples, notebook, shards
from animesion.dataset.places import Places
from animesion.dataset.tags import Vocabulary, read_vocabulary
from animesion.dataset.tensors import Tensors
from animesion.errors import UsageError
from animesion.images import codec
from animesion.storage import names, parquet

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

FORMAT = 1

_REBUILD = "run `animesion build` again, or give another folder"

#: Columns of `curated.parquet` that `Dataset.frame` joins to the index.
_PROVENANCE = ["key", "label", "group", "cluster", "crop", "width", "height", "source", "source_id", "page_url"]
_PROVENANCE += ["file_url", "licence", "author", "rating", "md5", "sha256"]

_TABLES = {
    "index.parquet": (schemas.INDEX, schemas.INDEX.names),
    "curated.parquet": (
        schemas.CURATED,
        ["key", "kept", "reason", "label", "class_id", "split", "group", "source", "source_id"],
    ),
}

_Count = Annotated[int, Field(ge=0, lt=2**63)]  # larger ones fit neither NumPy nor Arrow
_Digest = Annotated[str, StringConstraints(pattern=rf"^{names.SHA256}$")]
_SplitName = Literal["train", "val", "test"]


class _Facts(BaseModel):
    """Base of the required parts of `dataset.json`; other keys are for the card and are ignored here."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class _Shard(_Facts):
    path: Annotated[str, StringConstraints(pattern=rf"^{names.SHARD}$")]
    samples: _Count
    bytes: _Count
    sha256: _Digest


class _Split(_Facts):
    samples: _Count
    bytes: _Count
    shards: list[_Shard]


class _Funnel(_Facts):
    seen: _Count
    kept: _Count
    dropped: dict[str, _Count]


class _DatasetFacts(_Facts):
    name: Name
    format: Literal[1]
    recipe: str
    images: _Count
    classes: _Count
    image_field: Literal["jpg", "png", "webp"]
    fields: list[str]
    splits: dict[_SplitName, _Split]
    split_strategy: str
    funnel: _Funnel
    class_names: list[str]
    class_counts: list[dict[_SplitName, _Count]]

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if not len(self.class_names) == len(self.class_counts) == self.classes:
            raise ValueError("class_names and class_counts do not have as many entries as there are classes")
        if not all(map(names.is_text, self.class_names)):
            raise ValueError("a class name has control characters")
        if len(set(self.class_names)) != self.classes:
            raise ValueError("a class name occurs twice in class_names")
        paths = [shard.path for split in self.splits.values() for shard in split.shards]
        if len(set(paths)) != len(paths):
            raise ValueError("a shard occurs twice in splits")
        return self


@dataclass(frozen=True)
class ClassInfo:
    """A class: its id, which is its position, its name, and its number of samples by split and in total."""

    id: int
    name: str
    counts: dict[str, int]
    total: int


@dataclass(frozen=True)
class ShardInfo:
    """A shard as `dataset.json` lists it; `path` is relative to the dataset's folder."""

    path: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SplitInfo:
    """A split: number of samples, bytes and the shards in their order."""

    name: str
    samples: int
    bytes: int
    shards: tuple[ShardInfo, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Sample:
    """One sample.

    Attributes:
        key: key, unique in the dataset.
        split: train, val or test.
        label: class id.
        name: class name.
        image: bytes of the image file in the shard.
        meta: the content of the JSON member, which is the image's provenance.
    """

    key: str
    split: str
    label: int
    name: str
    image: bytes
    meta: dict[str, Any]

    def __repr__(self) -> str:
        return f"<Sample {self.key}: {self.name!r} ({self.label}), {self.split}, {len(self.image):,} bytes>"

    def _repr_html_(self) -> str:
        return notebook.sample_html(self)

    @property
    def tags(self) -> dict[str, list[str]]:
        """Tags by category, in the order of the vocabulary; empty where samples carry none."""
        found = self.meta.get("tags")
        return found if isinstance(found, dict) else {}

    def decode(self) -> Image.Image:
        """The decoded image, mode RGB.

        Raises:
            UsageError: the bytes do not decode.
        """
        try:
            return codec.decode(self.image, codec.Limits()).image
        except codec.RejectedImageError as error:
            raise UsageError(f"sample {self.key} does not decode ({error}): rebuild the dataset") from None


class Dataset:
    """A built dataset in a local folder. It keeps no file open, so it can be pickled and shared between threads.

    Args:
        path: the output folder of `animesion build`.

    Raises:
        UsageError: the folder has no dataset, or its `dataset.json` is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._facts = _read_facts(path)

    def __repr__(self) -> str:
        return f"<Dataset {self.name}: {len(self):,} samples of {len(self.classes):,} classes in {self.path}>"

    def _repr_html_(self) -> str:
        return notebook.dataset_html(self)

    def __reduce__(self) -> tuple[type[Dataset], tuple[Path]]:
        return Dataset, (self.path,)

    # -- facts -------------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The recipe's name."""
        return self._facts.name

    @property
    def image_field(self) -> str:
        """Extension of every image: jpg, png or webp."""
        return self._facts.image_field

    @property
    def fields(self) -> tuple[str, ...]:
        """The members that every sample has, sorted."""
        return tuple(self._facts.fields)

    @property
    def split_strategy(self) -> str:
        """Strategy of the split, such as `grouped`."""
        return self._facts.split_strategy

    @property
    def images(self) -> int:
        """Number of images in the dataset, as stated in `dataset.json`."""
        return self._facts.images

    @property
    def seen(self) -> int:
        """Number of images that the source listed, kept or not."""
        return self._facts.funnel.seen

    @property
    def kept(self) -> int:
        """Number of images that became samples, as counted by the build."""
        return self._facts.funnel.kept

    @property
    def dropped(self) -> dict[str, int]:
        """Number of dropped images by reason."""
        return dict(self._facts.funnel.dropped)

    @functools.cached_property
    def classes(self) -> list[ClassInfo]:
        """Every class, in the order of the ids."""
        pairs = zip(self._facts.class_names, self._facts.class_counts, strict=True)
        return [
            ClassInfo(i, name, {str(split): n for split, n in counts.items()}, sum(counts.values()))
            for i, (name, counts) in enumerate(pairs)
        ]

    @functools.cached_property
    def splits(self) -> dict[str, SplitInfo]:
        """Every split by name."""
        return {
            name: SplitInfo(
                name, split.samples, split.bytes, tuple(ShardInfo(**shard.model_dump()) for shard in split.shards)
            )
            for name, split in self._facts.splits.items()
        }

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe that the dataset was built from.

        Raises:
            UsageError: `recipe.toml` is missing or damaged.
        """
        return read_back(self.path / "recipe.toml")

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The tags of the samples, `tags.csv`.

        Raises:
            UsageError: samples carry no tags, or the file is damaged.
        """
        return read_vocabulary(self.path)

    # -- tables ------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def index(self) -> pa.Table:
        """`index.parquet`, schema `animesion.schemas.INDEX`: one row per sample, shard by shard, in the shard's order.

        Raises:
            UsageError: the table is missing or damaged, or a row points outside its shard.
        """
        table = self.read_table("index.parquet")
        for info in self.splits.values():
            for shard in info.shards:
                rows = table.filter(pc.equal(table["shard"], shard.path))
                columns = [rows["offset"], rows["size"], rows["sample_offset"], rows["sample_size"]]
                ends = [pc.add(columns[0], columns[1]), pc.add(columns[2], columns[3])]
                # Starts are checked as well as ends, because the sum of two int64 may wrap around.
                if any(not 0 <= bound <= shard.bytes for each in (*columns, *ends) for bound in _bounds(each)):
                    raise UsageError(f"{self.path / 'index.parquet'} points outside {shard.path}: {_REBUILD}")
        known = pa.array([shard.path for info in self.splits.values() for shard in info.shards], pa.string())
        if not pc.all(pc.is_in(table["shard"], value_set=known), min_count=0).as_py():
            raise UsageError(f"{self.path / 'index.parquet'} lists shards that are not in dataset.json: {_REBUILD}")
        return table

    def frame(self, split: str | None = None) -> pd.DataFrame:
        """A pandas table with one row per sample, in the order of the index.

        The columns are `key`, `split`, `label` (class id), `name` (of the class), `group`, `cluster`, `box`, the size
        of the original, and its provenance. pandas is in the extra `pandas`.

        Args:
            split: only this split; None for all.

        Raises:
            UsageError: unknown split, a table is missing or damaged, or pandas is not installed.
        """
        self._check_split(split)
        if find_spec("pandas") is None:
            raise UsageError("a data frame needs pandas: pip install 'animesion[pandas]'")
        index = self.index.select(["key", "split", "label"])
        if split is not None:
            index = index.filter(pc.equal(index["split"], split))
        # `curated` checks the columns that every reader needs; the provenance is read without such checks.
        kept = self.curated["key"].filter(self.curated["kept"])
        curated = parquet.read(self.path / "curated.parquet", schemas.CURATED, _PROVENANCE)
        provenance: pd.DataFrame = curated.filter(pc.is_in(curated["key"], value_set=kept)).to_pandas()
        provenance = provenance.rename(columns={"label": "name", "crop": "box"})
        rows: pd.DataFrame = index.to_pandas()
        return rows.merge(provenance, on="key", how="left", validate="one_to_one")

    @functools.cached_property
    def curated(self) -> pa.Table:
        """`curated.parquet`, schema `animesion.schemas.CURATED`: every listed image, kept or with its drop reason.

        Raises:
            UsageError: the table is missing or damaged.
        """
        return self.read_table("curated.parquet")

    def read_table(self, name: str) -> pa.Table:
        """Read `index.parquet` or `curated.parquet`; values are only checked for nulls in required columns.

        Raises:
            UsageError: the table is missing, no Parquet file or of other columns, or a required value is null.
        """
        path = self.path / name
        schema, needed = _TABLES[name]
        if not path.is_file():
            raise UsageError(f"cannot read {path} (no such file): {_REBUILD}")
        try:
            table = parquet.read(path, schema)
        except parquet.DamagedTableError:
            raise UsageError(f"{path} is damaged or does not have a dataset's columns: {_REBUILD}") from None
        if pc.count_distinct(table["key"]).as_py() != len(table):
            raise UsageError(f"{path} is damaged (a key occurs twice): {_REBUILD}")
        for column in needed:
            if table[column].null_count:
                raise UsageError(f"{path} is damaged (null in column {column}): {_REBUILD}")
        return table.combine_chunks()

    # -- samples -----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return sum(split.samples for split in self._facts.splits.values())

    def __getitem__(self, place: int | str) -> Sample:
        """The sample at a position, or with a key.

        Raises:
            IndexError: no sample is at the position.
            KeyError: no sample has the key.
            UsageError: the sample's shard is missing or damaged.
        """
        position = self._positions[place] if isinstance(place, str) else operator.index(place)
        if not -len(self.index) <= position < len(self.index):
            raise IndexError(f"position {position} of a dataset of {len(self.index)} samples")
        row = self._row(position % len(self.index))
        return self._parsed(row, self._pread(row))

    def __contains__(self, key: object) -> bool:
        return key in self._positions

    def _check_split(self, split: str | None) -> None:
        if split is not None and split not in self.splits:
            raise UsageError(f"{self.path} has no split '{split}'; it has {', '.join(self.splits) or 'none'}")

    def samples(self, split: str | None = None) -> Iterator[Sample]:
        """All samples, shard by shard in order, read sequentially.

        Args:
            split: only this split; None for all.

        Raises:
            UsageError: unknown split, or a shard is missing or damaged.
        """
        self._check_split(split)
        return self._stream([split] if split else list(self.splits))

    def _stream(self, chosen: list[str]) -> Iterator[Sample]:
        for shard in (shard for name in chosen for shard in self.splits[name].shards):
            rows = self.index.filter(pc.equal(self.index["shard"], shard.path)).sort_by("sample_offset")
            try:
                with (self.path / shard.path).open("rb") as file:
                    # In batches, as Python objects of a whole shard's rows would take more memory than its table.
                    for batch in rows.to_batches(max_chunksize=1024):
                        for row in batch.to_pylist():
                            file.seek(row["sample_offset"])
                            yield self._parsed(row, file.read(row["sample_size"]))
            except OSError as error:
                raise self._unreadable(shard.path, error) from None

    # -- other libraries ---------------------------------------------------------------------------------------------

    def torch(
        self, split: str | None, size: int = 224, transform: Callable[[Image.Image], Any] | None = None
    ) -> Tensors:
        """The samples of a split for PyTorch's `DataLoader`: `(image, class id)`, in the order of the index.

        Images are float32 of shape (3, size, size), RGB, 0 to 1, not normalised. `animesion_training.data.Stream` is
        faster, augments and resumes.

        Args:
            split: the split; None for all.
            size: the shorter side is resized to it with Lanczos, and the centre square is cropped; in pixels.
            transform: makes something else of an RGB image, such as a transform of torchvision or timm; `size` is then
                unused.

        Raises:
            UsageError: unknown split, or torch is not installed.
        """
        self._check_split(split)
        if size < 1:
            raise UsageError(f"size {size} is no number of pixels: give 1 or more")
        if transform is None and find_spec("torch") is None:
            raise UsageError("tensors need PyTorch: pip install 'animesion[train]'")
        return Tensors(self, split, size, transform)

    def to_hf(self, split: str | None = None, *, streaming: bool = False) -> Any:
        """The samples as Hugging Face datasets read them: rows with `__key__`, the image, `cls` and `json`.

        Args:
            split: only this split; None for a dictionary of all.
            streaming: read the shards as they are, without a conversion to Arrow in the cache.

        Returns:
            `datasets.Dataset`, or its dictionary or streaming variants.

        Raises:
            UsageError: unknown split, or `datasets` is not installed.
        """
        self._check_split(split)
        if find_spec("datasets") is None:
            raise UsageError("Hugging Face datasets are not installed: pip install datasets")
        from datasets import load_dataset

        # absolute, as a relative path may be the name of a repository
        return load_dataset(str(self.path.resolve()), split=split, streaming=streaming)

    def to_fiftyone(self, images: Path | str, split: str | None = None, *, name: str = "") -> Any:
        """The samples as a dataset of FiftyOne, with the class as `ground_truth`, the split as tag, and provenance.

        Args:
            images: folder for the image files, which FiftyOne shows; those of an earlier call are replaced.
            split: only this split; None for all.
            name: name of FiftyOne's dataset; empty for the dataset's own.

        Returns:
            `fiftyone.Dataset`; FiftyOne forgets it at the end of the session unless it is made persistent.

        Raises:
            UsageError: unknown split, FiftyOne is not installed, or it has a dataset of this name.
        """
        self._check_split(split)
        if find_spec("fiftyone") is None:
            raise UsageError("FiftyOne is not installed: pip install fiftyone")
        import fiftyone

        name = name or self.name
        if fiftyone.dataset_exists(name):
            raise UsageError(f"FiftyOne has a dataset '{name}' already: give another name")
        made = fiftyone.Dataset(name)
        made.default_classes = [info.name for info in self.classes]
        made.add_samples(fiftyone_samples.samples(self, split, Path(images)))
        return made

    @functools.cached_property
    def _positions(self) -> Places:
        return Places(self._columns["key"])

    # An Arrow array gives one value in constant time; a chunked array first has to find the chunk.
    @functools.cached_property
    def _columns(self) -> dict[str, pa.Array]:
        return {
            name: self.index[name].chunk(0) if self.index[name].num_chunks else [] for name in self.index.column_names
        }

    def _row(self, position: int) -> dict[str, Any]:
        return {name: column[position].as_py() for name, column in self._columns.items()}

    def _pread(self, row: dict[str, Any]) -> bytes:
        try:
            descriptor = os.open(self.path / row["shard"], os.O_RDONLY)
            try:
                return os.pread(descriptor, row["sample_size"], row["sample_offset"])
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self._unreadable(row["shard"], error) from None

    def _parsed(self, row: dict[str, Any], block: bytes) -> Sample:
        key, label = row["key"], row["label"]
        try:
            fields = shards.sample_members(key, block)
            meta = json.loads(fields["json"])
            if int(fields["cls"]) != label or not isinstance(meta, dict):
                raise ValueError("label")
            return Sample(key, row["split"], label, self.classes[label].name, fields[self.image_field], meta)
        except (KeyError, IndexError, ValueError, RecursionError):
            raise UsageError(
                f"sample {key} in {self.path / row['shard']} does not match index.parquet: "
                f"`animesion verify {self.path}` lists every fault"
            ) from None

    def _unreadable(self, shard: str, error: OSError) -> UsageError:
        cause = (error.strerror or "read error").lower()
        return UsageError(f"cannot read {self.path / shard} ({cause}): copy the shard back or {_REBUILD}")


def _bounds(column: pa.ChunkedArray) -> tuple[int, ...]:
    """Minimum and maximum of a column; empty for a column without rows."""
    return (pc.min(column).as_py(), pc.max(column).as_py()) if len(column) else ()


def _read_facts(folder: Path) -> _DatasetFacts:
    path = folder / "dataset.json"
    if not folder.is_dir():
        raise UsageError(f"folder {folder} does not exist; give the output folder of `animesion build`")
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        if (folder / ".removal/moves.json").exists():
            raise UsageError(f"{folder} has an interrupted removal: run its `animesion remove` again") from None
        raise UsageError(f"{folder} is not a built dataset: dataset.json not found; finish the build first") from None
    except OSError as error:
        raise UsageError(f"cannot read {path} ({(error.strerror or 'read error').lower()}): {_REBUILD}") from None
    try:
        return _DatasetFacts.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"] == ("format",) and isinstance(first["input"], int):
            raise UsageError(
                f"{path} has format {first['input']}, but this version reads format {FORMAT}: install a newer animesion"
            ) from None
        raise UsageError(f"{path} is damaged ({explain(error, _DatasetFacts)}): {_REBUILD}") from None
