"""Class folders on disk, with or without split folders above them: which image is in which class of which split."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from animesion.errors import UsageError

#: Files that count as images, by their suffix in lower case.
IMAGE_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

#: Folder name -> the split that it is.
SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class SplitFolders:
    """The class folders of one split.

    Attributes:
        root: the folder that holds them.
        images: class name -> paths of its images relative to its folder, sorted.
    """

    root: Path
    images: dict[str, list[str]]


def read(root: Path) -> dict[str, SplitFolders]:
    """The class folders of each split; of the split `all` where there are no split folders.

    Folders are split folders when every folder in `root` is named after a split. Names that start with a dot are
    passed over. A class folder may be a link; links inside it are not followed.

    Raises:
        UsageError: a folder cannot be listed, or two folders are the same split.
    """
    folders = _subfolders(root)
    roots = {"all": root}
    if folders and all(folder.name in SPLIT_FOLDERS for folder in folders):
        roots = {SPLIT_FOLDERS[folder.name]: folder for folder in folders}
        if len(roots) < len(folders):
            raise UsageError(f"{root} has several folders for one split; leave one of val, valid, validation")
    return {
        split: SplitFolders(top, {folder.name: _images(folder) for folder in _subfolders(top)})
        for split, top in roots.items()
    }


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise UsageError(f"{folder} cannot be listed ({error.strerror}); give a readable folder") from None


def _images(folder: Path) -> list[str]:
    found = []
    for base, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = PurePosixPath(*Path(base).relative_to(folder).parts)
        found += [
            str(inside / name)
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
        ]
    return sorted(found)
