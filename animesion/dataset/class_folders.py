"""List the images of class folders on disk, with or without split folders above them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from animesion.errors import UsageError

#: Suffixes of image files, in lower case.
IMAGE_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

#: Split by folder name.
SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class SplitFolders:
    """The class folders of one split.

    Attributes:
        root: the folder that contains the class folders.
        images: paths of the images by class name, relative to the class folder and sorted.
    """

    root: Path
    images: dict[str, list[str]]


def read(root: Path) -> dict[str, SplitFolders]:
    """The class folders of each split, or of the split `all` if there are no split folders.

    Folders are split folders if every folder in `root` has the name of a split. Names that start with a dot are
    ignored. A class folder may be a link; links inside it are not followed.

    Raises:
        UsageError: a folder cannot be listed, or two folders are the same split.
    """
    folders = _subfolders(root)
    roots = {"all": root}
    if folders and all(folder.name in SPLIT_FOLDERS for folder in folders):
        roots = {SPLIT_FOLDERS[folder.name]: folder for folder in folders}
        if len(roots) < len(folders):
            raise UsageError(f"{root} has several folders for one split; keep one of val, valid and validation")
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
    images = []
    for base, folders, names in os.walk(folder):
        # Assigning in place keeps os.walk out of hidden folders.
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = PurePosixPath(*Path(base).relative_to(folder).parts)
        images += [
            str(inside / name)
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
        ]
    return sorted(images)
