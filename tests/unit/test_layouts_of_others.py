"""Layouts and tables in which others publish images: each was once read as something else without a word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from animesion.dataset import layouts, readings
from animesion.errors import UsageError

Files = Mapping[str, bytes]


def understood(files: Files, **options: Any) -> readings.Layout:
    return layouts.understand(list(files), lambda paths: [files[path] for path in paths], "set/", **options)


def classes(layout: readings.Layout) -> dict[str, str]:
    """Image -> class."""
    found = layout.readings.items()
    return {path: "/".join(reading.labels) for path, reading in found if readings.is_image(path)}


def splits(layout: readings.Layout) -> dict[str, str]:
    """Image -> split."""
    return {path: reading.split for path, reading in layout.readings.items() if readings.is_image(path)}


def images(*paths: str) -> dict[str, bytes]:
    return dict.fromkeys(paths, b"")


def numbered(folder: str, count: int = 6, start: int = 0, suffix: str = ".jpg") -> dict[str, bytes]:
    return images(*(f"{folder}/{number}{suffix}" for number in range(start, start + count)))


def table(header: str, *rows: str) -> bytes:
    return "\n".join([header, *rows, ""]).encode()


# -- which column names the images -----------------------------------------------------------------------------------

SHUFFLED = [3, 0, 5, 1, 4, 2]


@pytest.mark.parametrize(
    ("header", "row"),
    [(",image_id,label", "{i},{n},{c}"), ("id,filename,label", "{i},{n}.jpg,{c}"), ("No,Filename,Class", "{i},{n},{c}"),
     ("index,name,label", "{i},{n},{c}"), ("label,image_id", "{d},{n}")],
)  # fmt: skip
def test_a_number_of_rows_or_of_classes_is_no_name_of_an_image(header: str, row: str) -> None:
    of_number = {n: "cat" if n % 2 else "dog" for n in SHUFFLED}
    digit = {"cat": 1, "dog": 2}
    rows = [row.format(i=i, n=n, c=of_number[n], d=digit[of_number[n]]) for i, n in enumerate(SHUFFLED)]
    layout = understood(numbered("images") | {"train.csv": table(header, *rows)})
    expected = {
        f"images/{n}.jpg": of_number[n] if "{c}" in row else str(digit[of_number[n]]) for n in range(len(SHUFFLED))
    }
    assert classes(layout) == expected


def test_two_columns_that_name_different_images_are_refused() -> None:
    rows = [f"{i},{n},{'ab'[n % 2]}" for i, n in enumerate(SHUFFLED)]
    with pytest.raises(UsageError, match="names different images in 'first' and in 'second'"):
        understood(numbered("images") | {"t.csv": table("first,second,label", *rows)})


def test_suffixes_in_another_case_and_ambiguous_names() -> None:
    rows = [f"{n}.JPG,{'ab'[n % 2]}" for n in range(6)]
    layout = understood(numbered("batch_a", 3) | numbered("batch_b", 3, 3) | {"t.csv": table("filename,label", *rows)})
    assert classes(layout)["batch_b/3.jpg"] == "b"
    both = numbered("images") | numbered("images_512")
    with pytest.raises(UsageError, match="several files have each name: write paths into it"):
        understood(both | {"train.csv": table("id,label", *(f"{n},{'ab'[n % 2]}" for n in range(6)))})
    some = numbered("train") | numbered("test", 2)
    layout = understood(some | {"labels.csv": table("id,label", *(f"{n},{'ab'[n % 2]}" for n in range(6)))})
    assert "rows whose name several files have: 2" in layout.summary


# -- which column names the classes ----------------------------------------------------------------------------------


def test_columns_of_classes_that_differ_are_refused() -> None:
    rows = [f"{n}.jpg,{('dog', 'cat')[n % 2]},{['pug', 'beagle', 'persian'][n % 3]}" for n in range(6)]
    for name in ("pets.csv", "metadata.csv"):
        files = numbered("images") | {f"images/{name}": table("image,category,breed", *rows)}
        if name == "pets.csv":
            with pytest.raises(UsageError, match=r"several columns of classes \(category, breed\), which differ"):
                understood(files)
        assert understood(files, label_column="breed").classes == ["beagle", "persian", "pug"]
    same = [f"{n}.jpg,{n % 2},{'ab'[n % 2]}" for n in range(6)]
    assert understood(numbered("i") | {"t.csv": table("image,label,class_name", *same)}).classes == ["0", "1"]


@pytest.mark.parametrize("name", ["observations.csv", "images/metadata.csv"])
def test_ranks_of_a_taxonomy_are_neither_classes_nor_groups(name: str) -> None:
    kinds = ["Aves,Corvidae,Corvus,raven", "Aves,Laridae,Larus,gull", "Mammalia,Felidae,Felis,cat"]
    rows = [f"{n}.jpg,{kinds[n % 3]}" for n in range(6)]
    layout = understood(numbered("images") | {name: table("file_name,class,family,genus,species", *rows)})
    assert layout.classes == ["cat", "gull", "raven"]
    assert {reading.group for reading in layout.readings.values()} == {""}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", table("file_name,text", "a/0.jpg,a girl", "a/1.jpg,a girl", "b/0.jpg,a boy", "b/1.jpg,x")),
        ("metadata.csv", table("file_name,license", "a/0.jpg,cc0", "a/1.jpg,cc0", "b/0.jpg,cc-by", "b/1.jpg,cc0")),
        ("metadata.jsonl", b'{"file_name": "a/0.jpg", "objects": {"bbox": []}}\n' * 2),
    ],
)
def test_captions_and_the_like_leave_class_folders_alone(name: str, content: bytes) -> None:
    layout = understood(numbered("a", 2) | numbered("b", 2) | {name: content})
    assert classes(layout) == {"a/0.jpg": "a", "a/1.jpg": "a", "b/0.jpg": "b", "b/1.jpg": "b"}
    assert layout.summary.startswith(f"{name} has no column of classes; 2 classes, by folder")
    with pytest.raises(UsageError, match="has no column label"):
        understood(images("0.jpg", "1.jpg", "2.jpg") | {"metadata.csv": table("file_name,text", "0.jpg,a", "1.jpg,a")})


@pytest.mark.parametrize(
    "names", [("HAM_part_1", "HAM_part_2"), ("images_001/images", "images_002/images"), ("fold1", "fold2", "fold3")]
)
def test_parts_of_a_set_are_no_classes_where_a_table_names_the_images(names: tuple[str, ...]) -> None:
    files: dict[str, bytes] = {}
    for place, name in enumerate(names):
        files |= numbered(name, 3, 3 * place)
    rows = [f"{n},{30 + n},{'mf'[n % 2]},{'xyz'[n % 3]}" for n in range(3 * len(names))]
    with pytest.raises(UsageError, match=r"has several columns \(image_id, age, sex, dx\): set source.label_column"):
        understood(files | {"meta.csv": table("image_id,age,sex,dx", *rows)})
    assert understood(files | {"meta.csv": table("image_id,age,sex,dx", *rows)}, label_column="dx").classes == [*"xyz"]


def test_a_single_folder_beside_a_file_that_lists_its_images_is_refused() -> None:
    files = numbered("photos_jpgs", 4)
    with pytest.raises(UsageError, match=r"all images are in photos_jpgs, and labels\.json lists them"):
        understood(files | {"labels.json": b'{"0.jpg": "x", "1.jpg": "y"}'})
    with pytest.raises(UsageError, match=r"annotations\.xml lists them"):
        understood(files | {"annotations.xml": b'<image id="0" name="1.jpg"><tag label="x"/></image>'})
    layout = understood(files | {"README.txt": b"photographs", "config.json": b"{}"})
    assert layout.classes == ["photos_jpgs"]


def test_sidecars_with_several_characters_in_a_single_folder_are_refused() -> None:
    def posts(folder: str, *characters: str) -> dict[str, bytes]:
        files = images(*(f"{folder}/{i}.jpg".lstrip("/") for i in range(len(characters))))
        return files | {
            f"{path}.json": b'{"tags_character": ["%s"]}' % c.encode()
            for path, c in zip(files, characters, strict=True)
        }

    with pytest.raises(UsageError, match="all images are in vocaloid, and their sidecars have several characters"):
        understood(posts("danbooru/vocaloid", "hatsune_miku", "kagamine_rin"))
    assert understood(posts("", "hatsune_miku", "kagamine_rin")).classes == ["hatsune_miku", "kagamine_rin"]
    assert understood(posts("Hatsune Miku", "hatsune_miku", "kagamine_rin")).classes == ["Hatsune Miku"]
    assert understood(posts("vocaloid", "hatsune_miku", "kagamine_rin"), label_level=-1).classes == ["vocaloid"]


def test_forms_to_be_filled_in_are_no_labels() -> None:
    files = numbered("train", 4) | numbered("test", 2, 10)
    given = table("id,label", "0,1", "1,2", "2,1", "3,2")
    layout = understood(files | {"train.csv": given, "sample_sub.csv": table("id,label", "10,0", "11,0")})
    assert layout.classes == ["1", "2"]
    assert "'sample_sub.csv'" in layout.summary
    kept = understood(files | {"train.csv": given, "test.csv": table("id,label", "10,1", "11,1")})
    assert classes(kept)["test/10.jpg"] == "1"
    more = understood(files | {"train.csv": given, "owls.csv": table("id,label", "10,owl", "11,owl")})
    assert more.classes == ["1", "2", "owl"]


def test_rows_that_contradict_are_counted_and_separators_are_stated() -> None:
    rows = ["0.jpg,a", "1.jpg,b", "2.jpg,a", "3.jpg,b", "0.jpg,b"]
    layout = understood(numbered("images", 4) | {"t.csv": table("image,label", *rows)})
    assert "images whose rows have different classes: 1" in layout.summary
    excel = b"sep=;\r\nfilename;label\r\n0.jpg;a\r\n1.jpg;b\r\n2.jpg;a\r\n"
    assert classes(understood(numbered("images", 3) | {"t.csv": excel}))["images/1.jpg"] == "b"
    blanks = images("images/img 0.jpg", "images/img 1.jpg", "images/2.jpg")
    listed = b"images/img 0.jpg 0\nimages/img 1.jpg 1\nimages/2.jpg 1\n"
    assert classes(understood(blanks | {"list.txt": listed})) == dict(zip(blanks, "011", strict=True))


def test_classes_that_count_from_another_number_than_the_folders_are_refused() -> None:
    files = images(*(f"train/{c}/{i}.jpg" for c in range(3) for i in range(2))) | numbered("test", 6, 10)
    rows = [f"{10 + i}.jpg,{i % 3 + 1}" for i in range(6)]
    with pytest.raises(UsageError, match=r"folders are classes 0 to 2, and test\.csv has 1 to 3"):
        understood(files | {"test.csv": table("file,label", *rows)})


# -- splits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (images("train/a/0.jpg", "train/b/1.jpg", "val/a/2.jpg", "val/b/3.jpg", "docs/4.jpg"),
         "splits train, val with docs beside them, or 3 classes"),
        (images("train/a/0.jpg", "train/b/1.jpg", "unlabeled/4.jpg"), "splits train with unlabeled beside them"),
        (images("train/a/0.jpg", "train/b/1.jpg", "eval/a/2.jpg", "eval/b/3.jpg"), "splits train with eval beside"),
        (images(*(f"{s}/{c}/{i}.jpg" for s in ("train", "test") for c in ("apple/rust", "apple/scab", "corn/ok",
                                                                         "corn/rust") for i in range(3))),
         "2 classes by the first folder (apple, corn), or 3 by the second (ok, rust, scab): set source.label_level=2"),
        (images("Acer/rubrum/0.jpg", "Acer/saccharum/1.jpg", "Ginkgo/biloba/2.jpg", "Quercus/alba/3.jpg",
                "Quercus/robur/4.jpg"), "3 classes by the first folder"),
        (images("benign/benign (1).png", "benign/benign (1)_mask.png", "normal/normal (1).png"), "holds masks"),
    ],
)  # fmt: skip
def test_what_is_unclear_is_refused(files: Files, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        understood(files)
    assert said in str(refused.value)


@pytest.mark.parametrize("name", ["images", "test", "unknown"])
def test_unlabelled_test_images_are_no_class(name: str) -> None:
    files = images("train/a/0.jpg", "train/b/1.jpg", f"test/{name}/2.jpg", f"test/{name}/3.jpg")
    layout = understood(files)
    assert classes(layout)[f"test/{name}/2.jpg"] == ""
    assert layout.summary.startswith("2 classes in splits train/test, by folder; 2 images have no class")
    other = understood(images("train/a/0.jpg", "train/b/1.jpg", "test/c/2.jpg"))
    assert other.classes == ["a", "b", "c"]


def test_classes_of_one_name_below_several_folders_are_joined_with_a_note() -> None:
    files = images("Quercus/alba/0.jpg", "Quercus/robur/1.jpg", "Salix/alba/2.jpg", "Salix/caprea/3.jpg")
    layout = understood(files, label_level=2)
    assert layout.summary.startswith(
        "1 class is below several folders and joined, such as Quercus/alba, Salix/alba; 3 classes, by folder"
    )
    of_splits = images("train/a/0.jpg", "test/a/1.jpg", "train/b/2.jpg")
    assert understood(of_splits, label_level=2).summary.startswith("2 classes in splits train/test")


FOLDERS = images("images/cat/0.jpg", "images/cat/1.jpg", "images/dog/2.jpg", "images/dog/3.jpg")


@pytest.mark.parametrize(
    "tables",
    [
        {"labels.csv": table("filepath,label,split", "cat/0.jpg,cat,train", "cat/1.jpg,cat,test", "dog/2.jpg,dog,train",
                             "dog/3.jpg,dog,test")},
        {"splits.csv": table("file,is_train", "0.jpg,1", "1.jpg,0", "2.jpg,1", "3.jpg,0")},
        {"train.csv": table(",Filename,Label", "0,cat/0.jpg,0", "1,dog/2.jpg,1"),
         "test.csv": table(",Filename,Label", "0,cat/1.jpg,0", "1,dog/3.jpg,1")},
        {"meta/train.txt": b"cat/0\ndog/2\n", "meta/test.txt": b"cat/1\ndog/3\n"},
        {"meta/train.txt": b"cat/0\ndog/2\n", "meta/test.txt": b"cat/1\ndog/3\n",
         "names.csv": table("file,label", "0.jpg,Cat", "1.jpg,Cat", "2.jpg,Dog", "3.jpg,Dog")},
    ],
)  # fmt: skip
def test_tables_of_splits_beside_class_folders(tables: Files) -> None:
    layout = understood(FOLDERS | tables)
    assert classes(layout) == {path: path.split("/")[1] for path in FOLDERS}
    assert splits(layout) == dict(zip(FOLDERS, ["train", "test", "train", "test"], strict=True))
    assert layout.summary.startswith("2 classes in splits train/test, by folder")
    assert "splits by " in layout.summary


def test_splits_of_tables_and_folders() -> None:
    rows = ["train/0.jpg,a", "train/1.jpg,b", "test/2.jpg,a", "test/3.jpg,b"]
    metadata = understood(
        images(*(row.split(",")[0] for row in rows)) | {"metadata.csv": table("file_name,label", *rows)}
    )
    assert splits(metadata)["test/3.jpg"] == "test"
    beside = numbered("training_set", 2) | numbered("test_set", 2)
    named = {f"{s}/metadata.csv": table("file_name,label", "0.jpg,a", "1.jpg,b") for s in ("training_set", "test_set")}
    assert splits(understood(beside | named))["test_set/1.jpg"] == "test"
    flags = [f"{n},{n % 2},{1 - n % 2},{int(n < 4)}" for n in range(6)]
    one_hot = understood(numbered("images") | {"t.csv": table("image_id,rust,scab,is_train", *flags)})
    assert one_hot.classes == ["rust", "scab"]
    assert splits(one_hot)["images/5.jpg"] == "test"
    sibling = images("images/0.jpg", "images/1.jpg") | {
        "notes/metadata.csv": table("file_name,label", "../images/0.jpg,a", "../images/1.jpg,b")
    }
    assert understood(sibling).classes == ["a", "b"]


def test_splits_that_are_known_in_part_are_refused() -> None:
    rows = [f"{n}.jpg,{'ab'[n % 2]},{'train' if n < 4 else 'holdout'}" for n in range(6)]
    with pytest.raises(UsageError, match="has the split 'holdout', which is no name of train, val or test"):
        understood(numbered("images") | {"t.csv": table("image,label,split", *rows)})
    other = [f"{n}.jpg,{'ab'[n % 2]},{'xy'[n % 2]}" for n in range(6)]
    assert understood(numbered("images") | {"t.csv": table("image,label,set", *other)}).splits == []


def test_splits_that_contradict_do_not_count() -> None:
    files = images(*(f"images/{c}/{c}{i}.jpg" for c in "ab" for i in range(4)))
    halves = ["".join(f"{c}/{c}{i}\n" for c in "ab" for i in part).encode() for part in ((0, 1), (2, 3))]
    lists = {"train1.txt": halves[0], "test1.txt": halves[1], "train2.txt": halves[1], "test2.txt": halves[0]}
    layout = understood(files | lists)
    assert layout.splits == []
    assert layout.summary.startswith("tables have several splits for images/a/a")
    assert understood(files | {"train.txt": halves[0] + halves[1], "val.txt": b"a/a0\n"}).splits == []
    twice = table("file,split", "a0.jpg,train", "a1.jpg,train", "a0.jpg,test", "b0.jpg,test", "b1.jpg,train")
    layout = understood(files | {"s.csv": twice})
    assert layout.splits == []
    assert layout.summary.startswith("splits that do not count, as rows of an image have several: 1; 2 classes")


def test_ids_of_a_test_without_classes_make_no_splits() -> None:
    files = numbered("train", 12) | numbered("test", 12, 20)
    given = table("id,label", *(f"{n},{'ab'[n % 2]}" for n in range(12)))
    layout = understood(files | {"train.csv": given, "test.csv": table("id", *(str(n) for n in range(20, 32)))})
    assert (layout.classes, layout.splits) == (["a", "b"], [])
    listed = {"train.txt": b"".join(b"%d.jpg\n" % n for n in range(8)), "test.txt": b"8.jpg\n9.jpg\n10.jpg\n11.jpg\n"}
    layout = understood(numbered("images", 12) | {"labels.csv": given} | listed)
    assert splits(layout)["images/11.jpg"] == "test"
    assert splits(layout)["images/0.jpg"] == "train"


@pytest.mark.parametrize(
    ("header", "row"),
    [("id,level", "{n},{c}"), ("id,label,fold", "{n},{c},{f}"), ("id,label,is_train", "{n},{c},{f}"),
     ("id,label,width,height", "{n},{c},5,4"), ("id,a,b", "{n},{c},{d}"), ("image,label", "{n}.jpg,{c}")],
)  # fmt: skip
def test_small_numbers_beside_ids_name_no_images(header: str, row: str) -> None:
    rows = [row.format(n=n, c=n % 2, d=1 - n % 2, f=n % 3 > 0) for n in range(8)]
    rows = [each.replace("True", "1").replace("False", "0") for each in rows]
    found = classes(understood(numbered("images", 8) | {"t.csv": table(header, *rows)}))
    expected = ["b", "a"] if header == "id,a,b" else ["0", "1"]
    assert [found[f"images/{n}.jpg"] for n in range(4)] == [expected[n % 2] for n in range(4)]
    beside = images(*(f"{'ab'[n % 2]}/{n}.jpg" for n in range(8)))
    assert understood(beside | {"t.csv": table(header, *rows)}).classes == ["a", "b"]


def test_paths_come_before_names_of_several_files() -> None:
    files = numbered("data/x", 4) | numbered("data/y", 4)
    rows = [f"{n}.jpg,data/{f}/{n}.jpg,{'pq'[n % 2]}" for f in "xy" for n in range(4)]
    for header in ("filename,path,label", "filename,filepath,label"):
        assert understood(files | {"t.csv": table(header, *rows)}, table="t.csv").classes == ["p", "q"]
    pairs = table("a,b,label", "0.jpg,1.jpg,1", "1.jpg,2.jpg,0", "2.jpg,3.jpg,1")
    assert understood(numbered("cat", 2) | numbered("dog", 2, 2) | {"pairs.csv": pairs}).classes == ["cat", "dog"]
    lost = numbered("train", 3) | images("test/img_0.jpg")
    layout = understood(lost | {"t.csv": table("file,label", *(f"train/{n}.jpg,{'aab'[n]}" for n in range(3)),
                                               "train/IMG_0.JPG,a")})  # fmt: skip
    assert classes(layout)["test/img_0.jpg"] == ""


def test_class_folders_that_look_like_parts_or_forms_remain_classes() -> None:
    files = numbered("cat_images", 2) | numbered("dog_images", 2, 2)
    info = table("file,size,date", *(f"{n}.jpg,{n},2020" for n in range(4)))
    assert understood(files | {"info.csv": info}).classes == ["cat_images", "dog_images"]
    credits = table("file,photographer", *(f"{n}.jpg,{'xy'[n % 2]}" for n in range(4)))
    with pytest.raises(UsageError, match="can be read in two ways"):
        understood(files | {"credits.csv": credits})
    tables = {
        f"{name}.csv": table("id,label", *(f"{n},{name}" for n in range(3 * place, 3 * place + 3)))
        for place, name in enumerate(("car", "bus", "submarine", "test_owl"))
    }
    assert understood(numbered("images", 12) | tables).classes == ["bus", "car", "submarine", "test_owl"]
    views = images(*(f"train/{c}/{v}/{c}.jpg" for c in "abc" for v in ("front", "back", "left", "right")))
    assert understood(views | images("test/a/front/1.jpg", "test/b/back/2.jpg")).classes == ["a", "b", "c"]
    bats = numbered("bat", 20) | images("bat/batman.jpg", "bat/batman mask.jpg", "cat/1.jpg")
    assert understood(bats).classes == ["bat", "cat"]
