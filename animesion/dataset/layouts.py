"""Which folder is the label: how the files of a folder, an archive or a bucket are read as classes and splits.

One reader for every place that holds files: it sees paths, and reads the few side files that carry labels. Listing the
files and reading images is the business of the callers: `animesion.sources.folder`, `animesion.stats.class_counts` and
`animesion_training.data.sources`.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from animesion.dataset import box_files, sidecars, text_tables
from animesion.dataset.box_files import Contents
from animesion.dataset.path_parts import parts_of, suffix_of
from animesion.errors import UsageError
from animesion.splits import SPLIT_NAMES
from animesion.wording import amount

#: Suffixes of image files, in lower case; what is not among them inside a class folder is listed all the same.
IMAGE_SUFFIXES = frozenset(
    {
        *(".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg"),
        *(".jpg", ".jxl", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".tga", ".tif", ".tiff", ".webp"),
    }
)

#: Side files of annotations that name no class of an image: a folder of these is not read as classes.
_ANNOTATION_FOLDERS = frozenset({"labels", "annotations", "masks", "bboxes"})

#: Classes and files that a sentence names.
_NAMED = 4


@dataclass(frozen=True, slots=True)
class Reading:
    """The reading of one file.

    Attributes:
        labels: class names; none for an image that is in no class, several where a side file lists several.
        split: `train`, `val` or `test`; empty where the layout has no splits.
        group: images of one group belong together; empty for none.
        fields: further values of a side file: `rating`, `author`, `page_url`, `file_url`, `md5`, `licence`.
    """

    labels: tuple[str, ...] = ()
    split: str = ""
    group: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """How a tree of files is read.

    Attributes:
        by: what the classes come from: `folder`, `pattern`, or the name of the side files.
        root: folders that all images lie below, `a/b`; empty for none.
        readings: path -> reading, for every file that counts, images or not.
        left_out: paths of files that belong to no class: stray files, side files, annotations.
        summary: one sentence with what was understood, and the option that changes it.
        sidecars: paths of the files per image that were read, hidden or not.
    """

    by: str
    root: str
    readings: dict[str, Reading]
    left_out: list[str]
    summary: str
    sidecars: frozenset[str] = frozenset()

    @property
    def classes(self) -> list[str]:
        """Class names, sorted."""
        return sorted({label for reading in self.readings.values() for label in reading.labels})

    @property
    def splits(self) -> list[str]:
        """Splits in the order train, val, test; empty where the layout has none."""
        found = {reading.split for reading in self.readings.values()}
        return [split for split in ("train", "val", "test") if split in found]


def understand(
    paths: Sequence[str],
    contents: Contents,
    where: str,
    *,
    label_level: int = 0,
    pattern: str = "",
    hidden: Sequence[str] = (),
    encoding: str = "",
) -> Layout:
    """Read a tree of files as classes and splits.

    Known are, in this order: a pattern; a label level; `metadata.csv`, `.jsonl`, `.parquet` or `_classes.csv` beside
    the images; split folders of class folders; class folders with split folders in them; class folders; flat folders
    whose images have JSON sidecars with character tags.

    Args:
        paths: of the files, with slashes, relative to the place; hidden ones left out.
        contents: reads side files by their paths.
        where: the place, for messages.
        label_level: which folder is the class: 1 for the first below the place, -1 for the one that holds the image;
            0 to find out.
        pattern: regular expression for whole paths with a group named `class`, and maybe `split` and `group`.
        hidden: paths of hidden files, among which sidecars may be.
        encoding: legacy encoding of tables beside the images; empty to recognise it.

    Raises:
        UsageError: there are no images, no classes, or two readings that are equally good.
    """
    images = [path for path in paths if is_image(path)]
    # files without a suffix are images where nothing else is, and a LICENSE otherwise
    images = images or [path for path in paths if not suffix_of(path)]
    if not images:
        raise UsageError(f"{where} holds no image files: an image ends in .jpg, .png, .webp or the like")
    side = sidecars.of_images(images, [*paths, *hidden])
    tables = sidecars.tables(paths)
    if pattern:
        layout = _by_pattern(paths, images, side, pattern, where)
    elif label_level:
        layout = _by_level(paths, side, label_level, where)
    elif tables:
        layout = _by_tables(paths, images, side, tables, contents, where, encoding)
    else:
        return _by_folder(paths, images, side, contents, where, box_files.find(images, paths, contents))
    return _with_fields(layout, side, contents)


def is_image(path: str) -> bool:
    """Whether a file is an image by the suffix of its name."""
    return suffix_of(path).lower() in IMAGE_SUFFIXES


# -- by folder -------------------------------------------------------------------------------------------------------


def _by_folder(
    paths: Sequence[str],
    images: Sequence[str],
    side: Mapping[str, str],
    contents: Contents,
    where: str,
    boxes: box_files.BoxFiles | None,
) -> Layout:
    """By the folders of the images, or else by their sidecars; boxes beside the images must not be lost unseen."""
    if mask := box_files.find_mask(images):
        raise UsageError(
            f"{where} holds masks, such as {mask}, which are no images of a class: move them away, or choose the "
            "images with source.pattern"
        )
    try:
        layout = _folders(paths, images, side, contents, where)
    except UsageError:
        if boxes:
            raise UsageError(f"{where} {boxes.refusal}") from None
        raise
    if boxes and layout.by == "folder" and box_files.are_containers(layout.classes):
        raise UsageError(f"{where} {boxes.refusal}")
    return replace(layout, summary=f"{boxes.note}; {layout.summary}") if boxes else layout


def _folders(
    paths: Sequence[str],
    images: Sequence[str],
    side: Mapping[str, str],
    contents: Contents,
    where: str,
) -> Layout:
    root = _common_root(images, where)
    known = set(images)
    depth = len(parts_of(root)) if root else 0
    inside = {path: parts_of(path)[depth:] for path in paths if _is_below(path, root)}
    folders = [inside[path][:-1] for path in images if path in inside]
    tops = Counter(parts[0] for parts in folders if parts)
    if not tops:
        return _flat(paths, images, side, contents, where)
    levels = _levels(folders, tops, where)
    readings: dict[str, Reading] = {}
    left_out = [path for path in paths if path not in inside]
    for path, parts in inside.items():
        if path in side:
            continue  # a sidecar: it is read with its image
        label = parts[levels.label] if len(parts) > levels.label + 1 else ""
        split = SPLIT_NAMES.get(parts[levels.split].lower(), "") if levels.split is not None and len(parts) > 1 else ""
        if not label and path not in known:
            left_out.append(path)  # a README beside the classes
        elif levels.split is not None and not split:
            left_out.append(path)
        else:
            readings[path] = Reading((label,) if label else (), split)
    layout = _layout("folder", readings, left_out, root, "source.label_level or source.pattern reads them otherwise")
    return _with_fields(layout, side, contents)


@dataclass(frozen=True)
class _Levels:
    """Which of a path's folders is the class and which the split, from 0."""

    label: int
    split: int | None


def _levels(folders: Sequence[tuple[str, ...]], tops: Counter[str], where: str) -> _Levels:
    """The levels of a tree of folders below its root.

    Args:
        folders: of each image, without its name.
        tops: images below each first folder.
        where: the place, for messages.
    """
    named = [top for top in tops if top.lower() in SPLIT_NAMES]
    others = [top for top in tops if top.lower() not in SPLIT_NAMES and top.lower() not in _ANNOTATION_FOLDERS]
    inner = [parts for parts in folders if len(parts) > 1]
    if named and not others:
        if not inner:
            raise UsageError(
                f"{where}: images lie directly in {_listed(sorted(named))}, in no class folder: add a metadata.csv "
                "with the columns file_name and label, or set source.label_level=1 if these are the classes"
            )
        return _Levels(1, 0)
    if others and {SPLIT_NAMES[top.lower()] for top in named} >= {"train", "test"} and _share_classes(inner, named):
        raise UsageError(
            f"{where} can be read in two ways: splits {_listed(sorted(named))} with {_listed(sorted(others))} beside "
            f"them, or {len(tops)} classes. Move the other folders away, or set source.label_level=2 or =1"
        )
    below = {parts[1].lower() for parts in inner}
    if len(inner) == len(folders) and below <= SPLIT_NAMES.keys() and len({SPLIT_NAMES[name] for name in below}) > 1:
        return _Levels(0, 1)
    if _is_two_levels_of_names(folders):
        second = {parts[1] for parts in folders}
        raise UsageError(
            f"{where} can be read in two ways: {len(tops):,} classes by the first folder ({_listed(sorted(tops))}), or "
            f"{len(second):,} by the second ({_listed(sorted(second))}): set source.label_level=1 or =2"
        )
    return _Levels(0, None)


def _share_classes(inner: Iterable[tuple[str, ...]], named: Sequence[str]) -> bool:
    """Whether the same folder names stand below several split folders."""
    below = defaultdict(set)
    for parts in inner:
        if parts[0] in named:
            below[SPLIT_NAMES[parts[0].lower()]].add(parts[1])
    return len(below) > 1 and bool(set.intersection(*below.values()))


def _is_two_levels_of_names(folders: Sequence[tuple[str, ...]]) -> bool:
    """Whether every image is two folders deep and the second level looks like classes, as the first does.

    It does if each first folder holds several second ones and no name occurs below two of them: `day-1` and `images`
    below each class are not classes.
    """
    if any(len(parts) != 2 for parts in folders):
        return False
    below: dict[str, set[str]] = defaultdict(set)
    for first, second in folders:
        below[first].add(second)
    names = [name for inner in below.values() for name in inner]
    several = all(len(inner) > 1 for inner in below.values())
    return several and len(names) == len(set(names)) and not any(name.isdecimal() for name in names)


def _common_root(images: Sequence[str], where: str) -> str:
    """The folders that all images in folders lie below, `a/b`; empty for none.

    Stray images next to these folders do not count: a preview beside `set/` must not turn its classes into one.

    Raises:
        UsageError: one folder holds both images and several folders of images.
    """
    root: list[str] = []
    parts = [parts_of(path) for path in images]
    while True:
        depth = len(root)
        parts = [each for each in parts if len(each) > depth + 1]  # those in a folder at this level
        tops = {each[depth] for each in parts}
        deeper = {each[depth + 1] for each in parts if len(each) > depth + 2}
        if len(tops) != 1 or not deeper or next(iter(tops)).lower() in SPLIT_NAMES:
            return "/".join(root)
        [top] = tops
        if any(len(each) == depth + 2 for each in parts):  # images right in it, too
            if len(deeper) == 1:
                return "/".join(root)
            raise UsageError(
                f"{where} can be read in two ways: 1 class {top}, or {len(deeper):,} classes below it "
                f"({_listed(sorted(deeper))}) with images beside them: set source.label_level={depth + 1} or "
                f"={depth + 2}"
            )
        root.append(top)


def _is_below(path: str, root: str) -> bool:
    return not root or path.startswith(f"{root}/")


def _flat(
    paths: Sequence[str],
    images: Sequence[str],
    side: Mapping[str, str],
    contents: Contents,
    where: str,
) -> Layout:
    """Images in no folder: their sidecars name the classes, or nothing does."""
    read = sidecars.read_all(side, contents)
    found = {path: read.of_image.get(path, sidecars.Sidecar()) for path in images}
    readings = {path: Reading(sidecar.labels, fields=sidecar.fields) for path, sidecar in found.items()}
    if not any(reading.labels for reading in readings.values()):
        raise UsageError(
            f"{where} holds images in no folder, and nothing that names their classes: make a folder for each class, "
            "or add a metadata.csv with the columns file_name and label"
        )
    left_out = [path for path in paths if path not in readings and path not in side]
    layout = _layout("sidecar", readings, left_out, "", "class folders or a metadata.csv would come first")
    return replace(layout, sidecars=frozenset(read.names))


# -- by options of the user -----------------------------------------------------------------------------------------


def _by_level(paths: Sequence[str], side: Mapping[str, str], level: int, where: str) -> Layout:
    folders = {path: parts_of(path)[:-1] for path in paths if path not in side}
    index = level - 1 if level > 0 else level
    labels = {path: parts[index] for path, parts in folders.items() if -len(parts) <= index < len(parts)}
    if not labels:
        raise UsageError(f"{where} has no folder at source.label_level={level}: no path is that deep")
    split_level = _split_level([folders[path] for path in labels], index)
    readings = {}
    for path, label in labels.items():
        split = SPLIT_NAMES[folders[path][split_level].lower()] if split_level is not None else ""
        readings[path] = Reading((label,), split)
    left_out = []
    for path in folders.keys() - labels.keys():
        if is_image(path):
            readings[path] = Reading()
        else:
            left_out.append(path)
    return _layout("folder", readings, left_out, "", f"by source.label_level={level}")


def _split_level(folders: Sequence[tuple[str, ...]], label: int) -> int | None:
    """The level above or below the class at which every folder is named after a split; None if there is none."""
    for level in range(min(len(parts) for parts in folders)):
        names = {parts[level].lower() for parts in folders}
        is_label = any(level == (label if label >= 0 else len(parts) + label) for parts in folders)
        if names <= SPLIT_NAMES.keys() and not is_label:
            return level
    return None


def _by_pattern(
    paths: Sequence[str], images: Sequence[str], side: Mapping[str, str], pattern: str, where: str
) -> Layout:
    compiled = re.compile(pattern)
    readings: dict[str, Reading] = {}
    unknown: set[str] = set()
    for path in paths:
        match = compiled.fullmatch(path) if path not in side else None
        if match is None:
            continue
        groups = match.groupdict()
        split = groups.get("split") or ""
        if split and split.lower() not in SPLIT_NAMES:
            unknown.add(split)
        readings[path] = Reading((match["class"],), SPLIT_NAMES.get(split.lower(), ""), groups.get("group") or "")
    if not readings:
        raise UsageError(f"source.pattern matches none of the {len(images):,} images in {where}, such as {images[0]!r}")
    if unknown:
        raise UsageError(
            f"source.pattern finds the split {sorted(unknown)[0]!r}, which is no name of train, val or test"
        )
    left_out = [path for path in paths if path not in readings and path not in side]
    return _layout("pattern", readings, left_out, "", "by source.pattern")


# -- by tables beside the images -------------------------------------------------------------------------------------


def _by_tables(
    paths: Sequence[str],
    images: Sequence[str],
    side: Mapping[str, str],
    tables: Sequence[str],
    contents: Contents,
    where: str,
    encoding: str,
) -> Layout:
    known = set(images)
    readings: dict[str, Reading] = {}
    missing: list[str] = []
    notes: list[str] = []
    for table, content in zip(tables, contents(tables), strict=True):
        folder = PurePosixPath(table).parent
        folder_split = SPLIT_NAMES.get(folder.name.lower(), "")
        if not table.endswith(".parquet"):
            notes += filter(None, [text_tables.encoding_note(content, table, encoding)])
        for row in sidecars.read_table(table, content, where, encoding):
            path = str(folder / row.file_name)
            if path not in known:
                missing.append(path)
                continue
            reading = Reading(row.labels, row.split or folder_split, row.group, row.fields)
            if path in readings and readings[path].labels != reading.labels:
                labels = sorted({*readings[path].labels, *reading.labels})
                reading = Reading(tuple(labels), reading.split, reading.group, reading.fields)
            readings[path] = reading
    if not readings:
        raise UsageError(
            f"{where}: {tables[0]} names no file that is there, such as {missing[0] if missing else '?'!r}: its column "
            "file_name counts from the folder that holds it"
        )
    unlabelled = [path for path in images if path not in readings]
    readings |= dict.fromkeys(unlabelled, Reading())
    left_out = [path for path in paths if path not in readings and path not in side and path not in tables]
    notes += [f"images in no row: {len(unlabelled):,}"] if unlabelled else []
    notes += [f"rows of missing files: {len(missing):,}"] if missing else []
    name = PurePosixPath(tables[0]).name
    return _layout(name, readings, left_out, "", "; ".join([*notes, "source.label_level takes folders instead"]))


# -- in words --------------------------------------------------------------------------------------------------------


def _with_fields(layout: Layout, side: Mapping[str, str], contents: Contents) -> Layout:
    """Add the fields of sidecars to readings; the class remains, and what a table states counts first."""
    read = sidecars.read_all({name: path for name, path in side.items() if path in layout.readings}, contents)
    for path, sidecar in read.of_image.items():
        reading = layout.readings[path]
        layout.readings[path] = replace(reading, fields={**sidecar.fields, **reading.fields})
    return replace(layout, sidecars=frozenset(read.names))


def _layout(by: str, readings: dict[str, Reading], left_out: Sequence[str], root: str, hint: str) -> Layout:
    layout = Layout(by, root, readings, sorted(left_out), "")
    classes, splits = layout.classes, layout.splits
    words = [amount(len(classes), "class", "classes")]
    words[0] += f" in splits {'/'.join(splits)}" if splits else ""
    words[0] += f", by {by}"
    words[0] += f" below {root}/" if root else ""
    if left_out:
        named = _listed(sorted(map(repr, left_out)))  # an archive among them holds images that are not read
        words.append(f"{amount(len(left_out), 'file')} beside the classes left out, {named}")
    without = sum(not reading.labels for reading in readings.values())
    if without:
        words.append(amount(without, "image has no class", "images have no class"))
    return Layout(by, root, readings, sorted(left_out), f"{'; '.join(words)} ({hint})")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return f"{shown}, ..." if len(names) > _NAMED else shown
