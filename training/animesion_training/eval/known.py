"""Build galleries from data, and add images to them: what `animesion gallery` does.

`gallery` has the format and the comparison, `identify` the network that embeds the images.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from animesion.errors import UsageError
from animesion.images import given
from animesion.progress import Progress
from animesion_training.data import DataSplits
from animesion_training.distributed import DistributedContext
from animesion_training.eval.gallery import Fit, Gallery, GalleryCard, fit_threshold, load, save
from animesion_training.eval.identify import ImageEmbedder, embedder_of
from animesion_training.eval.pieces import FaceCrop, load_detector, pieces
from animesion_training.eval.similarity import FloatArray
from animesion_training.eval.tta import TTA


@dataclass(frozen=True)
class GalleryResult:
    """A gallery that was built or added to.

    Attributes:
        path: its file.
        gallery: the gallery.
        added: number of images that were added to it.
        fit: of its threshold; None if it was not fitted.
        problems: sentences on images that cannot be read, or have no face.
    """

    path: Path
    gallery: Gallery
    added: int
    fit: Fit | None = None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class FitOn:
    """What the threshold of a gallery is fitted on.

    Attributes:
        data: the data; None for those of the gallery.
        split: of the data; empty for `val` if there is one, and for the gallery itself if not.
        false_accept: share of images of unknown classes that may get a name.
    """

    data: DataSplits | None = None
    split: str = ""
    false_accept: float = 0.05


def build(
    checkpoint: Path,
    data: DataSplits,
    out: Path,
    context: DistributedContext,
    *,
    splits: Sequence[str] = (),
    threshold: float | FitOn = FitOn(),
    views: TTA = "flip",
    faces: FaceCrop | None = None,
    progress: Progress | None = None,
) -> GalleryResult:
    """Write a gallery of labelled images.

    Args:
        checkpoint: a run, or a weights file or checkpoint that describes its network.
        data: the images.
        out: file to write.
        context: device to compute on.
        splits: splits to take; `train`, or the only one, if there are none.
        threshold: similarity below which an image is unknown, or what it is fitted on.
        views: views of an image whose embeddings are averaged, also when identifying.
        faces: how faces are cropped; None for whole images.
        progress: receives progress events.

    Raises:
        UsageError: unusable weights or data, several processes, or a threshold that cannot be fitted.
        AnimesionError: without faces, an image cannot be read.
    """
    if context.world_size > 1:
        raise UsageError("a gallery is built by one process: start it without torchrun")
    shown = progress or Progress()
    present = [name for name, samples in data.splits.items() if len(samples)]
    chosen = tuple(splits) or (("train",) if "train" in present else tuple(present[:1]))
    problems: list[str] = []
    embedder = ImageEmbedder(checkpoint, context, views, advance=shown.advanced)

    def embedded(source: DataSplits, split: str) -> tuple[FloatArray, list[str], list[str]]:
        shown.started(f"embed {split}", len(source.select(split)))
        if faces is not None:
            found = embedder.faces(source, split, faces, problems=problems)
        else:
            each = embedder.split(source, split)
            found = each.vectors, [source.classes[i] for i in each.labels.tolist()], list(each.keys)
        shown.finished(f"embed {split}")
        return found

    parts = [embedded(data, split) for split in chosen]
    vectors = np.concatenate([part[0] for part in parts if len(part[1])] or [np.zeros((0, 1), dtype=np.float32)])
    names = [name for part in parts for name in part[1]]
    if not names:
        raise UsageError(f"no image of {data.path} can be used: {problems[0] if problems else 'its splits are empty'}")
    classes = tuple(name for name in data.classes if name in set(names))
    ids = {name: i for i, name in enumerate(classes)}
    card = GalleryCard(
        network=embedder.card.name,
        digest=embedder.digest,
        weights=os.path.relpath(checkpoint, out.parent),
        img_size=embedder.reading.img_size,
        crop_pct=embedder.reading.crop_pct,
        views=views,
        classes=classes,
        images=tuple(key for part in parts for key in part[2]),
        threshold=-1.0 if isinstance(threshold, FitOn) else threshold,
        rule="given",
        fitted="",
    )
    built = Gallery(card, vectors, np.array([ids[name] for name in names], dtype=np.int64))
    fit = None
    if isinstance(threshold, FitOn):
        source = threshold.data or data
        where = threshold.split or ("val" if "val" in source.splits and len(source.splits["val"]) else "")
        if threshold.data is not None and not where:
            raise UsageError(f"--fit-data {source.path} has no split 'val': name one of {', '.join(source.splits)}")
        if not where or (threshold.data is None and where in chosen):
            inside = np.arange(len(vectors), dtype=np.int64)
            fit = fit_threshold(
                built, vectors, names, "the gallery itself", false_accept=threshold.false_accept, inside=inside
            )
        else:
            others, other_names, _ = embedded(source, where)
            fit = fit_threshold(built, others, other_names, where, false_accept=threshold.false_accept)
        built = built.with_threshold(fit.threshold)
    save(built, out)
    return GalleryResult(out, built, len(names), fit, tuple(problems))


def add(
    path: Path,
    folder: Path,
    context: DistributedContext,
    *,
    name: str = "",
    checkpoint: Path | None = None,
    out: Path | None = None,
    faces: FaceCrop | None = None,
    progress: Progress | None = None,
) -> GalleryResult:
    """Add the images of a folder to a gallery as one character; the threshold stays.

    Args:
        path: file of the gallery.
        folder: images of the character, or one image.
        context: device to compute on.
        name: of the character; that of the folder if it is empty.
        checkpoint: the network of the gallery, if it was moved.
        out: file to write; the gallery itself if it is None.
        faces: how faces are cropped; None for whole images.
        progress: receives progress events.

    Raises:
        UsageError: no image can be used, an image is in the gallery already, the folder has folders in it, all faces
            are asked for, or the weights are not those of the gallery.
    """
    if faces is not None and faces.all_faces:
        raise UsageError("all faces of an image would add other characters under this name: leave --all-faces out")
    known = load(path)
    if folder.is_dir() and (below := sorted(each.name for each in folder.iterdir() if each.is_dir())):
        raise UsageError(
            f"{folder} has folders in it, such as {below[0]!r}, and is added as one character: give one at a time, or "
            "build a gallery of all with `animesion gallery build`"
        )
    called = name or folder.resolve().name
    shown = progress or Progress()
    embedder = embedder_of(known, path, checkpoint, context)
    detector = load_detector(faces)
    shown.started("add", None)
    vectors, images, problems = [], [], []
    for each in embedder(piece for image in given.from_files([folder]) for piece in pieces(image, detector, faces)):
        shown.advanced(1)
        if each.vector is None:
            problems.append(f"{each.piece.name}: {each.problem}")
        else:
            vectors.append(each.vector)
            images.append(Path(each.piece.name).name)
    shown.finished("add")
    if not vectors:
        raise UsageError(
            f"no image in {folder} can be used: the gallery stays as it was"
            + (f" (such as {problems[0]})" if problems else "")
        )
    grown = known.add(np.stack(vectors), [called] * len(vectors), images)
    save(grown, out or path)
    return GalleryResult(out or path, grown, len(vectors), None, tuple(problems))
