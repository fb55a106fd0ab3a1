"""Which folder is the label: how the files of a folder, an archive or a bucket are read as classes and splits.

One reader for every place that holds files: it sees paths, and reads the few side files that carry labels. Listing the
files and reading images is the business of the callers: `animesion.sources.folder`, `animesion.stats.class_counts` and
`animesion_training.data.sources`.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from animesion.dataset import box_files, image_tables, sidecars, table_layouts, text_tables
from animesion.dataset.box_files import Contents
from animesion.dataset.path_parts import parts_of, suffix_of
from animesion.dataset.readings import FOLDER_HINT, Layout, Reading, is_image, layout_of, listed
from animesion.errors import UsageError
from animesion.splits import SPLIT_NAMES, split_folders
from animesion.wording import amount

#: Side files of annotations that name no class of an image: a folder of these is not read as classes.
_ANNOTATION_FOLDERS = frozenset({"labels", "annotations", "masks", "bboxes"})
#: Suffixes of files that hold images -> what to do.
_OTHER_FORMS = {
    (".parquet",): "set source.kind=parquet to read images in Parquet files",
    (".tar",): "set source.kind=webdataset to read shards, or source.path to one .tar of class folders",
    (".arrow",): "write Arrow files of the library datasets with Dataset.to_parquet, and set source.kind=parquet",
    (".zip", ".7z", ".rar", ".gz", ".tgz", ".bz2", ".xz"): "unpack the archives, such as {}",
    (".h5", ".hdf5", ".npz", ".npy", ".mat", ".mdb", ".rec", ".tfrecord", ".pkl"): (
        "write the images in {} as files, in a folder for each class"
    ),
}
#: Suffixes of files that may list images, and how many of these and of the images are looked for.
_ANNOTATIONS, _LOOKED_INTO = frozenset({".json", ".jsonl", ".xml", ".csv", ".tsv", ".txt"}), 8
#: Share of the images that must be two folders deep for the second ones to be classes; strays are no evidence.
_NEARLY = 0.9
#: Words for the forms that a set of images is given in.
_FORMS = frozenset(
    {
        *("original", "originals", "raw", "augmented", "augmentation", "aug", "processed", "preprocessed", "segmented"),
        *("color", "colour", "rgb", "gray", "grey", "grayscale", "greyscale", "resized", "cropped", "clean", "noisy"),
        *("image", "images", "data", "dataset", "set", "photos", "and", "with", "without", "background"),
    }
)
_WORD = re.compile(r"[^\W\d_]+")


def understand(
    paths: Sequence[str],
    contents: Contents,
    where: str,
    *,
    label_level: int = 0,
    pattern: str = "",
    hidden: Sequence[str] = (),
    encoding: str = "",
    table: str = "",
    label_column: str = "",
) -> Layout:
    """Read a tree of files as classes and splits.

    Known are, in this order: a pattern; a label level; `metadata.csv`, `.jsonl`, `.parquet` or `_classes.csv` beside
    the images; split folders of class folders; class folders with split folders in them; class folders; flat folders
    whose images have JSON sidecars with character tags. Where other tables list the images, and the folders are not of
    classes, these tables decide. A `metadata.csv` without a column of classes is passed over where class folders are.

    Args:
        paths: of the files, with slashes, relative to the place; hidden ones left out.
        contents: reads side files by their paths.
        where: the place, for messages.
        label_level: which folder is the class: 1 for the first below the place, -1 for the one that holds the image;
            0 to find out.
        pattern: regular expression for whole paths with a group named `class`, and maybe `split` and `group`.
        hidden: paths of hidden files, among which sidecars may be.
        encoding: legacy encoding of tables beside the images; empty to recognise it.
        table: path of the table that lists images and classes; empty to find out.
        label_column: its column of classes; empty to find out.

    Raises:
        UsageError: there are no images, no classes, or two readings that are equally good.
    """
    images = [path for path in paths if is_image(path)]
    # files without a suffix are images where nothing else is, and a LICENSE otherwise
    images = images or [path for path in paths if not suffix_of(path)]
    if not images:
        raise UsageError(f"{where} holds no image files: {_other_source(paths)}")
    side = sidecars.of_images(images, [*paths, *hidden])
    tables = sidecars.tables(paths)
    if pattern:
        layout = _by_pattern(paths, images, side, pattern, where)
    elif label_level:
        layout = _by_level(paths, side, label_level, where)
    elif table:
        if table not in paths:
            raise UsageError(f"{where} has no file {table}, which source.table names")
        [content] = contents([table])
        chosen = image_tables.read(table, content, images, f"{where}/{table}", encoding, label_column)
        layout = table_layouts.by_image_tables(paths, images, side, [chosen], where)
    elif tables:
        try:
            layout = table_layouts.by_metadata(paths, images, side, tables, contents, where, encoding, label_column)
        except sidecars.NoLabelColumnError as error:  # such as captions: the folders may be classes
            try:
                layout = _by_folder_or_table(paths, images, side, contents, where, encoding, label_column)
            except UsageError:
                raise error from None
            return replace(layout, summary=f"{error.table} has no column of classes; {layout.summary}")
    else:
        return _by_folder_or_table(paths, images, side, contents, where, encoding, label_column)
    return _with_fields(layout, side, contents)


def _by_folder_or_table(
    paths: Sequence[str],
    images: Sequence[str],
    side: Mapping[str, str],
    contents: Contents,
    where: str,
    encoding: str,
    label_column: str,
) -> Layout:
    found = image_tables.find(paths, images, side, contents, where, encoding, label_column)
    of_classes = [table for table in found if table.has_classes]
    if label_column and not of_classes:
        raise UsageError(f"{where} has no table of images with a column {label_column!r}: correct source.label_column")
    if label_column:
        layout = table_layouts.by_image_tables(paths, images, side, of_classes, where, found)
        return _with_fields(layout, side, contents)
    try:
        layout = _by_folder(paths, images, side, contents, where, box_files.find(images, paths, contents))
    except UsageError:  # the folders are none of classes, or may be read in two ways
        if not of_classes:
            # a table that names images, but not clearly their classes, says more
            image_tables.find(paths, images, side, contents, where, encoding, demanded=True)
            raise
        layout = table_layouts.by_image_tables(paths, images, side, of_classes, where, found)
        return _with_fields(layout, side, contents)
    if not of_classes and layout.by == "folder":
        if len(layout.classes) < 2 or box_files.are_parts(layout.classes):
            # parts of one set are no classes, if a table names the images
            image_tables.find(paths, images, side, contents, where, encoding, demanded=True)
        if len(layout.classes) < 2:
            _refuse_annotated(layout, contents, where)
            _refuse_characters(layout, side, contents, where)
    weighed = table_layouts.weighed(layout, paths, images, side, found, where)
    return weighed if weighed.by == layout.by else _with_fields(weighed, side, contents)


def _refuse_annotated(layout: Layout, contents: Contents, where: str) -> None:
    """Raise `UsageError` if a file beside a single class lists its images: it may have the classes."""
    beside = [path for path in layout.left_out if suffix_of(path).lower() in _ANNOTATIONS][:_LOOKED_INTO]
    images = [path.rpartition("/")[2] for path in layout.readings if is_image(path)][:_LOOKED_INTO]
    for path, content in zip(beside, contents(beside) if beside else (), strict=True):
        named = sum(json.dumps(image)[1:-1].encode() in content or image.encode() in content for image in images)
        is_table = suffix_of(path).lower() not in (".json", ".jsonl", ".xml")
        if named and (not is_table or 2 * named >= len(images)):
            raise UsageError(
                f"{where}: all images are in {layout.classes[0] if layout.classes else 'one folder'}, and {path} lists "
                "them: if it has their classes, write them into a metadata.csv with the columns file_name and label; "
                "else set source.label_level=-1"
            )


def _refuse_characters(layout: Layout, side: Mapping[str, str], contents: Contents, where: str) -> None:
    """Raise `UsageError` if the sidecars in a single folder have several characters, and it is named after none."""
    found = [each.labels for each in sidecars.read_all(side, contents).of_image.values() if each.labels]
    tags = {_plain(label) for labels in found for label in labels}
    name = layout.classes[0] if layout.classes else ""
    common = set.intersection(*map(set, found)) if found else set()
    if len(set(found)) > 1 and not common and name and not any(_plain(name) in tag for tag in tags):
        raise UsageError(
            f"{where}: all images are in {name}, and their sidecars have several characters, such as {found[0][0]}: "
            f"set source.path to the folder {name} to take these, or source.label_level=-1 for one class"
        )


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def _other_source(paths: Sequence[str]) -> str:
    """What reads the files of a place without images."""
    first = {suffix_of(path).lower(): path for path in reversed(paths)}
    for suffixes, advice in _OTHER_FORMS.items():
        for suffix in suffixes:
            if suffix in first:
                return advice.format(first[suffix])
    return "an image ends in .jpg, .png, .webp or the like"


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
    levels = _levels(folders, tops, depth, where)
    readings: dict[str, Reading] = {}
    named = {label for path in images if path in inside and (label := levels.label_of(inside[path]))}
    left_out = [path for path in paths if path not in inside]
    for path, parts in inside.items():
        if path in side:
            continue  # a sidecar: it is read with its image
        label = levels.label_of(parts)
        split = levels.splits.get(parts[levels.split], "") if levels.split is not None and len(parts) > 1 else ""
        if label not in named and path not in known:
            left_out.append(path)  # a README beside the classes, or in a folder without images
        elif levels.split is not None and not split:
            left_out.append(path)
        else:
            readings[path] = Reading((label,) if label else (), split)
    for path in _in_unlabelled_splits(readings, known):
        readings[path] = Reading((), readings[path].split)
    layout = layout_of("folder", readings, left_out, root, FOLDER_HINT)
    return _with_fields(layout, side, contents)


def _in_unlabelled_splits(readings: Mapping[str, Reading], images: Set[str]) -> list[str]:
    """Images of a split whose only folder is no class of training, and no other by its name: `test/images`."""
    classes: dict[str, set[str]] = defaultdict(set)
    for path, reading in readings.items():
        if path in images:
            classes[reading.split].update(reading.labels)
    if len(classes["train"]) < 2:
        return []
    unlabelled = {
        split
        for split, found in classes.items()
        if split and len(found) == 1 and not found & classes["train"] and _says_nothing(*found)
    }
    return [path for path, reading in readings.items() if reading.split in unlabelled and path in images]


def _says_nothing(name: str) -> bool:
    return box_files.is_container(name) or name.lower() in text_tables.MISSING


@dataclass(frozen=True)
class _Levels:
    """Which of a path's folders is the class and which the split, from 0, and the folders of splits."""

    label: int
    split: int | None = None
    splits: Mapping[str, str] = field(default_factory=dict)

    def label_of(self, parts: tuple[str, ...]) -> str:
        """The class of a file by the parts of its path; empty for none."""
        return parts[self.label] if len(parts) > self.label + 1 else ""


def _levels(folders: Sequence[tuple[str, ...]], tops: Counter[str], depth: int, where: str) -> _Levels:
    """The levels of a tree of folders below its root.

    Args:
        folders: of each image, without its name.
        tops: images below each first folder.
        depth: of the root.
        where: the place, for messages.
    """
    splits = split_folders(tops)
    named = list(splits)
    others = [top for top in tops if top not in splits and top.lower() not in _ANNOTATION_FOLDERS]
    inner = [parts for parts in folders if len(parts) > 1]
    if not named and len(tops) == 1 and box_files.is_container(next(iter(tops))):
        raise _no_class_folder(list(tops), depth, where)
    if named and not others:
        level = _class_level(inner)
        if not any(len(parts) > level for parts in folders):
            raise _no_class_folder(named, depth, where)
        _refuse_second([parts[level:] for parts in folders if len(parts) > level], depth + level, where)
        return _Levels(level, 0, splits)
    # a split's folder with several folders in it is hardly a class
    several = {top for top in named if len({parts[1] for parts in inner if parts[0] == top}) > 1}
    two_splits = len(set(splits.values())) > 1 and (bool(several) or _share_classes(inner, splits))
    if others and (two_splits or SPLIT_NAMES.keys() & set(map(str.lower, several))):
        level = _class_level([parts for parts in inner if parts[0] in splits])
        raise UsageError(
            f"{where} can be read in two ways: splits {listed(sorted(named))} with {listed(sorted(others))} beside "
            f"them, or {len(tops)} classes. Move the other folders away, or set "
            f"source.label_level={depth + level + 1} or ={depth + 1}"
        )
    below = {parts[1] for parts in inner}
    inner_splits = split_folders(below)
    if len(inner) == len(folders) and below == inner_splits.keys() and len(set(inner_splits.values())) > 1:
        return _Levels(0, 1, inner_splits)
    _refuse_second(folders, depth, where)
    return _Levels(0)


def _refuse_second(folders: Sequence[tuple[str, ...]], depth: int, where: str) -> None:
    """Raise `UsageError` if folders below those at a depth look like classes, too."""
    second = _second_names(folders)
    if not second:
        return
    first = {parts[0] for parts in folders if parts}
    raise UsageError(
        f"{where} can be read in two ways: {len(first):,} classes by the first folder ({listed(sorted(first))}), or "
        f"{len(second):,} by the second ({listed(sorted(second))}): set source.label_level={depth + 1} or "
        f"={depth + 2}" + (", or source.path to one of the first" if max(second.values()) > 1 else "")
    )


def _no_class_folder(names: Sequence[str], depth: int, where: str) -> UsageError:
    return UsageError(
        f"{where}: images lie directly in {listed(sorted(names))}, in no class folder: add a metadata.csv with the "
        "columns file_name and label, or set source.pattern if their names have it, or "
        f"source.label_level={depth + 1} if that is the class"
    )


def _class_level(inner: Sequence[tuple[str, ...]]) -> int:
    """The level of classes below folders of splits: 2 where one folder is in each, as of an unpacked archive.

    Its name is that of the split's folder (`training_set/training_set/<class>`), or one for all
    (`train/images/<class>`).
    """
    if inner and all(parts[0] == parts[1] for parts in inner):
        return 2
    alone = len({parts[1] for parts in inner}) == 1
    return 2 if alone and len({parts[2] for parts in inner if len(parts) > 2}) > 1 else 1


def _share_classes(inner: Iterable[tuple[str, ...]], splits: Mapping[str, str]) -> bool:
    """Whether the same folder names stand below folders of several splits."""
    below: dict[str, set[str]] = defaultdict(set)
    for parts in inner:
        if parts[0] in splits:
            below[splits[parts[0]]].update(parts[1:])
    return len(below) > 1 and bool(set.intersection(*below.values()))


def _second_names(folders: Sequence[tuple[str, ...]]) -> Counter[str]:
    """Folders at the second level that look like classes as the first ones do, with the number of these they are below.

    They do if nearly every image is in one, most first folders have several, and their names are no numbers. Names
    below several first folders are classes in several forms (`color/Apple_rust` and `segmented/Apple_rust`, `fold1/oak`
    and `fold2/oak`), unless these are no forms and there are no more of them than of the first, or all are below each:
    `front` and `back`, or `day-1` and `day-2`, are not classes.
    """
    below: dict[str, set[str]] = defaultdict(set)
    deep = [parts for parts in folders if len(parts) > 1]
    if len(deep) < _NEARLY * len(folders):
        return Counter()
    for first, second, *_ in deep:
        below[first].add(second)
    names = Counter(name for inner in below.values() for name in inner)
    several = sum(len(inner) > 1 for inner in below.values())
    if 2 * several <= len(below) or any(name.isdecimal() for name in names):
        return Counter()
    shared = max(names.values()) > 1
    forms = all(set(_WORD.findall(first.lower())) <= _FORMS for first in below) or (
        _are_numbered(below) and not _are_numbered(names)
    )
    views = all(count == len(below) for count in names.values()) and len(below) > 1
    return Counter() if shared and (views or len(names) <= len(below)) and not forms else names


def _are_numbered(names: Iterable[str]) -> bool:
    """Whether names differ in their numbers alone, as `fold_1` and `fold_2`."""
    return len({re.sub(r"\d+", "", name) for name in names}) == 1


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
                f"({listed(sorted(deeper))}) with images beside them: set source.label_level={depth + 1} or "
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
            "add a metadata.csv with the columns file_name and label, or set source.pattern if their names have it"
        )
    left_out = [path for path in paths if path not in readings and path not in side]
    layout = layout_of("sidecar", readings, left_out, "", "class folders or a metadata.csv would come first")
    return replace(layout, sidecars=frozenset(read.names))


# -- by options of the user -----------------------------------------------------------------------------------------


def _by_level(paths: Sequence[str], side: Mapping[str, str], level: int, where: str) -> Layout:
    folders = {path: parts_of(path)[:-1] for path in paths if path not in side}
    index = level - 1 if level > 0 else level
    labels = {path: parts[index] for path, parts in folders.items() if -len(parts) <= index < len(parts)}
    if not labels:
        raise UsageError(f"{where} has no folder at source.label_level={level}: no path is that deep")
    split_level, splits = _split_level([folders[path] for path in labels], index)
    readings = {}
    for path, label in labels.items():
        split = splits[folders[path][split_level]] if splits else ""
        readings[path] = Reading((label,), split)
    left_out = []
    for path in folders.keys() - labels.keys():
        if is_image(path):
            readings[path] = Reading()
        else:
            left_out.append(path)
    layout = layout_of("folder", readings, left_out, "", f"by source.label_level={level}")
    above: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for path, label in labels.items():
        parts = folders[path]
        end = index if index >= 0 else len(parts) + index
        above[label].add(tuple(part for at, part in enumerate(parts[:end]) if not (splits and at == split_level)))
    if merged := sorted(label for label, places in above.items() if len(places) > 1):
        places = listed(sorted("/".join((*place, merged[0])) for place in above[merged[0]]))
        note = f"{amount(len(merged), 'class is', 'classes are')} below several folders and joined, such as {places}"
        layout = replace(layout, summary=f"{note}; {layout.summary}")
    return layout


def _split_level(folders: Sequence[tuple[str, ...]], label: int) -> tuple[int, Mapping[str, str]]:
    """The level above or below the class at which every folder is named after a split, and their splits; else none."""
    for level in range(min(len(parts) for parts in folders)):
        names = {parts[level] for parts in folders}
        is_label = any(level == (label if label >= 0 else len(parts) + label) for parts in folders)
        splits = split_folders(names)
        if names == splits.keys() and not is_label:
            return level, splits
    return 0, {}


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
    return layout_of("pattern", readings, left_out, "", "by source.pattern")


# -- in words --------------------------------------------------------------------------------------------------------


def _with_fields(layout: Layout, side: Mapping[str, str], contents: Contents) -> Layout:
    """Add the fields of sidecars to readings; the class remains, and what a table states counts first."""
    read = sidecars.read_all({name: path for name, path in side.items() if path in layout.readings}, contents)
    for path, sidecar in read.of_image.items():
        reading = layout.readings[path]
        layout.readings[path] = replace(reading, fields={**sidecar.fields, **reading.fields})
    return replace(layout, sidecars=frozenset(read.names))
