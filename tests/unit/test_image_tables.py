"""Tables that list images and their classes, as competitions and archives of benchmarks have them."""

from __future__ import annotations

import io
import json
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import animesion
from animesion import sources
from animesion.dataset import layouts, readings
from animesion.errors import UsageError
from animesion.sources import class_folders
from animesion.splits import split_folders
from animesion.stats import class_counts


def understood(files: Mapping[str, bytes], **options: Any) -> readings.Layout:
    return layouts.understand(list(files), lambda paths: [files[path] for path in paths], "set/", **options)


def classes(layout: readings.Layout) -> dict[str, tuple[str, str]]:
    """Image -> class and split."""
    return {
        path: ("/".join(reading.labels), reading.split)
        for path, reading in layout.readings.items()
        if readings.is_image(path)
    }


def images(*paths: str) -> dict[str, bytes]:
    return dict.fromkeys(paths, b"")


def numbered(folder: str, numbers: Iterable[int]) -> dict[str, bytes]:
    return images(*(f"{folder}/{number}.jpg" for number in numbers))


#: name -> files, what is understood of them, and how the sentence begins.
LAYOUTS: dict[str, tuple[Mapping[str, bytes], dict[str, tuple[str, str]], str]] = {
    "ids, with a form for submission": (
        numbered("train_images", range(1, 4)) | numbered("test_images", [4])
        | {"train.csv": b"image_id,label\n1,0\n2.jpg,3\n3,0\n", "sample_submission.csv": b"image_id,label\n4,0\n"},
        {"train_images/1.jpg": ("0", ""), "train_images/2.jpg": ("3", ""), "train_images/3.jpg": ("0", ""),
         "test_images/4.jpg": ("", "")},
        "2 classes, by train.csv; 1 file beside the classes left out, 'sample_submission.csv'; 1 image has no class "
        "(images in column image_id of train.csv, classes in column label;",
    ),
    "a column that is not called label": (
        numbered("set/train", [1, 2, 3]) | numbered("set/test", [4])
        | {"set/labels.csv": b"id,breed\n1,beagle\n2,pug\n3,pug\n"},
        {"set/train/1.jpg": ("beagle", ""), "set/train/2.jpg": ("pug", ""), "set/train/3.jpg": ("pug", ""),
         "set/test/4.jpg": ("", "")},
        "2 classes, by set/labels.csv",
    ),
    "a column for each class": (
        numbered("images", [1, 2, 3]) | {"train.csv": b"image_id,healthy,rust,scab\n1,0,0,1\n2,0,1,1\n3,1.0,0,0\n"},
        {"images/1.jpg": ("scab", ""), "images/2.jpg": ("rust/scab", ""), "images/3.jpg": ("healthy", "")},
        "3 classes, by train.csv (images in column image_id of train.csv, a column for each class;",
    ),
    "a column of splits": (
        numbered("img", [1, 2, 3])
        | {"l.tsv": "ファイル\tlabel\tsubset\n1.jpg\t猫\ttrain\n2.jpg\t犬\tvalid\n3.jpg\t犬\ttrain\n9.jpg\t犬\ttrain\n"
           .encode("utf-16")},
        {"img/1.jpg": ("猫", "train"), "img/2.jpg": ("犬", "val"), "img/3.jpg": ("犬", "train")},
        "2 classes in splits train/val, by l.tsv (rows of missing files: 1; images in column ファイル",
    ),
    "a table for each split, and names that occur in both": (
        numbered("train", [1, 2, 3]) | numbered("test", [1, 2])
        | {"train.csv": b"id,label\n1,a\n2,b\n3,b\n", "test.csv": b"id,label\n1,b\n2,b\n"},
        {"train/1.jpg": ("a", "train"), "train/2.jpg": ("b", "train"), "train/3.jpg": ("b", "train"),
         "test/1.jpg": ("b", "test"), "test/2.jpg": ("b", "test")},
        "2 classes in splits train/test, by test.csv and 1 other table",
    ),
    "folders of splits, one table": (
        numbered("train", [1, 2]) | numbered("test", [3, 4]) | {"l.csv": b"a,1.jpg\nb,2.jpg\nb,3.jpg\na,4.jpg\n"},
        {"train/1.jpg": ("a", "train"), "train/2.jpg": ("b", "train"), "test/3.jpg": ("b", "test"),
         "test/4.jpg": ("a", "test")},
        "2 classes in splits train/test, by l.csv (l.csv has no header;",
    ),
    "Tiny ImageNet": (
        images("train/n1/images/n1_0.JPEG", "train/n2/images/n2_0.JPEG", "val/images/val_0.JPEG",
               "val/images/val_1.JPEG", "test/images/test_0.JPEG")
        | {"val/val_annotations.txt": b"val_0.JPEG\tn2\t0\t0\t62\t62\nval_1.JPEG\tn1\t1\t1\t6\t6\n",
           "words.txt": b"n1\tfish\nn2\tbird\n", "train/n1/n1_boxes.txt": b"n1_0.JPEG\t0\t10\t63\t58\n"},
        {"train/n1/images/n1_0.JPEG": ("n1", "train"), "train/n2/images/n2_0.JPEG": ("n2", "train"),
         "val/images/val_0.JPEG": ("n2", "val"), "val/images/val_1.JPEG": ("n1", "val"),
         "test/images/test_0.JPEG": ("", "test")},
        "2 classes in splits train/val/test, by folder and val/val_annotations.txt",
    ),
    "a test split without class folders (GTSRB)": (
        images("Train/0/1.png", "Train/1/2.png", "Test/00000.png", "Test/00001.png", "Test/00002.png")
        | {"Test.csv": b"Width,ClassId,Path\n5,1,Test/00000.png\n5,0,Test/00001.png\n6,0,Test/00002.png\n"},
        {"Train/0/1.png": ("0", "train"), "Train/1/2.png": ("1", "train"), "Test/00000.png": ("1", "test"),
         "Test/00001.png": ("0", "test"), "Test/00002.png": ("0", "test")},
        "2 classes in splits train/test, by folder and Test.csv",
    ),
    "a list for each split, with numbers for the folders": (
        images("train/n1/1.jpg", "train/n2/2.jpg", "val/3.jpg", "val/4.jpg", "val/5.jpg")
        | {"meta/train.txt": b"n1/1.jpg 0\nn2/2.jpg 1\n", "meta/val.txt": b"3.jpg 1\n4.jpg 0\n5.jpg 0\n"},
        {"train/n1/1.jpg": ("n1", "train"), "train/n2/2.jpg": ("n2", "train"), "val/3.jpg": ("n2", "val"),
         "val/4.jpg": ("n1", "val"), "val/5.jpg": ("n1", "val")},
        "2 classes in splits train/val, by folder and meta/train.txt and 1 other table",
    ),
    "a list parted by blanks": (
        numbered("images", [1, 2, 3]) | {"meta/list.txt": b"1.jpg Boeing 707\n2.jpg A330\n3.jpg A330\n"},
        {"images/1.jpg": ("Boeing 707", ""), "images/2.jpg": ("A330", ""), "images/3.jpg": ("A330", "")},
        "2 classes, by meta/list.txt",
    ),
    "class folders and a table of the same": (
        images("train/air hockey/1.jpg", "train/archery/1.jpg", "test/archery/1.jpg")
        | {"s.csv": b"class id,filepaths,labels\n0,train/air hockey/1.jpg,air hockey\n1,train/archery/1.jpg,Archery\n"
           b"1,test/archery/1.jpg,Archery\n"},
        {"train/air hockey/1.jpg": ("air hockey", "train"), "train/archery/1.jpg": ("archery", "train"),
         "test/archery/1.jpg": ("archery", "test")},
        "2 classes in splits train/test, by folder; 1 file beside the classes left out, 's.csv'",
    ),
    "class folders, and a table of what is no class": (
        numbered("oak", [1, 2, 3]) | numbered("ash", [4])
        | {"images.txt": b"1 oak/1.jpg\n2 oak/2.jpg\n3 oak/3.jpg\n4 ash/4.jpg\n", "words.csv": b"a,b\nc,d\n",
           "by.csv": b"file,photographer,site\n1.jpg,A,x\n2.jpg,B,x\n3.jpg,A,x\n4.jpg,A,y\n", "notes.csv": b"\0\1\2",
           "splits.csv": b",file,split\n0,1.jpg,train\n1,2.jpg,test\n2,3.jpg,train\n3,4.jpg,test\n"},
        {"oak/1.jpg": ("oak", "train"), "oak/2.jpg": ("oak", "test"), "oak/3.jpg": ("oak", "train"),
         "ash/4.jpg": ("ash", "test")},
        "2 classes in splits train/test, by folder; 4 files",
    ),
    "class folders and another class in a table for one image": (
        numbered("oak", range(25)) | numbered("ash", [25])
        | {"x.csv": b"name,class\n" + b"".join(b"%d,%s\n" % (i, b"ash" if i in (3, 25) else b"oak")
                                                for i in range(26))},
        {f"oak/{i}.jpg": ("oak", "") for i in range(25)} | {"ash/25.jpg": ("ash", "")},
        "x.csv has another class for 1 image; 2 classes, by folder",
    ),
    "a row for each box": (
        numbered("oak", [1, 2]) | numbered("ash", [3])
        | {"boxes.csv": b"image,label,xmin,ymin\n1.jpg,leaf,0,0\n1.jpg,twig,3,3\n2.jpg,twig,1,1\n3.jpg,leaf,1,1\n"},
        {"oak/1.jpg": ("oak", ""), "oak/2.jpg": ("oak", ""), "ash/3.jpg": ("ash", "")},
        "2 classes, by folder",
    ),
    "split folders under other names": (
        images("train_images/a/1.jpg", "train_images/b/2.jpg", "test_images/a/3.jpg"),
        {"train_images/a/1.jpg": ("a", "train"), "train_images/b/2.jpg": ("b", "train"),
         "test_images/a/3.jpg": ("a", "test")},
        "2 classes in splits train/test, by folder",
    ),
    "one folder in each split": (
        images("train/images/cat/1.jpg", "train/images/dog/2.jpg", "test/images/cat/3.jpg", "test/other.txt"),
        {"train/images/cat/1.jpg": ("cat", "train"), "train/images/dog/2.jpg": ("dog", "train"),
         "test/images/cat/3.jpg": ("cat", "test")},
        "2 classes in splits train/test, by folder",
    ),
    "split folders within folders of their names": (
        images("seg_train/seg_train/sea/1.jpg", "seg_train/seg_train/ice/2.jpg", "seg_test/seg_test/sea/3.jpg"),
        {"seg_train/seg_train/sea/1.jpg": ("sea", "train"), "seg_train/seg_train/ice/2.jpg": ("ice", "train"),
         "seg_test/seg_test/sea/3.jpg": ("sea", "test")},
        "2 classes in splits train/test, by folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_understood(name: str) -> None:
    files, expected, summary = LAYOUTS[name]
    layout = understood(files)
    assert classes(layout) == expected
    assert layout.summary.startswith(summary), layout.summary


BUCKETS = images("faces/0291/1291.jpg", "faces/0291/2291.jpg", "faces/0292/1292.jpg", "faces/0292/2292.jpg")
BUCKET_TABLE = b"0,0291/1291.jpg\n1,0291/2291.jpg\n0,0292/1292.jpg\n1,0292/2292.jpg\n"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (BUCKETS | {"train.csv": BUCKET_TABLE},
         "2 classes by folder (0291, 0292), or 2 by train.csv (0, 1): set source.label_level=2 or "
         "source.table=train.csv"),
        (numbered("images", [1, 2, 3]) | {"family.txt": b"1 Boeing\n2 Boeing\n3 Airbus\n",
                                          "variant.txt": b"1 707\n2 737\n3 737\n"},
         "family.txt and variant.txt have different classes for images/1.jpg: set source.table"),
        (images("training_set/cats/1.jpg", "test_set/cats/2.jpg", "single_prediction/3.jpg"),
         "splits test_set, training_set with single_prediction beside them, or 3 classes"),
        (images("train_images/1.jpg", "test_images/2.jpg"), "images lie directly in test_images, train_images"),
        (images("cars_train/cars_train/1.jpg", "cars_test/cars_test/2.jpg"), "images lie directly in cars_test"),
        (numbered("train", [1, 2]) | numbered("test", [3])
         | {"f.csv": b"file,age,sex\n1.jpg,3,F\n2.jpg,3,M\n3.jpg,4,F\n"},
         "f.csv has several columns (file, age, sex): set source.label_column"),
        (numbered("images", [1, 2, 3]) | {"t.csv": b'image,label\n1,a\n2,"b\n3,c\n'}, "t.csv, line 4"),
        (images("images/a/../1.parquet", "readme.md"), "set source.kind=parquet"),
        ({"data/train-000.tar": b""}, "set source.kind=webdataset"),
        ({"train/data-00000-of-00001.arrow": b"", "dataset_dict.json": b"{}"}, "Dataset.to_parquet"),
        ({"apple.zip": b"", "pear.7z": b""}, "unpack the archives, such as apple.zip"),
        ({"faces.h5": b""}, "write the images in faces.h5 as files, in a folder for each class"),
    ],
)  # fmt: skip
def test_what_is_unclear_is_refused(files: Mapping[str, bytes], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        understood(files)
    assert said in str(refused.value)


def test_a_table_of_boxes_remains_a_dataset_for_detection() -> None:
    files = images("train/1.jpg", "train/2.jpg", "train/3.jpg")
    boxes = b"filename,width,class,xmin,ymin\n1.jpg,5,miku,0,0\n2.jpg,5,rin,0,0\n3.jpg,5,rin,0,0\n"
    with pytest.raises(UsageError, match="is a dataset for detection"):
        understood(files | {"train/_annotations.csv": boxes})
    with pytest.raises(UsageError, match="images lie directly in train"):
        understood(files | {"boxes.csv": boxes, "notes.csv": b"\0\1"})
    assert understood(files | {"boxes.csv": boxes}, table="boxes.csv").classes == ["miku", "rin"]


@pytest.mark.parametrize("table", ["metadata.csv", "other.csv"])
def test_decomposed_names_of_files_are_those_of_a_table(table: str) -> None:
    names = ["ガ.jpg", "é.jpg", "ü.jpg"]
    files = images(*(f"data/{unicodedata.normalize('NFD', name)}" for name in names))
    rows = "".join(f"{name},{label}\n" for name, label in zip(names, "aab", strict=True))
    layout = understood(files | {f"data/{table}": f"file_name,label\n{rows}".encode()})
    assert [layout.readings[path].labels for path in files] == [("a",), ("a",), ("b",)]


def test_options_choose_the_table_and_its_column() -> None:
    table = {"train.csv": b"image,species,individual\n1,fin,x\n2,minke,y\n3,fin,z\n"}
    files = numbered("images", [1, 2, 3]) | table
    assert understood(files).classes == ["fin", "minke"]
    assert understood(files, label_column="Individual").classes == ["x", "y", "z"]
    assert understood(files, table="train.csv", label_column="individual").classes == ["x", "y", "z"]
    assert understood(files, label_level=1).classes == ["images"]
    folders = BUCKETS | {"train.csv": BUCKET_TABLE}
    assert understood(folders, table="train.csv").classes == ["0", "1"]
    assert understood(folders, label_level=2).classes == ["0291", "0292"]
    metadata = images("1.jpg", "2.jpg") | {"metadata.csv": b"file_name,label,genus\n1.jpg,a,x\n2.jpg,b,x\n"}
    assert understood(metadata, label_column="genus").classes == ["x"]
    plain = numbered("a", [1]) | {"x.csv": b"image,site,day\n1,q,r\n", "names.csv": b"a,b\nc,d\n"}
    for options, said in (
        ({"table": "other.csv"}, "has no file other.csv"),
        ({"table": "names.csv"}, "names no images that are there"),
        ({"table": "x.csv"}, r"has several columns \(image, site, day\): set source.label_column"),
        ({"table": "x.csv", "label_column": "y"}, "has no column 'y': its columns are image, site, day"),
        ({"label_column": "y"}, "no table of images with a column 'y'"),
    ):
        with pytest.raises(UsageError, match=said):
            understood(plain, **options)
    with pytest.raises(UsageError, match="has no column 'y'"):
        understood(metadata, label_column="y")


def test_a_build_and_a_training_read_the_same(tmp_path: Path) -> None:
    files = LAYOUTS["ids, with a form for submission"][0]
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    where = f"source.path={json.dumps(str(tmp_path))}"
    source = sources.make(animesion.load_recipe("folder", [where]))
    assert sorted(item.labels for item in source.items()) == [(), ("0",), ("0",), ("3",)]
    assert "2 classes, by train.csv" in source.notes[0]
    read = class_folders.read(tmp_path)
    assert read.splits == {"all": {"0": ["train_images/1.jpg", "train_images/3.jpg"], "3": ["train_images/2.jpg"]}}
    counted = class_counts.count(str(tmp_path))
    assert (counted.kind, counted.counts.names, counted.counts.total.tolist()) == ("folders", ("0", "3"), [2, 1])
    assert counted.reading == read.summary
    with pytest.raises(UsageError, match="label_level and table read classes in different ways"):
        sources.make(animesion.load_recipe("folder", [where, "source.label_level=1", "source.table=train.csv"]))


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["train", "Valid"], {"train": "train", "Valid": "val"}),
        (["Training Set", "testSet"], {"Training Set": "train", "testSet": "test"}),
        (["images_train", "images_val", "docs"], {"images_train": "train", "images_val": "val"}),
        (["train2017", "test-dev"], {}),
        (["birds_train", "birds_test", "cats_test"], {"birds_train": "train", "birds_test": "test"}),
        (["test_tube", "train_station"], {}),
        (["test_images", "miku"], {}),
        (["train", "train_data"], {"train": "train"}),
    ],
)
def test_folders_are_named_after_splits(names: list[str], found: dict[str, str]) -> None:
    assert split_folders(names) == found


@pytest.mark.parametrize(
    ("cells", "classes"),
    [
        (["0.0", "1.0", "", "12.0"], ["0", "1", "", "12"]),
        (["0", "1", "2", "-1", "nan", "NA", "<NA>"], ["0", "1", "2", "", "", "", ""]),
        (["-1", "1", "-1", "1"], ["-1", "1", "-1", "1"]),
        (["-1", "0", "1", "1.0"], ["-1", "0", "1", "1"]),
        (["1.5", "2.0", "", "2.0"], ["1.5", "2.0", "", "2.0"]),
        (["miku", "1.0", "-1", "nan"], ["miku", "1.0", "-1", "nan"]),
        (["001", "010", "001", "010"], ["001", "010", "001", "010"]),
    ],
)
@pytest.mark.parametrize("table", ["metadata.csv", "images.csv"])
def test_numbers_of_classes_are_read_as_ids(cells: list[str], classes: list[str], table: str) -> None:
    files = images(*(f"{i}.jpg" for i in range(2 * len(cells))))
    rows = "".join(f"{i}.jpg,{cell}\n" for i, cell in enumerate([*cells, *cells]))
    layout = understood(files | {table: f"file_name,label\n{rows}".encode()})
    assert [layout.readings[f"{i}.jpg"].labels for i in range(len(cells))] == [(c,) if c else () for c in classes]


@pytest.mark.parametrize("name", ["metadata.csv", "labels.csv"])
@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        (["1.0", "1.5", "2.0"], ["1.0", "2.0"], ["1.0", "2.0"]),
        (["0", "1", "2"], ["1.0", ""], ["1", ""]),
        (["0", "1", "2"], ["-1", "-1"], ["", ""]),
        (["-1", "0", "1"], ["-1", "1"], ["-1", "1"]),
    ],
)
def test_all_tables_decide_what_numbers_are(name: str, train: list[str], test: list[str], expected: list[str]) -> None:
    files = images(*(f"train/{i}.jpg" for i in range(6)), "test/6.jpg", "test/7.jpg")
    tables = {"train": [*enumerate([*train, *train])], "test": [*enumerate(test, 6)]}
    for split, rows in tables.items():
        lines = "".join(f"{i}.jpg,{cell}\n" for i, cell in rows)
        files[f"{split}/{name}"] = f"file_name,label\n{lines}".encode()
    layout = understood(files)
    assert [layout.readings[f"test/{i}.jpg"].labels for i in (6, 7)] == [(each,) if each else () for each in expected]


def test_missing_numbers_of_classes_in_other_tables() -> None:
    lines = b'{"file_name": "1.jpg", "label": 1.0}\n{"file_name": "2.jpg", "label": NaN}\n'
    lines += b'{"file_name": "3.jpg", "label": 0}\n'
    layout = understood(images("1.jpg", "2.jpg", "3.jpg") | {"metadata.jsonl": lines})
    assert [layout.readings[f"{i}.jpg"].labels for i in (1, 2, 3)] == [("1",), (), ("0",)]
    out = io.BytesIO()
    pq.write_table(pa.table({"file_name": ["1.jpg", "2.jpg"], "label": [0.0, float("nan")]}), out)
    layout = understood(images("1.jpg", "2.jpg") | {"metadata.parquet": out.getvalue()})
    assert [layout.readings[f"{i}.jpg"].labels for i in (1, 2)] == [("0",), ()]
