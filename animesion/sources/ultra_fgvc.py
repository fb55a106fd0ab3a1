"""The source for the Ultra-FGVC cultivar sets as released: Cotton80, SoyLocal, SoyGlobal, SoyGene and SoyAgeing.

There are two layouts: flat folders with class and split in the file names, and folders with `anno/*.txt` and `images/`.
The published counts are in `animesion.sources.published_facts`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from animesion.config.settings import Section
from animesion.dataset import label_files
from animesion.errors import UsageError
from animesion.schemas import DropReason, Item
from animesion.sources import clean_text, file_key
from animesion.sources.published_facts import PUBLISHED, PublishedSet
from animesion.sources.published_sets import PublishedFiles, PublishedOptions, check_complete, hold_out_validation
from animesion.wording import amount

_FLAT = re.compile(r"(\d{1,6})_(\w{1,40})_(train|test)\.(?:png|jpe?g|bmp|tiff?|webp)", re.ASCII | re.IGNORECASE)
_ANNO = re.compile(r"((?:.*/)?)anno/(train|test)\.txt")
_ALIASES = {alias: each.name for each in PUBLISHED.values() for alias in each.aliases if each.source == "ultra-fgvc"}


class UltraFgvcOptions(PublishedOptions):
    """Options of the `ultra-fgvc` source."""

    set: Literal["cotton80", "soy-local", "soy-global", "soy-gene", "soy-ageing"] = Field(
        description="the set; the names of the GLSim label files (cotton, soy, soylocal, ...) work too"
    )
    stage: Literal["", "R1", "R3", "R4", "R5", "R6"] = Field("", description="one stage of soy-ageing; empty for all")
    val: bool = Field(
        False, description="hold out the last fifth of each class's training images as val, as the GLSim tools do"
    )

    @field_validator("set", mode="before")
    @classmethod
    def _resolve_alias(cls, value: Any) -> Any:
        return _ALIASES.get(value, value) if isinstance(value, str) else value


class UltraFgvcSource(PublishedFiles):
    """Leaves of cultivars with the published split."""

    Options: ClassVar[type[Section]] = UltraFgvcOptions
    summary: ClassVar[str] = "Cotton80, SoyLocal, SoyGlobal, SoyGene, SoyAgeing as downloaded; published splits kept"
    remote: ClassVar[bool] = False

    def __init__(self, options: UltraFgvcOptions, published: PublishedSet | None = None) -> None:
        """Keep the options; nothing is read yet.

        Args:
            options: options of the source.
            published: expected counts, by default those of `animesion.sources.published_facts`.
        """
        super().__init__(options)
        self.options = options
        self._due = published or PUBLISHED[options.set]

    def items(self) -> Iterator[Item]:
        """One item per image of the published split: train before test, by class and name.

        Raises:
            UsageError: the layout is not this set's, a row is malformed, or counts differ from the published ones.
        """
        due, options = self._due, self.options
        if options.stage:
            if options.stage not in due.groups:
                raise UsageError(f"source.stage: {due.title} has no stages; remove this option")
            due = due.select_group(options.stage)
        paths = self._paths(due)
        raw = self._read_annotations(paths, due) if due.layout[0].endswith(".txt") else self._flat(paths, due)
        if options.labels:
            raw = self._read_label_files(raw, paths, due)
        raw.sort(key=lambda row: (row[1] == "test", row[1], row[2], row[3], _natural(row[0])))
        items = [
            self._item(paths.get(path), path, split, number, order)
            for order, (path, split, number, _) in enumerate(raw)
        ]
        if options.val and not any(item.split == "val" for item in items):
            items = hold_out_validation(items)
        groups = {item.key: row[3] for item, row in zip(items, raw, strict=True)}
        self.notes += check_complete(items, due, options.incomplete, groups)
        yield from items

    # -- layouts -------------------------------------------------------------------------------------------------------

    def _paths(self, due: PublishedSet) -> dict[str, Item]:
        """Files by path below the set's own folder, which may be next to those of other sets."""
        paths = self.files()
        for folder in due.folders:
            inside = {path.partition("/")[2]: item for path, item in paths.items() if path.startswith(f"{folder}/")}
            if inside:
                return inside
        return paths

    def _flat(self, paths: Mapping[str, Item], due: PublishedSet) -> list[tuple[str, str, int, str]]:
        rows = []
        for path in paths:
            match = _FLAT.fullmatch(PurePosixPath(path).name)
            if match and int(match[1]):
                rows.append((path, match[3].lower(), int(match[1]) - 1, ""))
        self._note_others(len(paths) - len(rows))
        if not rows:
            raise self._wrong_layout(paths, due)
        return rows

    def _read_annotations(self, paths: Mapping[str, Item], due: PublishedSet) -> list[tuple[str, str, int, str]]:
        rows: list[tuple[str, str, int, str]] = []
        split_of: dict[str, str] = {}
        read = 0
        for path, item in paths.items():
            match = _ANNO.fullmatch(path)
            group = PurePosixPath(match[1]).name if match else ""
            known = group if group in PUBLISHED["soy-ageing"].groups else ""
            if not match or known not in (due.groups or ("",)):
                continue
            [payload] = self.read([item])
            if payload.reason:
                raise UsageError(f"source.path: {path} cannot be read ({payload.detail or payload.reason})")
            read += 1
            for name, number in label_files.read_annotations(payload.content, f"{self.options.path}/{path}"):
                image = _first_existing(paths, (f"{match[1]}images/{name}", f"{match[1]}{name}"))
                if image in split_of:
                    raise UsageError(
                        f"{self.options.path}/{path}: {clean_text(name, 80)!r} is listed twice "
                        f"({split_of[image]}, {match[2]}); delete one of the rows"
                    )
                split_of[image] = match[2]
                rows.append((image, match[2], number - 1, known))
        if not rows:
            raise self._wrong_layout(paths, due)
        if not due.groups or len(due.groups) > 1:
            self._note_others(len(paths) - read - sum(image in paths for image in split_of))
        return rows

    def _read_label_files(
        self, raw: Sequence[tuple[str, str, int, str]], paths: Mapping[str, Item], due: PublishedSet
    ) -> list[tuple[str, str, int, str]]:
        """Rows of label files, with the files that their paths match."""
        stage = self.options.stage
        by_name: dict[str, list[str]] = {}
        for path in paths:
            by_name.setdefault(PurePosixPath(path).name, []).append(path)
        group_of = {path: group for path, _, _, group in raw}
        rows, seen = [], set()
        for split, file in select_label_files(Path(self.options.labels), stage, val=self.options.val):
            table = label_files.read_labels(file)
            for number, name in zip(table.class_ids.tolist(), table.paths, strict=True):
                path = _first_existing(paths, (name, f"{stage}/{name}", f"{stage}/images/{name}", f"images/{name}"))
                same = by_name.get(PurePosixPath(name).name, []) if path not in paths else [path]
                if len(same) > 1:
                    raise UsageError(
                        f"{file}: {clean_text(name, 80)!r} matches {clean_text(same[0], 80)} and "
                        f"{clean_text(same[1], 80)}; use unambiguous paths"
                    )
                path = same[0] if same else path
                if path in seen:
                    raise UsageError(f"{file}: {clean_text(name, 80)!r} is listed twice; delete one of the rows")
                seen.add(path)
                rows.append((path, split, number, group_of.get(path, stage)))
        return rows

    def _note_others(self, count: int) -> None:
        if count > 0:
            self.notes.append(f"{amount(count, 'other file')} skipped")

    def _wrong_layout(self, paths: Mapping[str, Item], due: PublishedSet) -> UsageError:
        expected = " and ".join(due.layout)
        some = ", ".join(clean_text(path, 60) for path in list(paths)[:3])
        return UsageError(
            f"source.path: {self.options.path} is not laid out as {due.title}: expected {expected}"
            f"{_other_layout(paths)}; found {some}; set source.path to the folder that the authors' archive unpacks to"
        )

    def _item(self, file: Item | None, path: str, split: str, number: int, order: int) -> Item:
        name = self._due.name
        listed = file or Item("", "", path, "{}", 0, failure=DropReason.MISSING_FILE)
        return replace(
            listed,
            key=file_key(name, path.encode("utf-8", "surrogateescape"), PurePosixPath(path).stem),
            source="ultra-fgvc",
            source_id=f"{name}/{clean_text(path, 900)}",
            order=order,
            labels=(f"cultivar-{number + 1:0{len(str(self._due.classes))}d}",),
            families=(),
            split=split,
            class_order=number,
        )


def select_label_files(folder: Path, group: str, *, val: bool) -> list[tuple[str, Path]]:
    """The label files of a folder to read, with the split of each.

    A folder of the GLSim family contains train, val and train_val: with `val` the first two are read, without it
    train_val, or train and val together if that does not exist.

    Args:
        folder: folder of the files.
        group: stage in the names, such as `R1`; empty for files without one.
        val: whether to read a val split.

    Raises:
        UsageError: the folder, or its training or test file, does not exist.
    """
    folder = folder.expanduser()
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise UsageError(f"source.labels: {folder} cannot be listed ({error.strerror}); set it to a folder") from None
    files: dict[str, Path] = {}
    for name in names:
        known = label_files.label_file(name)
        if known and known[1] == group:
            files.setdefault(known[0], folder / name)
    parts = ("train", "val") if "train" in files and "val" in files and (val or "train_val" not in files) else ()
    chosen = [(part if val else "train", files[part]) for part in parts or ("train_val", "train") if part in files]
    if not parts:
        chosen = [("train", path) for _, path in chosen[:1]]
    if not chosen or "test" not in files:
        suffix = f"_{group}" if group else ""
        raise UsageError(
            f"source.labels: {folder} must contain test{suffix}.csv and train{suffix}.csv or train_val{suffix}.csv"
        )
    return [*chosen, ("test", files["test"])]


def _first_existing(paths: Mapping[str, Item], candidates: Sequence[str]) -> str:
    return next((path for path in candidates if path in paths), candidates[0])


def _other_layout(paths: Mapping[str, Item]) -> str:
    """The layout that the files have instead, as part of a message."""
    if any(re.search(r"(?:^|/)R[1-6]/anno/", path) for path in paths):
        return ", but this is SoyAgeing (folders R1 to R6)"
    if any(_ANNO.fullmatch(path) for path in paths):
        return ", but this has anno/train.txt, as SoyGene has"
    if any(_FLAT.fullmatch(PurePosixPath(path).name) for path in paths):
        return ", but this has names such as 1_1_train.png, as Cotton80, SoyLocal and SoyGlobal have"
    return ""


def _natural(path: str) -> tuple[tuple[int, str], ...]:
    """Natural sort key, in which 10 is after 9."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", path))
