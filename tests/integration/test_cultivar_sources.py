"""The readers of the Ultra-FGVC sets and of moeimouto: layouts, splits, counts, label files, and faults in them."""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import animesion
from animesion import sources
from animesion.errors import UsageError
from animesion.schemas import Item
from animesion.sources.moeimouto import MoeimoutoOptions, MoeimoutoSource
from animesion.sources.published_facts import PUBLISHED, PublishedSet
from animesion.sources.ultra_fgvc import UltraFgvcOptions, UltraFgvcSource


def png(mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new(mode, (8, 8), 3).save(out, "PNG")
    return out.getvalue()


PNG = png()


def put(root: Path, files: Mapping[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def flat(classes: int, train: int = 3, test: int = 3) -> dict[str, bytes | str]:
    sizes = {"train": train, "test": test}
    return {
        f"{number}_{index}_{split}.png": PNG
        for number in range(1, classes + 1)
        for split, count in sizes.items()
        for index in range(1, count + 1)
    }


def stages(classes: int, *, due: tuple[str, ...] = ("R1", "R3", "R4", "R5", "R6")) -> dict[str, bytes | str]:
    files: dict[str, bytes | str] = {}
    for stage in due:
        for split in ("train", "test"):
            names = [(f"{split}{number}_{index}.png", number) for number in range(1, classes + 1) for index in range(5)]
            files |= {f"{stage}/images/{name}": PNG for name, _ in names}
            files[f"{stage}/anno/{split}.txt"] = "".join(f"{name} {number}\r\n" for name, number in names)
    return files


def small(name: str, classes: int, train: int, test: int, per_class: Mapping[str, int] | None = None) -> PublishedSet:
    return PUBLISHED[name].with_counts(classes, {"train": train, "test": test}, per_class or {})


def cotton(path: Path, classes: int = 4, **options: Any) -> UltraFgvcSource:
    due = small("cotton80", classes, 3 * classes, 3 * classes, {"train": 3, "test": 3})
    return UltraFgvcSource(UltraFgvcOptions(path=str(path), set="cotton80", **options), due)


def ageing(path: Path, classes: int = 2, **options: Any) -> UltraFgvcSource:
    due = small("soy-ageing", classes, 25 * classes, 25 * classes, {"train": 25, "test": 25})
    return UltraFgvcSource(UltraFgvcOptions(path=str(path), set="soy-ageing", **options), due)


def listed(source: UltraFgvcSource | MoeimoutoSource) -> list[Item]:
    items = list(source.items())
    assert len({item.key for item in items}) == len(items)
    assert [item.order for item in items] == list(range(len(items)))
    return items


# -- published facts -------------------------------------------------------------------------------------------------


def test_published_counts_add_up_to_those_of_the_paper() -> None:
    cultivars = [each for each in PUBLISHED.values() if each.source == "ultra-fgvc"]
    assert sum(each.classes for each in cultivars) == 3526
    assert sum(each.images for each in cultivars) == 47_114
    for each in cultivars:
        assert sum(each.validation) == each.splits["train"][0]
        for split, count in each.per_class.items():
            assert count * each.classes == each.splits[split][0]
    stage = PUBLISHED["soy-ageing"].select_group("R4")
    assert (stage.splits, stage.validation) == ({"train": (990,), "test": (990,)}, (792, 198))


@pytest.mark.parametrize("name", ["cotton80", "soy-local", "soy-global", "soy-ageing"])
def test_a_complete_download_of_each_balanced_set_is_accepted_and_a_cut_one_is_not(name: str) -> None:
    """The published counts themselves, on listings of the full size (no files are read for the check)."""
    from animesion.sources.published_sets import differences

    due = PUBLISHED[name]
    items = [
        Item(f"k{number}-{split}-{i}", "ultra-fgvc", "", "", 0, split=split, class_order=number)
        for number in range(due.classes)
        for split, count in due.per_class.items()
        for i in range(count)
    ]
    groups = {item.key: due.groups[int(item.key.rpartition("-")[2]) % 5] for item in items} if due.groups else {}
    assert differences(items, due, groups) == []
    text = "; ".join(differences(items[1:], due, groups))
    assert f"{due.splits['train'][0] - 1:,} of {due.splits['train'][0]:,} train images" in text
    assert f"1 class without {due.per_class['train']} train images each, the first 1 with" in text


# -- flat sets -------------------------------------------------------------------------------------------------------


def test_flat_names_give_class_and_split(tmp_path: Path) -> None:
    items = listed(cotton(put(tmp_path, flat(4) | {"readme.txt": "no"})))
    assert Counter(item.split for item in items) == {"train": 12, "test": 12}
    first, last = items[0], items[-1]
    assert (first.source_id, first.labels, first.class_order) == ("cotton80/1_1_train.png", ("cultivar-1",), 0)
    assert (last.source_id, last.labels, last.class_order) == ("cotton80/4_3_test.png", ("cultivar-4",), 3)
    source = cotton(tmp_path)
    assert [payload.content for payload in source.read(listed(source))] == [PNG] * 24
    assert source.notes == ["1 other file skipped"]


def test_a_folder_its_parent_and_a_zip_of_it_list_the_same(tmp_path: Path) -> None:
    put(tmp_path / "all" / "cotton_square_new", flat(4))
    put(tmp_path / "all" / "soybean200_square", flat(9))
    with zipfile.ZipFile(tmp_path / "cotton.zip", "w") as archive:
        for name, content in flat(4).items():
            archive.writestr(f"cotton_square_new/{name}", content)
    places = (tmp_path / "all" / "cotton_square_new", tmp_path / "all", tmp_path / "cotton.zip")
    keys = [[(item.key, item.source_id, item.split) for item in listed(cotton(place))] for place in places]
    assert keys[0] == keys[1] == keys[2]


@pytest.mark.parametrize("name", ["2_1_train.png", "4_3_test.png"])
def test_a_missing_image_is_reported_with_found_and_published_counts(tmp_path: Path, name: str) -> None:
    put(tmp_path, flat(4))
    (tmp_path / name).unlink()
    split = "train" if "train" in name else "test"
    with pytest.raises(UsageError, match=f"Cotton80 is not as published: 11 of 12 {split} images") as caught:
        listed(cotton(tmp_path))
    assert "source.incomplete=accept" in str(caught.value)
    source = cotton(tmp_path, incomplete="accept")
    assert len(listed(source)) == 23
    assert "11 of 12" in source.notes[-1]


def test_another_set_is_recognised_by_its_counts(tmp_path: Path) -> None:
    options = UltraFgvcOptions(path=str(put(tmp_path, flat(80))), set="soy-local")
    with pytest.raises(UsageError, match=r"80 of 200 classes.*these are the counts of cotton80"):
        listed(UltraFgvcSource(options))
    assert len(listed(UltraFgvcSource(UltraFgvcOptions(path=str(tmp_path), set="cotton80")))) == 480


@pytest.mark.parametrize(("alias", "name"), [("cotton", "cotton80"), ("soy", "soy-local"), ("soyageing", "soy-ageing")])
def test_names_of_the_glsim_family_are_understood(alias: str, name: str) -> None:
    assert UltraFgvcOptions.model_validate({"path": "x", "set": alias}).set == name


# -- annotated sets --------------------------------------------------------------------------------------------------


def test_soy_gene_takes_its_split_from_the_annotations(tmp_path: Path) -> None:
    put(
        tmp_path,
        {
            "anno/train.txt": "\ufeffa b.png 1\nc.png 2\n\nd.png 2\n",
            "anno/test.txt": "e.png 1\nf.png 2",
            **{f"images/{name}.png": PNG for name in ("a b", "c", "d", "e", "f", "spare")},
        },
    )
    source = UltraFgvcSource(UltraFgvcOptions(path=str(tmp_path), set="soy-gene"), small("soy-gene", 2, 3, 2))
    items = listed(source)
    found = [(item.source_id.rpartition("/")[2], item.split, item.class_order) for item in items]
    assert found == [
        ("a b.png", "train", 0),
        ("c.png", "train", 1),
        ("d.png", "train", 1),
        ("e.png", "test", 0),
        ("f.png", "test", 1),
    ]
    assert source.notes == ["1 other file skipped"]


def test_soy_ageing_has_five_stages_and_none_called_r2(tmp_path: Path) -> None:
    items = listed(ageing(put(tmp_path, stages(2))))
    assert Counter(item.source_id.split("/")[1] for item in items) == dict.fromkeys(("R1", "R3", "R4", "R5", "R6"), 20)
    assert {item.labels for item in items} == {("cultivar-1",), ("cultivar-2",)}
    one = listed(ageing(tmp_path, stage="R4"))
    assert Counter(item.split for item in one) == {"train": 10, "test": 10}
    assert {item.key for item in one} < {item.key for item in items}


def test_a_stage_that_is_missing_is_named(tmp_path: Path) -> None:
    put(tmp_path, stages(2, due=("R1", "R3", "R5", "R6")))
    with pytest.raises(UsageError, match=r"40 of 50 train images; R4: 0 of 10 train"):
        listed(ageing(tmp_path))


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ("a.png one\n", r"train.txt, line 1: the class 'one' is not a whole number"),
        ("a.png 0\n", "line 1: the class 0 is not from 1"),
        ("a.png 1\na.png 2\n", "'a.png' is listed twice"),
        ("a.png\n", "line 1: 1 column instead of `filename class`"),
        (b"\xff\xfe 1\n", "line 1: not UTF-8"),
        ("gone.png 1\na.png 1\n", r"1 of 2 train images.*1 listed file is missing"),
        ("../../etc/passwd 1\na.png 1\n", r"1 listed file is missing"),
    ],
)
def test_wrong_annotations_are_named_by_file_and_line(tmp_path: Path, annotation: str | bytes, message: str) -> None:
    put(
        tmp_path, {"anno/train.txt": annotation, "anno/test.txt": "b.png 1\n", "images/a.png": PNG, "images/b.png": PNG}
    )
    source = UltraFgvcSource(UltraFgvcOptions(path=str(tmp_path), set="soy-gene"), small("soy-gene", 1, 2, 1))
    with pytest.raises(UsageError, match=message):
        listed(source)


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("cotton80", {"a/b.png": PNG}, r"expected <class from 1>_<index>_train.png and .*; found a/b.png"),
        ("cotton80", stages(1), r"but this is SoyAgeing \(folders R1 to R6\)"),
        ("soy-gene", flat(2), "but this has names such as 1_1_train.png"),
        ("soy-ageing", {"anno/train.txt": "a 1", "images/a": PNG}, "but this has anno/train.txt, as SoyGene has"),
        ("soy-ageing", {"R2/anno/train.txt": "a 1"}, "not laid out as SoyAgeing"),
    ],
)
def test_wrong_layouts_are_named(tmp_path: Path, name: Any, files: dict[str, bytes | str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        listed(UltraFgvcSource(UltraFgvcOptions(path=str(put(tmp_path, files)), set=name)))


def test_a_stage_is_refused_where_there_are_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"source.stage: Cotton80 has no stages"):
        listed(cotton(put(tmp_path, flat(4)), stage="R1"))


# -- validation and label files --------------------------------------------------------------------------------------


def test_val_is_the_tail_of_each_class_as_published(tmp_path: Path) -> None:
    items = listed(cotton(put(tmp_path, flat(4)), val=True))
    assert Counter(item.split for item in items) == {"train": 8, "val": 4, "test": 12}
    assert all(item.source_id.endswith("_3_train.png") for item in items if item.split == "val")
    many = listed(ageing(put(tmp_path / "ageing", stages(2)), val=True))
    # published: 3,960 and 990 of 4,950
    assert Counter(item.split for item in many) == {"train": 40, "val": 10, "test": 50}


@pytest.mark.parametrize("header", ["class_id,dir\n", ""])
@pytest.mark.parametrize("val", [False, True])
def test_label_files_side_by_side_as_glsim_has_them(tmp_path: Path, header: str, val: bool) -> None:
    put(tmp_path / "set", flat(4))
    rows = {
        "train": [(number, index) for number in range(4) for index in (1, 2)],
        "val": [(number, 3) for number in range(4)],
        "train_val": [(number, index) for number in range(4) for index in (1, 2, 3)],
    }
    for name, pairs in rows.items():
        lines = "".join(f"{number},{number + 1}_{index}_train.png\n" for number, index in pairs)
        put(tmp_path / "csv", {f"{name}.csv": header + lines})
    tests = "".join(f"{number},{number + 1}_{index}_test.png\n" for number in range(4) for index in (1, 2, 3))
    put(tmp_path / "csv", {"test.csv": header + tests, "train_val_2.csv": "0,1_1_train.png\n"})
    labelled = listed(cotton(tmp_path / "set", labels=str(tmp_path / "csv"), val=val))
    plain = listed(cotton(tmp_path / "set", val=val))
    assert {item.key: (item.split, item.class_order) for item in labelled} == {
        item.key: (item.split, item.class_order) for item in plain
    }
    due = {"train": 8, "val": 4, "test": 12} if val else {"train": 12, "test": 12}
    assert Counter(item.split for item in labelled) == due


@pytest.mark.parametrize("suffix", [".csv", ".csv.csv"])
@pytest.mark.parametrize("form", ["R4/images/{}", "{}"])
def test_label_files_of_one_stage_even_with_the_name_doubled(tmp_path: Path, suffix: str, form: str) -> None:
    put(tmp_path / "set", stages(2))
    lines = dict.fromkeys(("train", "test"), "class_id,dir\n")
    for split in lines:
        for number in range(2):
            lines[split] += "".join(f"{number},{form.format(f'{split}{number + 1}_{i}.png')}\n" for i in range(5))
    put(tmp_path / "csv", {f"train_val_R4{suffix}": lines["train"], f"test_R4{suffix}": lines["test"]})
    items = listed(ageing(tmp_path / "set", stage="R4", labels=str(tmp_path / "csv")))
    assert {item.source_id.split("/")[1] for item in items} == {"R4"}
    assert Counter(item.split for item in items) == {"train": 10, "test": 10}
    with pytest.raises(UsageError, match=r"must contain test_R1.csv and train_R1.csv or train_val_R1.csv"):
        listed(ageing(tmp_path / "set", stage="R1", labels=str(tmp_path / "csv")))


def test_a_bare_name_that_several_stages_have_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "set", stages(2))
    put(tmp_path / "csv", {"train.csv": "0,train1_0.png\n", "test.csv": "0,test1_0.png\n"})
    with pytest.raises(UsageError, match=r"'train1_0.png' matches R1/images/train1_0.png and R3/images/train1_0.png"):
        listed(ageing(tmp_path / "set", labels=str(tmp_path / "csv")))


# -- moeimouto -------------------------------------------------------------------------------------------------------

FOLDERS = ("000_hatsune_miku", "003_ayanami_rei", "144_kotegawa_yui", "998_extra", "999_more")


def faces(counts: Mapping[str, int]) -> dict[str, bytes | str]:
    files: dict[str, bytes | str] = {}
    for folder, count in counts.items():
        files |= {f"thumb/{folder}/face_{i}_10_20.png": PNG for i in range(count)}
        files |= {f"thumb/{folder}/color.csv": "1,2", f"thumb/{folder}/ignore": ""}
    return files


def moe(path: Path, images: int = 15, classes: int = 5, **options: Any) -> MoeimoutoSource:
    due = PUBLISHED["moeimouto"].with_counts(classes, {"": images}, {})
    return MoeimoutoSource(MoeimoutoOptions(path=str(path), **options), due)


def test_numbered_folders_are_classes_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    put(tmp_path, faces(dict.fromkeys(FOLDERS, 3)))
    source = moe(tmp_path)
    items = listed(source)
    assert list(dict.fromkeys(item.labels[0] for item in items)) == [name[4:] for name in FOLDERS]
    assert [item.class_order for item in items[::3]] == [0, 3, 144, 998, 999]
    assert {item.split for item in items} == {""}
    assert source.notes == ["files that are no faces, such as color.csv and ignore, skipped: 10"]
    assert [item.key for item in listed(moe(tmp_path / "thumb"))] == [item.key for item in items]


def test_both_published_totals_of_moeimouto_are_complete() -> None:
    from animesion.sources.published_sets import differences

    due = PUBLISHED["moeimouto"]
    for total, complete in ((14_397, True), (14_395, True), (14_396, False)):
        items = [Item(str(i), "moeimouto", "", "", i, class_order=i % 173) for i in range(total)]
        assert (differences(items, due) == []) is complete
    assert "172 of 173 classes" in differences([Item("0", "", "", "", 0, class_order=i) for i in range(172)], due)[0]


def test_images_that_are_not_rgb_can_be_skipped(tmp_path: Path) -> None:
    put(tmp_path, faces(dict.fromkeys(FOLDERS, 3)))
    put(
        tmp_path,
        {"thumb/144_kotegawa_yui/face_0_10_20.png": png("L"), "thumb/144_kotegawa_yui/face_1_10_20.png": png("P")},
    )
    assert len(listed(moe(tmp_path))) == 15
    source = moe(tmp_path, images=13, rgb_only=True)
    assert len(listed(source)) == 13
    assert "images that are not RGB skipped: 2" in source.notes


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"miku/1.png": PNG}, r"expected thumb/<NNN>_<character>/face_<A>_<B>_<C>.png; found miku/1.png"),
        (faces({"000_a": 3, "004_a": 12}), "folders 000_a and 004_a are both called 'a'"),
        (faces({"000_a": 3}), "1 of 5 classes; 3 of 15 images"),
    ],
)
def test_faults_of_a_moeimouto_folder_are_reported(tmp_path: Path, files: dict[str, bytes | str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        listed(moe(put(tmp_path, files)))


def test_label_files_give_moeimouto_splits_and_ids(tmp_path: Path) -> None:
    put(tmp_path, faces(dict.fromkeys(FOLDERS, 3)))
    ids = {folder: 4 - rank for rank, folder in enumerate(FOLDERS)}
    train = "".join(f"{ids[folder]},{folder}/face_{i}_10_20.png\n" for folder in FOLDERS for i in (0, 1))
    test = "".join(f"{ids[folder]},{folder}\\face_2_10_20.png\n" for folder in FOLDERS[1:])
    put(tmp_path / "csv", {"train.csv": train, "test.csv": "class_id,dir\n" + test})
    source = moe(tmp_path, labels=str(tmp_path / "csv"))
    items = listed(source)
    assert Counter(item.split for item in items) == {"train": 10, "test": 4, "": 1}
    assert {item.labels[0]: item.class_order for item in items} == {name[4:]: i for name, i in ids.items()}
    assert "images in no label file, which have no split: 1" in source.notes


def test_label_files_that_were_not_written_together_are_refused(tmp_path: Path) -> None:
    put(tmp_path, faces(dict.fromkeys(FOLDERS, 3)))
    put(
        tmp_path / "csv",
        {"train.csv": f"0,{FOLDERS[0]}/face_0_10_20.png\n", "test.csv": f"0,{FOLDERS[1]}/face_0_10_20.png\n"},
    )
    with pytest.raises(UsageError, match="the animesion and the GLSim ones cannot be mixed"):
        listed(moe(tmp_path, labels=str(tmp_path / "csv")))
    put(tmp_path / "csv", {"test.csv": "0,000_other/face_9.png\n"})
    with pytest.raises(UsageError, match=r"'000_other/face_9.png' is not in"):
        listed(moe(tmp_path, labels=str(tmp_path / "csv")))


# -- hostile names ---------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(min_size=1, max_size=40), max_size=6))
@example(["."])
def test_other_names_in_an_archive_are_skipped(tmp_path: Path, names: list[str]) -> None:
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in flat(2).items():
            archive.writestr(name, content)
        for name in {name for name in names if name.isprintable() and name not in flat(2)}:
            archive.writestr(name, b"x")
    # a hostile name may be a thirteenth image only if it is spelt like one
    source = cotton(path, classes=2, incomplete="accept")
    images = {payload.content for payload in source.read([item for item in listed(source) if not item.failure])}
    assert images == {PNG}
    assert len(source.notes) <= 2


def test_members_that_lead_out_of_an_archive_have_no_bytes(tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in flat(4).items():
            archive.writestr(f"../{name}" if name == "1_1_train.png" else name, content)
    with pytest.raises(UsageError, match="11 of 12 train images"):
        listed(cotton(path))
    items = listed(cotton(path, incomplete="accept"))
    assert [item.failure for item in items if item.failure] == ["unsafe path"]


def test_the_sources_are_installed_and_report_missing_options() -> None:
    assert {"ultra-fgvc", "moeimouto", "sample-files"} <= set(sources.names())
    with pytest.raises(UsageError, match=r"'source.path' is missing .*--sample"):
        sources.make(animesion.load_recipe("cotton80"))
    with pytest.raises(UsageError, match=r"source.set: .*'wheat'"):
        sources.make(animesion.load_recipe("cotton80", ["source.path=x", "source.set=wheat"]))
