"""The reader of fine-grained benchmarks: the layout of each set as published, its pitfalls, counts, and faults."""

from __future__ import annotations

import io
import json
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io

import animesion
from animesion.errors import UsageError
from animesion.schemas import DropReason, Item
from animesion.sources.benchmarks import BenchmarkOptions, BenchmarkSource
from animesion.sources.published_facts import PUBLISHED
from animesion.sources.published_sets import differences, hold_out_validation

BENCHMARKS = [each.name for each in PUBLISHED.values() if each.source == "benchmark"]


def put(root: Path, files: Mapping[str, bytes | str], *, end: str = "\n") -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.replace("\n", end).encode() if isinstance(content, str) else content)
    return root


def images(*names: str) -> dict[str, bytes | str]:
    return {name: b"\xff\xd8" + name.encode() for name in names}


def mat(**arrays: Any) -> bytes:
    out = io.BytesIO()
    scipy.io.savemat(out, arrays, do_compression=True)
    return out.getvalue()


def cell(*texts: str) -> Any:
    found = np.empty((1, len(texts)), dtype=object)
    found[0] = texts
    return found


def struct_of(*rows: Mapping[str, Any]) -> Any:
    found = np.zeros((1, len(rows)), dtype=[(name, object) for name in rows[0]])
    for i, row in enumerate(rows):
        found[0, i] = tuple(row.values())
    return found


def reader(path: Path, name: str, classes: int, splits: dict[str, int], **options: Any) -> BenchmarkSource:
    due = PUBLISHED[BenchmarkOptions.model_validate({"path": "x", "set": name}).set].with_counts(classes, splits, {})
    return BenchmarkSource(BenchmarkOptions.model_validate({"path": str(path), "set": name, **options}), due)


def listed(source: BenchmarkSource) -> list[Item]:
    items = list(source.items())
    assert len({item.key for item in items}) == len(items)
    assert [item.order for item in items] == list(range(len(items)))
    present = [item for item in items if not item.failure]
    for item, payload in zip(present, source.read(present), strict=True):
        assert payload.content.endswith(item.source_id.partition("/")[2].encode())  # the file of this row
    return items


def facts(items: list[Item]) -> list[tuple[str, str, str, int]]:
    """File name, split, class name and class id of each."""
    return [(item.source_id.rpartition("/")[2], item.split, item.labels[0], item.class_order) for item in items]


# -- published facts -------------------------------------------------------------------------------------------------

#: Classes; train and val when the last fifth of each class is held out; train with val; test: the table of the label
#: files of FGIR-Backbones and GLSim, and the pages of the sets that are not in it.
PUBLISHED_COUNTS = {
    "cub-200-2011": (200, (4794, 1200), 5994, 5794),
    "stanford-cars": (196, (6442, 1702), 8144, 8041),
    "fgvc-aircraft": (100, (5267, 1400), 6667, 3333),
    "stanford-dogs": (120, (9600, 2400), 12000, 8580),
    "flowers-102": (102, (), 2040, 6149),
    "oxford-pets": (37, (2941, 739), 3680, 3669),
    "food-101": (101, (60600, 15150), 75750, 25250),
    "nabirds": (555, (18957, 4972), 23929, 24633),
    "vegfru": (292, (35040, 8760), 43800, 116931),
    "inaturalist-2017": (5089, (), 579184 + 95986, 0),
}


def test_published_counts() -> None:
    assert set(BENCHMARKS) - {"icartoonface"} == set(PUBLISHED_COUNTS)
    for name, (classes, held_out, train_val, test) in PUBLISHED_COUNTS.items():
        due = PUBLISHED[name]
        counts = {split: count for split, (count,) in due.splits.items()}
        assert (due.classes, due.validation) == (classes, held_out), name
        assert (counts["train"] + counts.get("val", 0), counts.get("test", 0)) == (train_val, test), name
        assert not due.validation or sum(due.validation) == train_val, name
        for split, count in due.per_class.items():
            assert count * classes == counts[split], name
    assert (PUBLISHED["icartoonface"].classes, PUBLISHED["icartoonface"].images) == (5013, 389_678)
    # 33 classes of Aircraft have 66 images for train and val, 67 have 67
    aircraft = [Item(str(i), "", "", "", i, split="train", class_order=i % 100) for i in range(6667)]
    assert Counter(item.split for item in hold_out_validation(aircraft)) == {"train": 5267, "val": 1400}


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if PUBLISHED[name].images < 60_000])
def test_a_complete_listing_is_accepted_and_one_without_an_image_is_not(name: str) -> None:
    """The published counts themselves, on listings of the full size."""
    due = PUBLISHED[name]
    items = [
        Item(str(i), "benchmark", "", "", i, split=split, class_order=i % due.classes)
        for split, (count,) in due.splits.items()
        for i in range(count)
    ]
    assert differences(items, due) == []
    first, (count,) = next(iter(due.splits.items()))
    assert f"{count - 1:,} of {count:,} {first} images".replace("  ", " ") in "; ".join(differences(items[1:], due))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_card_of_a_build_names_terms_and_citation(name: str) -> None:
    due, recipe = PUBLISHED[name], animesion.load_recipe(name, ["source.path=x"])
    assert recipe.source.options["set"] == name
    assert recipe.card.citation.strip() == due.citation
    assert recipe.card.homepage == due.homepage
    assert due.terms.lower() in recipe.card.terms.lower()


@pytest.mark.parametrize(
    ("alias", "name"), [("cub", "cub-200-2011"), ("food", "food-101"), ("inat17", "inaturalist-2017")]
)
def test_names_of_the_fgir_label_files_are_understood(alias: str, name: str) -> None:
    assert BenchmarkOptions.model_validate({"path": "x", "set": alias}).set == name


# -- CUB-200-2011 ----------------------------------------------------------------------------------------------------

CUB = {
    "CUB_200_2011/images.txt": (
        "1 001.Albatross/A_1.jpg\n2 001.Albatross/A_2.jpg\n3 002.Crow/C_3.jpg\n4 002.Crow/C_4.jpg\n"
    ),
    "CUB_200_2011/image_class_labels.txt": "4 2\n3 2\n2 1\n1 1\n",  # joined by number, not by line
    "CUB_200_2011/train_test_split.txt": "1 0\n2 1\n3 1\n4 0\n",
    "CUB_200_2011/classes.txt": "1 001.Albatross\n2 002.Crow\n",
    "attributes.txt": "1 has_bill_shape::dagger\n",
    **images(*(f"CUB_200_2011/images/{name}.jpg" for name in ("001.Albatross/A_1", "001.Albatross/A_2"))),
    **images(*(f"CUB_200_2011/images/{name}.jpg" for name in ("002.Crow/C_3", "002.Crow/C_4"))),
}
CUB_ITEMS = [
    ("A_2.jpg", "train", "001.Albatross", 0),
    ("C_3.jpg", "train", "002.Crow", 1),
    ("A_1.jpg", "test", "001.Albatross", 0),
    ("C_4.jpg", "test", "002.Crow", 1),
]
CUB_COUNTS = {"train": 2, "test": 2}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_cub_joins_its_tables_by_number_and_classes_start_at_1(tmp_path: Path, end: str) -> None:
    source = reader(put(tmp_path, CUB, end=end), "cub-200-2011", 2, CUB_COUNTS)
    assert facts(listed(source)) == CUB_ITEMS
    assert source.notes == []


def test_a_folder_its_parent_and_a_zip_of_it_list_the_same(tmp_path: Path) -> None:
    put(tmp_path / "all", CUB)
    put(tmp_path / "all" / "nabirds", {"images.txt": "no table of this set", "images/001.Albatross/A_1.jpg": b"other"})
    with zipfile.ZipFile(tmp_path / "cub.zip", "w") as archive:
        for name, content in CUB.items():
            archive.writestr(name, content)
    places = (tmp_path / "all" / "CUB_200_2011", tmp_path / "all", tmp_path / "cub.zip")
    found = [listed(reader(place, "cub-200-2011", 2, CUB_COUNTS)) for place in places]
    assert [facts(items) for items in found] == [CUB_ITEMS] * 3
    assert len({tuple(item.key for item in items) for items in found}) == 1


def test_a_missing_image_is_refused_or_noted(tmp_path: Path) -> None:
    put(tmp_path, CUB)
    (tmp_path / "CUB_200_2011/images/002.Crow/C_3.jpg").unlink()
    text = "CUB-200-2011 is not as published: 1 of 2 train images; 1 listed file is missing"
    with pytest.raises(UsageError) as refused:
        list(reader(tmp_path, "cub-200-2011", 2, CUB_COUNTS).items())
    assert text in str(refused.value)
    source = reader(tmp_path, "cub-200-2011", 2, CUB_COUNTS, incomplete="accept")
    assert [item.failure for item in source.items()] == ["", DropReason.MISSING_FILE, "", ""]
    assert source.notes == [text]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("images.txt", "1 a.jpg\n1 b.jpg\n", "images.txt, line 2: '1' is listed twice"),
        ("images.txt", "1\n", "line 1: no value after '1'"),
        ("images.txt", "1 001.Albatross/A_1.jpg\n", "images.txt does not list image '4'"),
        ("image_class_labels.txt", "1 1\n2 1\n3 2\n", "image_class_labels.txt does not list image '4'"),
        ("image_class_labels.txt", "1 1\n2 1\n3 2\n4 3\n", "classes.txt does not list class '3'"),
        ("classes.txt", "0 a\n1 001.Albatross\n2 002.Crow\n", "the class '0' is not a whole number from 1"),
        ("train_test_split.txt", "1 0\n2 1\n3 1\n4 2\n", r"image '4' has '2', not 1 \(train\) or 0 \(test\)"),
        ("images.txt", "1 a\n" + "x" * 3000, "line 2: not a row of a list"),
    ],
)
def test_contradicting_tables_are_refused(tmp_path: Path, file: str, content: str, message: str) -> None:
    put(tmp_path, CUB | {f"CUB_200_2011/{file}": content})
    with pytest.raises(UsageError, match=message):
        list(reader(tmp_path, "cub-200-2011", 2, CUB_COUNTS).items())


def test_paths_of_a_list_cannot_leave_the_download(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    rows = str(CUB["CUB_200_2011/images.txt"]).replace("001.Albatross/A_1.jpg", "../../../secret.jpg")
    put(tmp_path / "set", CUB | {"CUB_200_2011/images.txt": rows})
    source = reader(tmp_path / "set", "cub-200-2011", 2, CUB_COUNTS, incomplete="accept")
    assert [item.failure for item in source.items()].count(DropReason.MISSING_FILE) == 1


# -- Stanford Cars and Dogs ------------------------------------------------------------------------------------------

BOX = {"bbox_x1": np.uint16(1), "bbox_y1": np.uint16(2), "bbox_x2": np.uint16(300), "bbox_y2": np.uint16(4)}


def car(name: str, number: int) -> dict[str, Any]:
    return {**BOX, "class": np.uint8(number), "fname": name}


CAR_NAMES = cell("AM General Hummer SUV 2000", "Ram C/V Van 2012")
CARS = {
    "devkit/cars_meta.mat": mat(class_names=CAR_NAMES),
    "devkit/cars_train_annos.mat": mat(annotations=struct_of(car("00001.jpg", 2), car("00002.jpg", 1))),
    "devkit/cars_test_annos.mat": mat(annotations=struct_of({**BOX, "fname": "00001.jpg"})),
    "cars_test_annos_withlabels.mat": mat(annotations=struct_of(car("00001.jpg", 1))),
    **images("cars_train/00001.jpg", "cars_train/00002.jpg", "cars_test/00001.jpg"),
}
CARS_COUNTS = {"train": 2, "test": 1}


def test_cars_have_the_labels_of_test_in_a_file_apart_and_numbers_in_both_folders(tmp_path: Path) -> None:
    items = listed(reader(put(tmp_path, CARS), "stanford-cars", 2, CARS_COUNTS))
    assert facts(items) == [
        ("00001.jpg", "train", "Ram C/V Van 2012", 1),
        ("00002.jpg", "train", "AM General Hummer SUV 2000", 0),
        ("00001.jpg", "test", "AM General Hummer SUV 2000", 0),
    ]
    (tmp_path / "cars_test_annos_withlabels.mat").unlink()
    with pytest.raises(UsageError, match=r"has no cars_test_annos_withlabels.mat, which Stanford Cars has"):
        list(reader(tmp_path, "stanford-cars", 2, CARS_COUNTS).items())
    (tmp_path / "devkit/cars_test_annos.mat").rename(tmp_path / "cars_test_annos_withlabels.mat")
    with pytest.raises(UsageError, match="has no field 'class' in annotations: it has no labels"):
        list(reader(tmp_path, "stanford-cars", 2, CARS_COUNTS).items())


def test_cars_in_one_list_have_the_split_in_a_field(tmp_path: Path) -> None:
    rows = [
        {"relative_im_path": f"car_ims/00000{i}.jpg", **BOX, "class": np.uint8(number), "test": np.uint8(test)}
        for i, number, test in ((1, 1, 1), (2, 2, 0), (3, 1, 0))
    ]
    one = {"cars_annos.mat": mat(annotations=struct_of(*rows), class_names=CAR_NAMES)}
    put(tmp_path / "one", one | images(*(f"car_ims/00000{i}.jpg" for i in (1, 2, 3))))
    items = listed(reader(tmp_path / "one", "stanford-cars", 2, CARS_COUNTS))
    assert [(name, split, number) for name, split, _, number in facts(items)] == [
        ("000002.jpg", "train", 1), ("000003.jpg", "train", 0), ("000001.jpg", "test", 0),
    ]  # fmt: skip
    # with the list of the one form and the images of the other, the form with images counts
    put(tmp_path / "both", CARS | one)
    assert len(listed(reader(tmp_path / "both", "stanford-cars", 2, CARS_COUNTS))) == 3


@pytest.mark.parametrize(("number", "message"), [(0, "class 0 of '00001.jpg' is not"), (3, "class 3 of '00001.jpg'")])
def test_a_class_that_the_devkit_does_not_name_is_refused(tmp_path: Path, number: int, message: str) -> None:
    put(tmp_path, CARS | {"cars_test_annos_withlabels.mat": mat(annotations=struct_of(car("00001.jpg", number)))})
    with pytest.raises(UsageError, match=message):
        list(reader(tmp_path, "stanford-cars", 2, CARS_COUNTS).items())


def dogs(split: str, *rows: tuple[str, int]) -> bytes:
    paths = [path for path, _ in rows]
    return mat(
        file_list=cell(*paths).T,
        annotation_list=cell(*(path.removesuffix(".jpg") for path in paths)).T,
        labels=np.array([[float(number)] for _, number in rows]),
    )


def test_dogs_have_lists_of_cells_and_annotations_without_a_suffix(tmp_path: Path) -> None:
    chihuahua, spaniel = "n02085620-Chihuahua/n02085620_7.jpg", "n02085782-Japanese_spaniel/n02085782_2.jpg"
    files = {
        "train_list.mat": dogs("train", (spaniel, 2), (chihuahua, 1)),
        "test_list.mat": dogs("test", (chihuahua.replace("_7", "_9"), 1)),
        "file_list.mat": b"not read",
        "Annotation/n02085620-Chihuahua/n02085620_7": "<annotation/>",
        **images(f"Images/{chihuahua}", f"Images/{spaniel}", f"Images/{chihuahua.replace('_7', '_9')}"),
    }
    source = reader(put(tmp_path, files), "stanford-dogs", 2, {"train": 2, "test": 1})
    assert facts(listed(source)) == [
        ("n02085782_2.jpg", "train", "n02085782-Japanese_spaniel", 1),
        ("n02085620_7.jpg", "train", "n02085620-Chihuahua", 0),
        ("n02085620_9.jpg", "test", "n02085620-Chihuahua", 0),
    ]
    assert source.notes == []
    put(tmp_path, {"test_list.mat": dogs("test", (chihuahua, 1))})
    with pytest.raises(UsageError, match=r"n02085620_7.jpg' is listed twice \(train and test\)"):
        list(reader(tmp_path, "stanford-dogs", 2, {"train": 2, "test": 1}).items())
    put(tmp_path, {"test_list.mat": dogs("test", (chihuahua.replace("_7", "_9"), 2))})
    with pytest.raises(UsageError, match="class 1 of Stanford Dogs is called"):
        list(reader(tmp_path, "stanford-dogs", 2, {"train": 2, "test": 1}).items())


# -- Flowers ---------------------------------------------------------------------------------------------------------


def test_flowers_train_on_trnid_and_an_exchange_is_refused(tmp_path: Path) -> None:
    vectors = {"trnid": [[3]], "valid": [[1]], "tstid": [[2, 4, 5]]}
    files = {
        "imagelabels.mat": mat(labels=np.array([[2, 1, 2, 2, 1]], dtype=np.uint8)),
        "setid.mat": mat(**{name: np.array(each, dtype=np.uint16) for name, each in vectors.items()}),
        **images(*(f"jpg/image_0000{i}.jpg" for i in range(1, 6))),
    }
    counts = {"train": 1, "val": 1, "test": 3}
    assert facts(listed(reader(put(tmp_path, files), "flowers", 2, counts))) == [
        ("image_00003.jpg", "train", "flower-002", 1),
        ("image_00001.jpg", "val", "flower-002", 1),
        ("image_00002.jpg", "test", "flower-001", 0),
        ("image_00004.jpg", "test", "flower-002", 1),
        ("image_00005.jpg", "test", "flower-001", 0),
    ]
    put(tmp_path, {"setid.mat": mat(trnid=vectors["tstid"], valid=vectors["valid"], tstid=vectors["trnid"])})
    with pytest.raises(UsageError, match="3 of 1 train images; 1 of 3 test images"):
        list(reader(tmp_path, "flowers", 2, counts).items())
    put(tmp_path, {"setid.mat": mat(trnid=[[6]], valid=[[1]], tstid=[[2]])})
    with pytest.raises(UsageError, match=r"image 6 of trnid has no label in imagelabels.mat"):
        list(reader(tmp_path, "flowers", 2, counts).items())


# -- lists per split -------------------------------------------------------------------------------------------------

AIRCRAFT = {
    "fgvc-aircraft-2013b/data/variants.txt": "707-320\nBoeing 717\nF/A-18\n",
    "fgvc-aircraft-2013b/data/images_variant_train.txt": "0034309 F/A-18\n1025794 707-320\n",
    "fgvc-aircraft-2013b/data/images_variant_val.txt": "1340192 Boeing 717\n",
    "fgvc-aircraft-2013b/data/images_variant_trainval.txt": "not read",
    "fgvc-aircraft-2013b/data/images_variant_test.txt": "0056978 Boeing 717\n",
    **images(*(f"fgvc-aircraft-2013b/data/images/{i}.jpg" for i in ("0034309", "1025794", "1340192", "0056978"))),
}
AIRCRAFT_COUNTS = {"train": 2, "val": 1, "test": 1}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_variants_have_blanks_and_slashes_and_lists_no_suffix(tmp_path: Path, end: str) -> None:
    put(tmp_path, AIRCRAFT, end=end)
    assert facts(listed(reader(tmp_path, "aircraft", 3, AIRCRAFT_COUNTS))) == [
        ("0034309.jpg", "train", "F/A-18", 2),
        ("1025794.jpg", "train", "707-320", 0),
        ("1340192.jpg", "val", "Boeing 717", 1),
        ("0056978.jpg", "test", "Boeing 717", 1),
    ]


def test_a_published_val_is_kept_joined_or_replaced(tmp_path: Path) -> None:
    lists = {"train": range(3), "val": range(3, 6), "test": range(6, 7)}
    place = "fgvc-aircraft-2013b/data"
    files: dict[str, bytes | str] = {f"{place}/variants.txt": "A\n"}
    files |= {f"{place}/images_variant_{name}.txt": "".join(f"{i} A\n" for i in ids) for name, ids in lists.items()}
    put(tmp_path, files | images(*(f"{place}/images/{i}.jpg" for i in range(7))))
    counts = {"train": 3, "val": 3, "test": 1}

    def splits(**options: str) -> str:
        items = sorted(listed(reader(tmp_path, "aircraft", 1, counts, **options)), key=lambda item: item.source_id)
        return "".join(item.split[1] for item in items)  # tRain, vAl, tEst

    assert splits() == "rrraaae"
    assert splits(val="train") == "rrrrrre"
    assert splits(val="held-out") == "rrrraae"  # int(0.8 * 6) of train and val stay in train


def test_cats_have_capitals_and_names_end_before_the_last_number(tmp_path: Path) -> None:
    files = {
        "annotations/list.txt": "#Image CLASS-ID SPECIES BREED ID\n",
        "annotations/trainval.txt": "#a comment\nAbyssinian_100 1 1 1\namerican_pit_bull_terrier_2 3 2 2\n",
        "annotations/test.txt": "Abyssinian_201 1 1 1\n",
        "annotations/xmls/Abyssinian_100.xml": "<annotation/>",
        "images/Abyssinian_100.mat": b"not read",
        **images(*(f"images/{name}.jpg" for name in ("Abyssinian_100", "american_pit_bull_terrier_2"))),
        **images("images/Abyssinian_201.jpg", "images/Abyssinian_99.jpg"),
    }
    source = reader(put(tmp_path, files), "pets", 2, {"train": 2, "test": 1})
    assert facts(listed(source)) == [
        ("Abyssinian_100.jpg", "train", "Abyssinian", 0),
        ("american_pit_bull_terrier_2.jpg", "train", "american_pit_bull_terrier", 2),
        ("Abyssinian_201.jpg", "test", "Abyssinian", 0),
    ]
    assert source.notes == ["1 image that no list names skipped"]
    put(tmp_path, {"annotations/test.txt": "Bengal_201 1 1 1\n"})
    with pytest.raises(UsageError, match="line 1: class 1 is Bengal here and Abyssinian in an earlier row"):
        list(reader(tmp_path, "pets", 2, {"train": 2, "test": 1}).items())
    put(tmp_path, {"annotations/test.txt": "Abyssinian_201\n"})
    with pytest.raises(UsageError, match="line 1: 'Abyssinian_201' is not `image class species breed`"):
        list(reader(tmp_path, "pets", 2, {"train": 2, "test": 1}).items())


def test_food_lists_folder_and_number(tmp_path: Path) -> None:
    files = {
        "food-101/meta/classes.txt": "apple_pie\nwaffles\n",
        "food-101/meta/train.txt": "waffles/1005649\napple_pie/1014775\n",
        "food-101/meta/test.txt": "apple_pie/1011328",
        "food-101/meta/train.json": "{}",
        **images(*(f"food-101/images/{name}.jpg" for name in ("waffles/1005649", "apple_pie/1014775"))),
        **images("food-101/images/apple_pie/1011328.jpg"),
    }
    assert facts(listed(reader(put(tmp_path, files), "food", 2, {"train": 2, "test": 1}))) == [
        ("1005649.jpg", "train", "waffles", 1),
        ("1014775.jpg", "train", "apple_pie", 0),
        ("1011328.jpg", "test", "apple_pie", 0),
    ]
    put(tmp_path, {"food-101/meta/test.txt": "apple_pies/1011328"})
    with pytest.raises(UsageError, match=r"class 'apple_pies' is not in meta/classes.txt"):
        list(reader(tmp_path, "food", 2, {"train": 2, "test": 1}).items())


def test_fruits_follow_the_vegetables(tmp_path: Path) -> None:
    rows = {
        "veg200_lists/veg_train.txt": ("Chinese_artichoke/v_14_01_0001.jpg", 0),
        "veg200_lists/veg_val.txt": ("shepherd's_purse/v_1.jpg", 1),
        "veg200_lists/veg_test.txt": ("Chinese_artichoke/v_14_01_0002.jpg", 0),
        "fru92_lists/fru_train.txt": ("crown pear/f_1.jpg", 0),
        "fru92_lists/fru_val.txt": ("crown pear/f_2.jpg", 0),
        "fru92_lists/fru_test.txt": ("crown pear/f_3.jpg", 0),
    }
    files: dict[str, bytes | str] = {name: f"{path} {number}\n" for name, (path, number) in rows.items()}
    files |= images(*(f"{name.partition('_')[0]}_images/{path}" for name, (path, _) in rows.items()))
    found = facts(listed(reader(put(tmp_path, files), "vegfru", 3, {"train": 2, "val": 2, "test": 2})))
    assert [(name, number) for name, _, _, number in found] == [
        ("v_14_01_0001.jpg", 0), ("f_1.jpg", 200), ("v_1.jpg", 1), ("f_2.jpg", 200), ("v_14_01_0002.jpg", 0),
        ("f_3.jpg", 200),
    ]  # fmt: skip


# -- NABirds ---------------------------------------------------------------------------------------------------------


def test_nabirds_uses_the_nodes_that_have_images(tmp_path: Path) -> None:
    keys = ["0000139e-21dc", "0000d9fc-4e02", "00019306-9d83"]
    rows = list(zip(keys, ("0817/a1.jpg", "0860/b2.jpg", "0295/c3.jpg"), ("817", "860", "295"), (1, 0, 1), strict=True))
    files = {
        "nabirds/images.txt": "".join(f"{key} {path}\n" for key, path, _, _ in rows),
        "nabirds/image_class_labels.txt": "".join(f"{key} {number}\n" for key, _, number, _ in rows),
        "nabirds/train_test_split.txt": "".join(f"{key} {train}\n" for key, _, _, train in rows),
        "nabirds/classes.txt": "0 Birds\n1 Owl\n295 Oak Titmouse\n817 Oak Titmouse\n860 Mallard (Female)\n",
        "nabirds/hierarchy.txt": "1 0\n295 1\n",
        "nabirds/photographers.txt": f"{keys[0]} René\n".encode("cp1252") + f"{keys[1]} Zoë Ünal\n".encode(),
        **images(*(f"nabirds/images/{path}" for _, path, _, _ in rows)),
    }
    source = reader(put(tmp_path, files), "nabirds", 3, {"train": 2, "test": 1})
    items = listed(source)
    assert facts(items) == [
        ("a1.jpg", "train", "Oak Titmouse (817)", 817),
        ("c3.jpg", "train", "Oak Titmouse (295)", 295),
        ("b2.jpg", "test", "Mallard (Female)", 860),
    ]
    assert [item.author for item in items] == ["René", "", "Zoë Ünal"]
    assert source.notes == ["2 classes share their name with another: their numbers were added"]


# -- iNaturalist 2017 ------------------------------------------------------------------------------------------------


def inat(*entries: tuple[int, str, int], **changes: Any) -> str:
    data = {
        "images": [
            {"id": i, "file_name": f"train_val_images/{path}", "license": 2 - i % 2, "rights_holder": f"Holder {i}"}
            for i, path, _ in entries
        ],
        "annotations": [{"id": 90 - i, "image_id": i, "category_id": number} for i, _, number in entries][::-1],
        "categories": [{"id": 0, "name": "Bufo bufo", "supercategory": "Amphibia"}, {"id": 1, "name": "Sturnus"}],
        "licenses": [{"id": 1, "name": "x", "url": "http://creativecommons.org/licenses/by-nc/4.0/"}, {"id": 2}],
    }
    return json.dumps(data | changes)


def test_inaturalist_joins_images_and_annotations_by_id(tmp_path: Path) -> None:
    names = ["Aves/Sturnus/a.jpg", "Amphibia/Bufo bufo/b.jpg", "Amphibia/Bufo bufo/c.jpg"]
    files: dict[str, bytes | str] = {
        "train_val2017/train2017.json": inat((7, names[0], 1), (8, names[1], 0)),
        "train_val2017/val2017.json": inat((9, names[2], 0)),
        **images(*(f"train_val_images/{name}" for name in names)),
    }
    counts = {"train": 2, "val": 1}
    items = listed(reader(put(tmp_path, files), "inat17", 2, counts))
    assert facts(items) == [
        ("a.jpg", "train", "Sturnus", 1),
        ("b.jpg", "train", "Bufo bufo", 0),
        ("c.jpg", "val", "Bufo bufo", 0),
    ]
    assert [(item.author, item.licence) for item in items] == [
        ("Holder 7", "CC-BY-NC-4.0"), ("Holder 8", ""), ("Holder 9", "CC-BY-NC-4.0"),
    ]  # fmt: skip
    for content, message in (
        (inat((9, names[2], 5)), "annotation of image 9 has category 5, which is not listed"),
        (inat((9, names[2], 0), annotations=[]), "image 9 has no annotation"),
        (inat((9, names[2], 0), images={}), "has no list 'images' of objects"),
        (inat((9, names[2], 0), images=[{"id": "9", "file_name": "x"}]), "'9' is not a number for 'id'"),
        (inat((9, names[2], 0), images=[{"id": 9, "file_name": None}]), "'None' is not a text for 'file_name'"),
        (inat((9, names[2], 0), categories=[{"id": 0, "name": "Rana"}]), "is called 'Bufo bufo' and 'Rana'"),
        ("[" * 100_000, "val2017.json is not JSON"),
        ("[]", "has no list 'categories'"),
    ):
        put(tmp_path, {"train_val2017/val2017.json": content})
        with pytest.raises(UsageError, match=message):
            list(reader(tmp_path, "inat17", 2, counts).items())


# -- iCartoonFace ----------------------------------------------------------------------------------------------------


def test_icartoonface_has_numbered_folders_and_no_split(tmp_path: Path) -> None:
    root = "personai_icartoonface_rectrain/"
    paths = [
        f"icartoonface_rectrain/personai_icartoonface_rectrain_{n}/personai_icartoonface_rectrain_{n}_{i:07d}.jpg"
        for n, i in (("00012", 4), ("00000", 1), ("00000", 0))
    ]
    with zipfile.ZipFile(tmp_path / "rectrain.zip", "w") as archive:
        for name, content in images(*paths).items():
            archive.writestr(root + name, content)
        archive.writestr(f"{root}icartoonface_rectrain_det.txt", "a 1 2 3 4\n")
        archive.writestr("__MACOSX/x.jpg", b"")
    source = reader(tmp_path / "rectrain.zip", "icartoonface", 2, {"": 3})
    assert [(item.split, *item.labels, item.class_order) for item in listed(source)] == [
        ("", "character-00000", 0), ("", "character-00000", 0), ("", "character-00012", 12),
    ]  # fmt: skip


# -- wrong downloads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BENCHMARKS)
def test_another_folder_is_refused_with_the_layout_that_is_due(tmp_path: Path, name: str) -> None:
    put(tmp_path, images("some/where/else.jpg"))
    with pytest.raises(UsageError, match=r"is not laid out as .*: expected .*; found some/where/else.jpg"):
        list(reader(tmp_path, name, 1, {"train": 1}).items())


def test_two_downloads_in_one_folder_are_ambiguous(tmp_path: Path) -> None:
    for copy in ("a", "b"):
        put(tmp_path / copy / "x", {name.partition("/")[2] or name: content for name, content in CUB.items()})
    with pytest.raises(UsageError, match=r"contains a/x/\w+.txt and b/x/\w+.txt; set source.path to the folder of one"):
        list(reader(tmp_path, "cub", 2, CUB_COUNTS).items())


def test_a_label_file_may_be_larger_than_an_image(tmp_path: Path) -> None:
    put(tmp_path, CUB)
    source = reader(tmp_path, "cub", 2, CUB_COUNTS, max_bytes=60)
    assert [item.failure for item in source.items()] == [""] * 4
