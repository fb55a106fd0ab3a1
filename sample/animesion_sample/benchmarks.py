"""Drawn images in the layouts of fine-grained benchmarks, with label files as those are published.

Names of classes and files are invented, in the form of the set's own. Photographs of birds, cars or food are drawn as
photographs of leaves, and cartoon faces as drawn heads: the layouts matter here, not the subjects.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np

from animesion_sample import leaves
from animesion_sample.characters import CAST
from animesion_sample.written import face, put, text

SIDE = 112

#: Images of a class by split, in each set with those splits.
_SIZES = {"train": 4, "val": 2, "test": 3}


class _Image(NamedTuple):
    """One image to be drawn: the class from 1, its split, and its number within both, from 1."""

    number: int
    split: str
    at: int


class _Drawer(NamedTuple):
    """What a writer of a set is given: classes, seed and place."""

    classes: int
    seed: int
    folder: Path

    def images(self, *splits: str) -> Iterator[_Image]:
        """The images of a set with these splits, by class."""
        for number in range(1, self.classes + 1):
            for split in splits:
                # classes of unequal size, as in most sets
                for index in range(1, _SIZES[split] + (number % 2 if split == "test" else 0) + 1):
                    yield _Image(number, split, index)

    def draw(self, image: _Image, path: str) -> None:
        """Draw a photograph."""
        species = "cotton" if image.number % 3 == 0 else "soybean"
        leaf = leaves.DrawnLeaf(species, image.number, f"{self.seed}/{image.split}/{image.at}", SIDE, outdoors=True)
        put(self.folder / path, leaves.render(leaf), "JPEG", quality=90)

    def number(self, image: _Image, digits: int) -> int:
        """A number of the image that follows no order, as numbers of photographs on a site."""
        return Random(f"{self.seed}/{image}").randrange(10 ** (digits - 1), 10**digits)

    def write(self, path: str, lines: Sequence[str], end: str = "\n") -> None:
        """Write a list."""
        text(self.folder / path, "".join(line + end for line in lines))


def write(name: str, classes: int, seed: int, folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Draw a set into an empty folder.

    Args:
        name: of the set, a key of `WRITERS`.
        classes: number of classes.
        seed: another seed draws other images.
        folder: where the download's own folder would be.

    Returns:
        Images by split, and images per class by split where all classes have as many.
    """
    images = list(WRITERS[name](_Drawer(classes, seed, folder)))
    sizes = Counter(image.split for image in images)
    per_class = {split: _SIZES[split] for split in ("train", "val") if split in sizes}
    return dict(sizes), per_class


def _cub(drawer: _Drawer) -> list[_Image]:
    """Tables that are joined by the image's number."""
    images = list(drawer.images("train", "test"))
    paths = [
        f"{_bird(each.number)}/{_bird(each.number)[4:]}_{each.at:04d}_{drawer.number(each, 5)}.jpg" for each in images
    ]
    for image, path in zip(images, paths, strict=True):
        drawer.draw(image, f"CUB_200_2011/images/{path}")
    rows = list(enumerate(zip(images, paths, strict=True), 1))
    drawer.write("CUB_200_2011/images.txt", [f"{i} {path}" for i, (_, path) in rows])
    drawer.write("CUB_200_2011/image_class_labels.txt", [f"{i} {image.number}" for i, (image, _) in rows])
    drawer.write("CUB_200_2011/train_test_split.txt", [f"{i} {int(image.split == 'train')}" for i, (image, _) in rows])
    drawer.write("CUB_200_2011/bounding_boxes.txt", [f"{i} 8.0 8.0 96.0 96.0" for i, _ in rows])
    drawer.write("CUB_200_2011/classes.txt", [f"{n} {_bird(n)}" for n in range(1, drawer.classes + 1)])
    drawer.write("attributes.txt", ["1 has_bill_shape::dagger"])
    return images


def _bird(number: int) -> str:
    return f"{number:03d}.Drawn_Bird_{number}"


def _nabirds(drawer: _Drawer) -> list[_Image]:
    """As CUB-200-2011, with UUIDs, and with a tree of classes of which the images have only leaves."""
    images = list(drawer.images("train", "test"))
    rows = []
    for image in images:
        digest = uuid.UUID(int=Random(f"{drawer.seed}/{image}").getrandbits(128))
        path = f"{_node(image.number):04d}/{digest.hex}.jpg"
        drawer.draw(image, f"nabirds/images/{path}")
        rows.append((str(digest), path, image))
    drawer.write("nabirds/images.txt", [f"{key} {path}" for key, path, _ in rows])
    drawer.write("nabirds/image_class_labels.txt", [f"{key} {_node(image.number)}" for key, _, image in rows])
    drawer.write("nabirds/train_test_split.txt", [f"{key} {int(image.split == 'train')}" for key, _, image in rows])
    drawer.write("nabirds/photographers.txt", [f"{key} Drawn Photographer" for key, _, _ in rows])
    tree = ["0 Birds", *(f"{number} Drawn Family {number}" for number in range(1, drawer.classes + 1))]
    names = [f"{_node(n)} Drawn Warbler {n} (Adult male)" for n in range(1, drawer.classes + 1)]
    drawer.write("nabirds/classes.txt", [*tree, *names])
    drawer.write("nabirds/hierarchy.txt", [f"{_node(n)} {n}" for n in range(1, drawer.classes + 1)])
    return images


def _node(number: int) -> int:
    """Number of a leaf of the tree, with gaps."""
    return 290 + 7 * number


def _aircraft(drawer: _Drawer) -> list[_Image]:
    """Lists of a number without `.jpg` and a variant, which has blanks and slashes."""
    variants = [("Drawn 707-{}", "F/A-{}", "Model B{}")[n % 3].format(n) for n in range(1, drawer.classes + 1)]
    images = list(drawer.images("train", "val", "test"))
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for image in images:
        number = drawer.number(image, 7)
        drawer.draw(image, f"fgvc-aircraft-2013b/data/images/{number}.jpg")
        lists[image.split].append(f"{number} {variants[image.number - 1]}")
    for split, lines in lists.items():
        drawer.write(f"fgvc-aircraft-2013b/data/images_variant_{split}.txt", lines)
    drawer.write("fgvc-aircraft-2013b/data/images_variant_trainval.txt", lists["train"] + lists["val"])
    drawer.write("fgvc-aircraft-2013b/data/variants.txt", variants)
    return images


def _pets(drawer: _Drawer) -> list[_Image]:
    """Lists of a name without `.jpg` and three numbers; cats have a capital, and some images are in no list."""
    images = list(drawer.images("train", "test"))
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for image in images:
        cat = image.number % 2
        name = f"Drawn_Cat_{image.number}" if cat else f"drawn_dog_{image.number}"
        stem = f"{name}_{image.at + 100 * (image.split == 'test')}"
        drawer.draw(image, f"oxford-iiit-pet/images/{stem}.jpg")
        lists[image.split].append(f"{stem} {image.number} {1 if cat else 2} {(image.number + 1) // 2}")
    for split, file in (("train", "trainval"), ("test", "test")):
        drawer.write(f"oxford-iiit-pet/annotations/{file}.txt", lists[split])
    head = ["#Image CLASS-ID SPECIES BREED ID", "#ID: 1:37 Class ids"]
    drawer.write("oxford-iiit-pet/annotations/list.txt", [*head, *lists["train"], *lists["test"]])
    drawer.draw(_Image(1, "test", 99), "oxford-iiit-pet/images/Drawn_Cat_1_299.jpg")
    return images


def _food(drawer: _Drawer) -> list[_Image]:
    """Lists of folder and number without `.jpg`."""
    images = list(drawer.images("train", "test"))
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for image in images:
        path = f"drawn_dish_{image.number:02d}/{drawer.number(image, 7)}"
        drawer.draw(image, f"food-101/images/{path}.jpg")
        lists[image.split].append(path)
    for split, lines in lists.items():
        drawer.write(f"food-101/meta/{split}.txt", lines)
    drawer.write("food-101/meta/classes.txt", [f"drawn_dish_{n:02d}" for n in range(1, drawer.classes + 1)])
    drawer.write("food-101/meta/labels.txt", [f"Drawn dish {n:02d}" for n in range(1, drawer.classes + 1)])
    return images


def _vegfru(drawer: _Drawer) -> list[_Image]:
    """Two parts with lists of their own, each with classes from 0; the first class alone is a fruit."""
    images = list(drawer.images("train", "val", "test"))
    lists: dict[str, list[str]] = {f"{part}_{split}": [] for part in ("veg", "fru") for split in _SIZES}
    for image in images:
        part, place = ("fru", "fru92") if image.number == 1 else ("veg", "veg200")
        path = f"Drawn_{part}_{image.number}/{part[0]}_{image.number:02d}_{image.split}_{image.at:04d}.jpg"
        drawer.draw(image, f"{place}_images/{path}")
        lists[f"{part}_{image.split}"].append(f"{path} {0 if part == 'fru' else image.number - 2}")
    for name, lines in lists.items():
        drawer.write(f"{'fru92' if name.startswith('fru') else 'veg200'}_lists/{name}.txt", lines)
    return images


def _dogs(drawer: _Drawer) -> list[_Image]:
    """Lists as cells of paths and labels from 1; annotations have no suffix."""
    images = list(drawer.images("train", "test"))
    lists: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for image in images:
        synset = f"n{2085000 + image.number:08d}"
        path = f"{synset}-Drawn_Dog_{image.number}/{synset}_{image.at + 100 * (image.split == 'test')}.jpg"
        drawer.draw(image, f"Images/{path}")
        drawer.write(f"Annotation/{path.removesuffix('.jpg')}", ["<annotation></annotation>"])
        lists[image.split].append((path, image.number))
    for split, rows in lists.items():
        paths = [path for path, _ in rows]
        arrays = {
            "file_list": _cell(paths).T,
            "annotation_list": _cell([path.removesuffix(".jpg") for path in paths]).T,
            "labels": np.array([[number] for _, number in rows], dtype=np.uint8),
        }
        _save(drawer.folder / f"{split}_list.mat", arrays)
    return images


def _cars(drawer: _Drawer) -> list[_Image]:
    """The devkit's struct arrays, with image numbers from 1 in both splits, and the labels of test in a file apart."""
    images = list(drawer.images("train", "test"))
    boxes = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2"]
    for split, file in (("train", "devkit/cars_train_annos"), ("test", "cars_test_annos_withlabels")):
        listed = [image for image in images if image.split == split]
        Random(f"{drawer.seed}/{split}").shuffle(listed)  # the lists are not in the order of the classes
        fields = [*boxes, "class", "fname"]
        rows = np.zeros((1, len(listed)), dtype=[(name, object) for name in fields])
        for i, image in enumerate(listed):
            drawer.draw(image, f"cars_{split}/{i + 1:05d}.jpg")
            rows[0, i] = (*(np.array([[each]], dtype=np.uint16) for each in (8, 8, 96, 96)),
                          np.array([[image.number]], dtype=np.uint8), f"{i + 1:05d}.jpg")  # fmt: skip
        _save(drawer.folder / f"{file}.mat", {"annotations": rows})
        if split == "test":
            unlabelled = np.zeros(rows.shape, dtype=[(name, object) for name in fields if name != "class"])
            for name in unlabelled.dtype.names or ():
                unlabelled[name] = rows[name]
            _save(drawer.folder / "devkit/cars_test_annos.mat", {"annotations": unlabelled})
    names = [f"Drawn Motors {n} {'Sedan' if n % 2 else 'Ram C/V Van'} 2012" for n in range(1, drawer.classes + 1)]
    _save(drawer.folder / "devkit/cars_meta.mat", {"class_names": _cell(names)})
    return images


def _flowers(drawer: _Drawer) -> list[_Image]:
    """Vectors of labels and of image numbers; images are numbered without regard to class or split."""
    images = list(drawer.images("train", "val", "test"))
    order = list(range(1, len(images) + 1))
    Random(f"{drawer.seed}/flowers").shuffle(order)
    labels = np.zeros((1, len(images)), dtype=np.uint8)
    sets: dict[str, list[int]] = {"trnid": [], "valid": [], "tstid": []}
    for number, image in zip(order, images, strict=True):
        drawer.draw(image, f"jpg/image_{number:05d}.jpg")
        labels[0, number - 1] = image.number
        sets[{"train": "trnid", "val": "valid", "test": "tstid"}[image.split]].append(number)
    _save(drawer.folder / "imagelabels.mat", {"labels": labels})
    _save(drawer.folder / "setid.mat", {name: np.array([each], dtype=np.uint16) for name, each in sets.items()})
    return images


def _inaturalist(drawer: _Drawer) -> list[_Image]:
    """A JSON file per split, in which the ids of images and annotations are unrelated."""
    images = list(drawer.images("train", "val"))
    categories = [
        {"id": n - 1, "name": f"Plantago pict{chr(97 + n // 26)}{chr(97 + n % 26)}", "supercategory": "Plantae"}
        for n in range(1, drawer.classes + 1)
    ]
    licences = [
        {"id": 1, "name": "Attribution-NonCommercial License", "url": "http://creativecommons.org/licenses/by-nc/4.0/"}
    ]
    for split, base in (("train", 0), ("val", 500_000)):
        listed, annotations = [], []
        for i, image in enumerate(each for each in images if each.split == split):
            species = categories[image.number - 1]["name"]
            digest = f"{Random(f'{drawer.seed}/{image}').getrandbits(128):032x}"
            path = f"train_val_images/Plantae/{species}/{digest}.jpg"
            drawer.draw(image, path)
            listed.append(
                {"id": base + i, "width": SIDE, "height": SIDE, "file_name": path, "license": 1,
                 "rights_holder": "Drawn Observer"}
            )  # fmt: skip
            annotations.append({"id": base + 7 * i, "image_id": base + i, "category_id": image.number - 1})
        data = {
            "info": {"year": 2017},
            "images": listed,
            "licenses": licences,
            "annotations": annotations[::-1],
            "categories": categories,
        }
        text(drawer.folder / f"{split}2017.json", json.dumps(data))
    return images


def _icartoonface(drawer: _Drawer) -> list[_Image]:
    """Numbered folders of faces, with a list of boxes next to them; there is no split."""
    images = []
    boxes = []
    for number, design in enumerate(CAST[: drawer.classes]):
        name = f"personai_icartoonface_rectrain_{number:05d}"
        for index in range(12 + number % 3):
            path = f"{name}/{name}_{index:07d}.jpg"
            head = face(design.name, f"{drawer.seed}/icartoonface/{index}", SIDE)
            root = drawer.folder / "personai_icartoonface_rectrain"
            put(root / "icartoonface_rectrain" / path, head, "JPEG", quality=92)
            boxes.append(f"{path} 8 8 104 104")
            images.append(_Image(number + 1, "", index))
    drawer.write("personai_icartoonface_rectrain/icartoonface_rectrain_det.txt", boxes)
    return images


def _cell(texts: Sequence[str]) -> np.ndarray[tuple[int, int], np.dtype[np.object_]]:
    """A cell array of one row."""
    cell = np.empty((1, len(texts)), dtype=object)
    cell[0] = texts
    return cell


def _save(path: Path, arrays: Mapping[str, object]) -> None:
    import scipy.io

    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, dict(arrays), do_compression=True)
    # the header has the time of writing, and equal options give equal files
    content = bytearray(path.read_bytes())
    content[:116] = b"MATLAB 5.0 MAT-file, drawn sample".ljust(116)
    path.write_bytes(content)


#: Writers by set.
WRITERS: dict[str, Callable[[_Drawer], list[_Image]]] = {
    "cub-200-2011": _cub,
    "stanford-cars": _cars,
    "fgvc-aircraft": _aircraft,
    "stanford-dogs": _dogs,
    "flowers-102": _flowers,
    "oxford-pets": _pets,
    "food-101": _food,
    "nabirds": _nabirds,
    "vegfru": _vegfru,
    "inaturalist-2017": _inaturalist,
    "icartoonface": _icartoonface,
}
