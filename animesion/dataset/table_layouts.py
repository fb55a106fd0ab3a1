"""Classes by tables beside the images: `metadata.csv` and its like, and tables of any name that list images.

The first kind is a convention, and decides. The second kind is weighed against the folders: these may be classes of
which the table repeats the names, or `train_images`, of which only the table knows the classes.
"""

from __future__ import annotations

import posixpath
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import PurePosixPath

from animesion.dataset import box_files, image_names, sidecars, text_tables
from animesion.dataset.box_files import Contents
from animesion.dataset.image_tables import ImageTable
from animesion.dataset.path_parts import parts_of
from animesion.dataset.readings import FOLDER_HINT, Layout, Reading, is_image, layout_of, listed
from animesion.errors import UsageError
from animesion.splits import SPLIT_NAMES
from animesion.wording import amount

#: Share of the images in a folder that must have one class in a table for the folder to be that class.
_AGREEMENT = 0.95


def by_metadata(
    paths: Sequence[str],
    images: Sequence[str],
    side: Mapping[str, str],
    tables: Sequence[str],
    contents: Contents,
    where: str,
    encoding: str,
    label_column: str,
) -> Layout:
    """By `metadata.csv` and its like, as `sidecars.tables` finds them.

    Raises:
        UsageError: a table cannot be read, or none names an image.
    """
    # tables are composed (NFC), the names of files may be decomposed, as macOS writes them
    known = {path if path.isascii() else unicodedata.normalize("NFC", path): path for path in images}
    readings: dict[str, Reading] = {}
    missing: list[str] = []
    notes: list[str] = []
    for table, content in zip(tables, contents(tables), strict=True):
        folder = PurePosixPath(table).parent
        folder_split = SPLIT_NAMES.get(folder.name.lower(), "")
        if not table.endswith(".parquet"):
            notes += filter(None, [text_tables.encoding_note(content, table, encoding)])
        for row in sidecars.read_table(table, content, where, encoding, label_column):
            name = unicodedata.normalize("NFC", posixpath.normpath(folder / row.file_name))
            path = known.get(name, "")
            if not path:
                missing.append(name)
                continue
            reading = Reading(row.labels, row.split or folder_split, row.group, row.fields)
            if path in readings and readings[path].labels != reading.labels:
                labels = sorted({*readings[path].labels, *reading.labels})
                reading = Reading(tuple(labels), reading.split, reading.group, reading.fields)
            readings[path] = reading
    ids = text_tables.as_class_ids(reading.labels for reading in readings.values())
    readings = {path: replace(reading, labels=ids[reading.labels]) for path, reading in readings.items()}
    if not readings:
        raise UsageError(
            f"{where}: {tables[0]} names no file that is there, such as {missing[0] if missing else '?'!r}: its column "
            "file_name counts from the folder that holds it"
        )
    if not any(reading.split for reading in readings.values()):
        of_folder = _folder_splits(list(readings))
        readings = {path: replace(reading, split=of_folder.get(path, "")) for path, reading in readings.items()}
    unlabelled = [path for path in images if path not in readings]
    readings |= dict.fromkeys(unlabelled, Reading())
    left_out = [path for path in paths if path not in readings and path not in side and path not in tables]
    notes += [f"images in no row: {len(unlabelled):,}"] if unlabelled else []
    notes += [f"rows of missing files: {len(missing):,}"] if missing else []
    name = PurePosixPath(tables[0]).name
    return layout_of(name, readings, left_out, "", "; ".join([*notes, "source.label_level takes folders instead"]))


def by_image_tables(
    paths: Sequence[str],
    images: Sequence[str],
    side: Mapping[str, str],
    tables: Sequence[ImageTable],
    where: str,
    lists: Sequence[ImageTable] = (),
) -> Layout:
    """By tables that list images, and nothing else: an image in no row has no class.

    Args:
        paths: of all files.
        images: of them.
        side: sidecars.
        tables: that have classes.
        where: the place, for messages.
        lists: tables that may have splits alone.

    Raises:
        UsageError: tables have different classes for an image.
    """
    labels = _merged(tables, where)
    others = [table for table in lists if table not in tables]
    splits, note = _stated_splits([*tables, *others], {path for path, found in labels.items() if found})
    used = [*tables, *(table for table in others if splits)]
    splits = splits or _folder_splits(list(labels))
    readings = {path: Reading(labels.get(path, ()), splits.get(path, "")) for path in images}
    layout = _read(readings, paths, side, used)
    return replace(layout, summary=f"{note}; {layout.summary}") if note else layout


def weighed(
    layout: Layout,
    paths: Sequence[str],
    images: Sequence[str],
    side: Mapping[str, str],
    tables: Sequence[ImageTable],
    where: str,
) -> Layout:
    """A layout by folders, or by tables where the folders are none of classes.

    Args:
        layout: by folders.
        paths: of all files.
        images: of them.
        side: sidecars.
        tables: that list images.
        where: the place, for messages.

    Raises:
        UsageError: folders and tables are classes alike, and not the same.
    """
    if layout.by != "folder" or not tables:
        return layout
    classes = layout.classes
    all_contain = len(classes) < 2 or box_files.are_parts(classes)
    containers = set(classes) if all_contain else {name for name in classes if box_files.is_container(name)}
    if not containers and _differing(tables):
        return layout  # several kinds of labels, as of species and of genus, which are not the classes
    labels = _merged(tables, where)
    of_folder: dict[str, Counter[tuple[str, ...]]] = defaultdict(Counter)
    for path, found in labels.items():
        reading = layout.readings.get(path)
        if reading and reading.labels and found:
            of_folder[reading.labels[0]][found] += 1
    clear = {name for name, counts in of_folder.items() if max(counts.values()) >= _AGREEMENT * counts.total()}
    doubtful = {name for name in of_folder if name not in clear or name in containers}
    named = {name for found in labels.values() for name in found}
    sound = set(classes) - containers
    # images in no class folder, or in one that is none, beside class folders of the same names
    outside = [
        path
        for path in labels
        if (reading := layout.readings.get(path)) and (not reading.labels or containers.intersection(reading.labels))
    ]
    # what the table calls the class of a folder, where it has names of its own, such as numbers
    names = {next(iter(of_folder[name].most_common(1)))[0]: (name,) for name in sorted(clear - containers)}
    names = names if len(names) == len(clear - containers) else {}
    names |= {(name,): (name,) for name in sound & named if (name,) not in names}
    if outside and (numbers := _other_first_number(sound, named)):
        raise UsageError(
            f"{where}: folders are classes {min(map(int, sound))} to {max(map(int, sound))}, and {tables[0].path} has "
            f"{min(numbers)} to {max(numbers)}: one counts from zero and the other from one. Make them equal"
        )
    if outside and names and doubtful <= containers:
        other = {path: names.get(found, found if sound & named else ()) for path, found in labels.items()}
        readings = _completed(layout.readings, set(images), other, containers)
        return _read(readings, paths, side, tables, "folder and ")
    if not doubtful:
        others = sum(counts.total() - max(counts.values()) for counts in of_folder.values())
        if others:
            note = f"{tables[0].path} has another class for {amount(others, 'image')}"
            layout = replace(layout, summary=f"{note}; {layout.summary}")
        return _with_table_splits(layout, tables)
    if doubtful <= containers and not sound:
        return by_image_tables(paths, images, side, tables, where)
    path, reading = next(item for item in layout.readings.items() if item[1].labels)
    level = parts_of(path).index(reading.labels[0]) + 1
    raise UsageError(
        f"{where} can be read in two ways: {amount(len(classes), 'class', 'classes')} by folder ({listed(classes)}), "
        f"or {len(named):,} by {tables[0].path} ({listed(sorted(named))}): set source.label_level={level} or "
        f"source.table={tables[0].path}"
    )


def _stated_splits(tables: Sequence[ImageTable], labelled: Set[str]) -> tuple[dict[str, str], str]:
    """The splits that tables state, if labelled images have several, and a note if tables contradict one another."""
    splits: dict[str, str] = {}
    for table in tables:
        for path, split in table.splits.items():
            if splits.setdefault(path, split) != split:
                return {}, f"tables have several splits for {path}, so none count; remove those of other partitions"
    return (splits, "") if len({splits[path] for path in splits.keys() & labelled}) > 1 else ({}, "")


def _other_first_number(folders: Set[str], named: Set[str]) -> list[int]:
    """The numbers that a table has for classes, if they are those of the folders counted from another first one."""
    if not all(name.isdecimal() for name in (*folders, *named)) or len(folders) < 3:
        return []
    ours, theirs = set(map(int, folders)), set(map(int, named))
    shifted = any(theirs <= {number + by for number in ours} for by in (-1, 1))
    return sorted(theirs) if shifted and not theirs <= ours else []


def _with_table_splits(layout: Layout, tables: Sequence[ImageTable]) -> Layout:
    """A layout by folders with the splits of tables, where the folders have none."""
    if layout.splits:
        return layout
    splits, note = _stated_splits(tables, {path for path in layout.readings if is_image(path)})
    if note:
        return replace(layout, summary=f"{note}; {layout.summary}")
    if not splits:
        lost = [note for table in tables if table.in_several for note in table.notes]
        return replace(layout, summary="; ".join([*lost, layout.summary]))
    readings = {path: replace(reading, split=splits.get(path, "")) for path, reading in layout.readings.items()}
    used = [table.path for table in tables if table.splits]
    left_out = [path for path in layout.left_out if path not in used]
    without = sum(not reading.split for path, reading in readings.items() if is_image(path))
    notes = [note for table in tables for note in table.notes if table.splits]
    notes += [f"splits by {listed(used)}", *([f"images in no split: {without:,}"] if without else []), FOLDER_HINT]
    result = layout_of("folder", readings, left_out, layout.root, "; ".join(notes))
    # what was noted in front of the sentence on the folders
    before = layout_of("folder", layout.readings, layout.left_out, layout.root, FOLDER_HINT).summary
    return replace(result, summary=f"{layout.summary.removesuffix(before)}{result.summary}", sidecars=layout.sidecars)


def _completed(
    readings: Mapping[str, Reading], images: Set[str], labels: Mapping[str, tuple[str, ...]], containers: Set[str]
) -> dict[str, Reading]:
    """Readings by folders with the classes of a table for images in containers and in no class folder."""
    result = {}
    for path, reading in readings.items():
        contained = not containers.isdisjoint(reading.labels)
        if contained and path not in images:
            continue
        replaced = contained or (not reading.labels and path in labels)
        result[path] = replace(reading, labels=labels.get(path, ())) if replaced else reading
    return result


def _read(
    readings: dict[str, Reading],
    paths: Sequence[str],
    side: Mapping[str, str],
    tables: Sequence[ImageTable],
    also: str = "",
) -> Layout:
    """The layout of readings by tables, with a sentence."""
    names = {table.path for table in tables}
    left_out = [path for path in paths if path not in readings and path not in side and path not in names]
    notes = [f"{note} ({table.path})" if len(tables) > 1 else note for table in tables for note in table.notes]
    notes += [tables[0].columns, "source.table and source.label_column choose others, source.label_level takes folders"]
    more = f" and {amount(len(tables) - 1, 'other table')}" if len(tables) > 1 else ""
    return layout_of(f"{also}{tables[0].path}{more}", readings, left_out, "", "; ".join(notes))


def _differing(tables: Sequence[ImageTable]) -> tuple[str, str, str] | None:
    """An image and two tables that have different classes for it; None if there is none."""
    first: dict[str, ImageTable] = {}
    for table in tables:
        for path, found in table.labels.items():
            if found and (other := first.setdefault(path, table)).labels[path] != found:
                return path, other.path, table.path
    return None


def _merged(tables: Sequence[ImageTable], where: str) -> dict[str, tuple[str, ...]]:
    """The classes of all images in the tables."""
    if differing := _differing(tables):
        path, *two = differing
        raise UsageError(
            f"{where}: {two[0]} and {two[1]} have different classes for {path}: set source.table to one of them, or "
            "source.label_level for folders"
        )
    merged: dict[str, tuple[str, ...]] = {}
    for table in tables:
        for path, found in table.labels.items():
            merged[path] = merged.get(path) or found
    return merged


def _folder_splits(images: Sequence[str]) -> dict[str, str]:
    """The splits of images by their folders, where these are of several."""
    level, splits = image_names.split_level(images)
    found = {}
    for path in images:
        parts = parts_of(path)
        if len(parts) > level + 1 and parts[level] in splits:
            found[path] = splits[parts[level]]
    return found if len(set(found.values())) > 1 else {}
