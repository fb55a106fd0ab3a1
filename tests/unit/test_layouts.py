"""Every layout that people have is read rightly, or refused in a sentence, in whatever it is packed."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import animesion
from animesion import sources
from animesion.dataset import layouts, readings
from animesion.errors import UsageError
from animesion.schemas import Item
from animesion.sources import class_folders
from tests.conftest import draw


def understood(files: Iterable[str] | Mapping[str, bytes], **options: Any) -> readings.Layout:
    contents = files if isinstance(files, Mapping) else dict.fromkeys(files, b"")
    hidden = [path for path in contents if path.rpartition("/")[2].startswith(".")]
    return layouts.understand(
        [path for path in contents if path not in hidden],
        lambda paths: [contents[path] for path in paths],
        "faces/",
        hidden=hidden,
        **options,
    )


def classes(layout: readings.Layout) -> dict[str, tuple[str, str]]:
    """Path -> class and split."""
    return {path: ("/".join(reading.labels), reading.split) for path, reading in layout.readings.items()}


TABLE = b"file_name,label\n1.png,rin\n2.png,miku\n"

#: name -> files, what is understood of them, and how the sentence begins.
LAYOUTS: dict[str, tuple[Mapping[str, bytes] | list[str], dict[str, tuple[str, str]], str]] = {
    "class folders": (
        ["miku/1.png", "rin/2.png", "README.md"],
        {"miku/1.png": ("miku", ""), "rin/2.png": ("rin", "")},
        "2 classes, by folder; 1 file beside the classes left out, 'README.md'",
    ),
    "class folders with folders in them": (
        ["miku/1.png", "miku/more/3.png", "rin/2.png"],
        {"miku/1.png": ("miku", ""), "miku/more/3.png": ("miku", ""), "rin/2.png": ("rin", "")},
        "2 classes, by folder",
    ),
    "split folders": (
        ["train/miku/1.png", "Valid/miku/2.png", "testing/rin/3.png", "data.yaml"],
        {"train/miku/1.png": ("miku", "train"), "Valid/miku/2.png": ("miku", "val"), "testing/rin/3.png": ("rin",
         "test")},
        "2 classes in splits train/val/test, by folder; 1 file",
    ),
    "one split": (["train/miku/1.png", "train/rin/2.png"],
                  {"train/miku/1.png": ("miku", "train"), "train/rin/2.png": ("rin", "train")},
                  "2 classes in splits train, by folder"),
    "a common root": (
        ["set/images/miku/1.png", "set/images/rin/2.png", "set/LICENSE.txt", "notes/readme.md"],
        {"set/images/miku/1.png": ("miku", ""), "set/images/rin/2.png": ("rin", "")},
        "2 classes, by folder below set/images/; 2 files",
    ),
    "a common root of splits": (
        ["set/train/miku/1.png", "set/test/rin/2.png"],
        {"set/train/miku/1.png": ("miku", "train"), "set/test/rin/2.png": ("rin", "test")},
        "2 classes in splits train/test, by folder below set/",
    ),
    "splits in classes": (
        ["miku/train/1.png", "miku/test/2.png", "rin/train/3.png"],
        {"miku/train/1.png": ("miku", "train"), "miku/test/2.png": ("miku", "test"), "rin/train/3.png": ("rin",
         "train")},
        "2 classes in splits train/test, by folder",
    ),
    "imagefolder": (
        {"1.png": b"", "2.png": b"", "3.png": b"", "metadata.csv": TABLE},
        {"1.png": ("rin", ""), "2.png": ("miku", ""), "3.png": ("", "")},
        "2 classes, by metadata.csv; 1 image has no class (images in no row: 1",
    ),
    "imagefolder in splits": (
        {"train/1.png": b"", "train/2.png": b"", "test/1.png": b"", "test/2.png": b"",
         "train/metadata.jsonl": b'{"file_name": "1.png", "label": true}\n{"file_name": "2.png", "label": 3.0}\n',
         "test/metadata.jsonl": b'{"file_name": "1.png", "label": true}\n{"file_name": "2.png", "label": "x"}\n'},
        {"train/1.png": ("true", "train"), "train/2.png": ("3", "train"),
         "test/1.png": ("true", "test"), "test/2.png": ("x", "test")},
        "3 classes in splits train/test, by metadata.jsonl",
    ),
    "a table of a spreadsheet": (
        {"img/1.png": b"", "2.png": b"",
         "metadata.csv": (
             "File Name; Class ;subset\r\nimg\\1.png;初音 ミク;training\r\n./2.png;'x';dev\r\n".encode("utf-16")
         )},
        {"img/1.png": ("初音 ミク", "train"), "2.png": ("'x'", "val")},
        "2 classes in splits train/val, by metadata.csv",
    ),
    "Roboflow's table": (
        {"train/1.png": b"", "train/2.png": b"",
         "train/_classes.csv": b"filename, miku, rin\n1.png, 1, 0\n2.png, 1, 1\n"},
        {"train/1.png": ("miku", "train"), "train/2.png": ("miku/rin", "train")},
        "2 classes in splits train, by _classes.csv",
    ),
    "flat with sidecars": (
        {"1.jpg": b"", "1.jpg.json": b'{"tag_string_character": "miku rin", "rating": "g"}', "2.jpg": b"",
         ".2_meta.json": b'{"danbooru": {"id": 2, "tag_string_character": "rin"}, "tags": {"solo": 0.9}}',
         "2.txt": b"solo"},
        {"1.jpg": ("miku/rin", ""), "2.jpg": ("rin", "")},
        "2 classes, by sidecar",
    ),
    "class folders with sidecars": (
        {"miku/1.JPG": b"", "miku/1.JPG.json": b'{"rating": "q", "artist": "x"}', "miku/1.txt": b"solo",
         "rin/2.jpg": b""},
        {"miku/1.JPG": ("miku", ""), "rin/2.jpg": ("rin", "")},
        "2 classes, by folder",
    ),
    "images beside the classes": (
        ["miku/1.png", "rin/2.png", "3.png"],
        {"miku/1.png": ("miku", ""), "rin/2.png": ("rin", ""), "3.png": ("", "")},
        "2 classes, by folder; 1 image has no class",
    ),
    "a stray image and a LICENSE beside the root": (
        ["set/miku/1.png", "set/rin/2.png", "preview.png", "LICENSE"],
        {"set/miku/1.png": ("miku", ""), "set/rin/2.png": ("rin", "")},
        "2 classes, by folder below set/; 2 files beside the classes left out, 'LICENSE', 'preview.png'",
    ),
    "no suffixes": (["miku/1", "rin/2"], {"miku/1": ("miku", ""), "rin/2": ("rin", "")}, "2 classes, by folder"),
    "days below classes": (
        ["a/day1/1.png", "a/day2/2.png", "b/day1/3.png", "b/day2/4.png"],
        {"a/day1/1.png": ("a", ""), "a/day2/2.png": ("a", ""), "b/day1/3.png": ("b", ""), "b/day2/4.png": ("b", "")},
        "2 classes, by folder",
    ),
    "class folders with boxes": (
        {"miku/1.png": b"", "miku/1.txt": b"0 0.5 0.5 1 1\n", "rin/2.png": b"", "rin/2.txt": b""},
        {"miku/1.png": ("miku", ""), "rin/2.png": ("rin", "")},
        "the boxes in miku/1.txt and others (YOLO) are not read; 2 classes, by folder",
    ),
    "class folders with a COCO file": (
        {"train/1_rosa/1.jpg": b"", "train/2_acer/2.jpg": b"", "train.json": b'{"images": [], "annotations": []}'},
        {"train/1_rosa/1.jpg": ("1_rosa", "train"), "train/2_acer/2.jpg": ("2_acer", "train")},
        "the boxes in train.json and others (COCO) are not read; 2 classes in splits train, by folder",
    ),
    "captions are no boxes": (
        {"miku/1.png": b"", "miku/1.txt": b"1girl, solo\n", "miku/2.png": b"", "miku/2.txt": b"2 girls 3 4 hats\n"},
        {"miku/1.png": ("miku", ""), "miku/2.png": ("miku", "")},
        "1 class, by folder",
    ),
    "a class called test": (
        ["test/1.png", "miku/2.png"], {"test/1.png": ("test", ""), "miku/2.png": ("miku", "")}, "2 classes, by folder"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_understood(name: str) -> None:
    files, expected, summary = LAYOUTS[name]
    layout = understood(files)
    assert classes(layout) == expected
    assert layout.summary.startswith(summary), layout.summary


def test_sidecars_say_where_images_come_from() -> None:
    files, _, _ = LAYOUTS["class folders with sidecars"]
    assert understood(files).readings["miku/1.JPG"].fields == {"rating": "q", "author": "x"}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["train/1.png", "test/2.png"], "in no class folder: add a metadata.csv"),
        (["set/images/1.png", "set/readme.md"], "images lie directly in images, in no class folder: add a metadata.csv "
         "with the columns file_name and label, or set source.pattern if their names have it, or source.label_level=2"),
        (["v1/re-zero/rem/1.png", "v1/re-zero/ram/2.png", "v1/fate/saber/3.png", "v1/fate/rin/4.png"],
         "set source.label_level=2 or =3"),
        (["1.png", "2.png"], "nothing that names their classes"),
        (["notes.md", "a/b.txt"], "holds no image files"),
        (["set/preview.png", "set/miku/1.png", "set/rin/2.png"], "1 class set, or 2 classes below it (miku, rin)"),
        (["re-zero/rem/1.png", "re-zero/ram/2.png", "fate/saber/3.png", "fate/rin/4.png"],
         "2 classes by the first folder (fate, re-zero), or 4 by the second"),
        (["color/apple/1.png", "color/pear/2.png", "color/corn/3.png", "gray/apple/1.png", "gray/pear/2.png",
          "gray/corn/3.png"],
         "2 classes by the first folder (color, gray), or 3 by the second (apple, corn, pear): set "
         "source.label_level=1 or =2, or source.path to one of the first"),
        (["fold1/oak/1.png", "fold1/ash/2.png", "fold2/oak/3.png", "fold2/ash/4.png"], "2 by the second (ash, oak)"),
        (["Original/A/1.png", "Original/B/2.png", "Augmented/A/3.png", "Augmented/B/4.png"], "2 by the second (A, B)"),
        ([*(f"apple/{kind}/{i}.png" for i in range(10) for kind in ("healthy", "rust")), "apple/stray.png",
          "corn/healthy/1.png", "corn/blight/close/1.png"], "or 3 by the second (blight, healthy, rust)"),
        (["train/a/1.png", "test/a/2.png", "extra/3.png"], "splits test, train with extra beside them, or 3 classes"),
        ({"1.png": b"", "metadata.csv": b"label\nx\n"}, "has no column file_name"),
        ({"1.png": b"", "metadata.csv": b"file_name,width,height\n1.png,3,4\n"}, "has no column label"),
        ({"1.png": b"", "metadata.csv": b"file_name,label,split\n1.png,x,holdout\n"}, "has the split 'holdout'"),
        ({"1.png": b"", "metadata.csv": b"file_name,label\nelsewhere.png,x\n"}, "names no file that is there"),
        ({"1.png": b"", "metadata.csv": b"PK\3\4workbook"}, "is a workbook or zip"),
        ({"1.png": b"", "metadata.jsonl": b'{"file_name": \n'}, "line 1 is no JSON"),
    ],
)  # fmt: skip
def test_what_is_unclear_is_refused(files: Any, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        understood(files)
    assert said in str(refused.value)


def test_the_label_level_and_the_pattern_decide() -> None:
    deep = ["re-zero/rem/1.png", "re-zero/ram/2.png", "fate/saber/3.png", "fate/rin/4.png"]
    assert understood(deep, label_level=1).classes == ["fate", "re-zero"]
    assert understood(deep, label_level=2).classes == understood(deep, label_level=-1).classes
    assert understood(["train/1.png", "test/2.png"], label_level=1).classes == ["test", "train"]
    splits = understood(["x/train/a/b/1.png", "x/test/a/c/2.png"], label_level=-1)
    assert (splits.classes, splits.splits) == (["b", "c"], ["train", "test"])
    named = understood(
        ["v1_train_miku_07_1.png", "v1_test_rin_08_2.png", "stray.txt"],
        pattern=r"v1_(?P<split>[a-z]+)_(?P<class>[a-z]+)_(?P<group>\d+)_.*",
    )
    assert classes(named) == {"v1_train_miku_07_1.png": ("miku", "train"), "v1_test_rin_08_2.png": ("rin", "test")}
    assert [reading.group for reading in named.readings.values()] == ["07", "08"]
    assert named.left_out == ["stray.txt"]
    for options, said in (
        ({"label_level": 3}, "no folder at source.label_level=3"),
        ({"pattern": "(?P<class>x)"}, "none of the 4"),
    ):
        with pytest.raises(UsageError, match=said):
            understood(deep, **options)


# -- in whatever they are packed -------------------------------------------------------------------------------------


def packed(files: Mapping[str, bytes], root: Path) -> dict[str, Path]:
    """The same files as a folder, a tar and a zip."""
    for name, content in files.items():
        (root / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "folder" / name).write_bytes(content)
    with tarfile.open(root / "set.tar", "w") as tar, zipfile.ZipFile(root / "set.zip", "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
            archive.writestr(name, content)
    return {"folder": root / "folder", "tar": root / "set.tar", "zip": root / "set.zip"}


def items(path: Path) -> list[Item]:
    source = sources.make(animesion.load_recipe("folder", [f"source.path={json.dumps(str(path))}"]))
    return list(source.items())


NAMES = st.sampled_from(["miku", "rin", "luka", "初音ミク", "a b", "x_1"])


@st.composite
def trees(draw: st.DrawFn) -> dict[str, bytes]:
    """Files of a known layout."""
    kind = draw(st.sampled_from(["classes", "splits", "table", "deep"]))
    wrapper = draw(st.sampled_from(["", "set/", "v1/images/"]))
    names = draw(st.lists(NAMES, min_size=2, max_size=4, unique=True))
    files: dict[str, bytes] = {}
    for i, name in enumerate(names):
        for k in range(draw(st.integers(1, 3))):
            content = b"%d-%d" % (i, k)
            if kind == "splits":
                files[f"{wrapper}{draw(st.sampled_from(['train', 'val', 'test']))}/{name}/{k}.png"] = content
            elif kind == "table":
                files[f"{i}-{k}.png"] = content
            else:
                inner = "more/" if kind == "deep" and k else ""
                files[f"{wrapper}{name}/{inner}{k}.png"] = content
    if kind == "table":
        rows = "".join(f"{path},{names[int(path.partition('-')[0])]}\n" for path in files)
        files["metadata.csv"] = f"file_name,label\n{rows}".encode()
    return files


@given(files=trees(), stray=st.sampled_from(["README.md", "LICENSE", "classes.txt", "x.pdf", ".DS_Store"]))
@settings(max_examples=25, deadline=None)
def test_the_same_in_every_container_and_with_a_stray_file(
    files: dict[str, bytes], stray: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plain = packed(files, tmp_path_factory.mktemp("plain"))
    more = packed({**files, stray: b"stray"}, tmp_path_factory.mktemp("more"))
    seen = [
        sorted((item.key, item.labels, item.split, item.families) for item in items(path))
        for path in (*plain.values(), *more.values())
    ]
    assert all(each == seen[0] for each in seen)
    assert all(labels for _, labels, _, _ in seen[0])


# -- names -----------------------------------------------------------------------------------------------------------


class Unflagged(zipfile.ZipInfo):
    """A member whose name is in a legacy encoding, as old programs write it."""

    encoding = "cp932"

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:  # noqa: N802 (of the standard library)
        return self.filename.encode(self.encoding), self.flag_bits & ~0x800


@pytest.mark.parametrize(
    ("encoding", "names"),
    [
        ("cp932", ("初音ミク", "鏡音リン")),
        ("gb18030", ("初音未来", "镜音铃")),
        ("cp437", ("crème_brûlée", "señorita")),
        ("utf-8", ("初音ミク", "crème")),
    ],
)
def test_names_of_old_zips_are_decoded(encoding: str, names: tuple[str, str], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        for name in names:
            info = Unflagged(f"{name}/ソ1.png" if encoding == "cp932" else f"{name}/1.png")
            info.encoding = encoding
            archive.writestr(info, name.encode())
    recipe = animesion.load_recipe("folder", [f"source.path={json.dumps(str(tmp_path / 'faces.zip'))}"])
    source = sources.make(recipe)
    found = list(source.items())
    assert sorted(item.labels[0] for item in found) == sorted(names)
    assert {payload.content for payload in source.read(found)} == {name.encode() for name in names}
    [note] = [note for note in source.notes if "encoding" in note]
    assert f"read as {encoding}, such as" in note
    forced = sources.make(animesion.load_recipe("folder", [*overrides(recipe), "source.encoding=cp437"]))
    assert {item.labels for item in forced.items()} != {(name,) for name in names} or encoding == "cp437"


def overrides(recipe: Any) -> list[str]:
    return [f"source.path={json.dumps(recipe.source.options['path'])}"]


def notes(folder: Path) -> list[str]:
    source = sources.make(animesion.load_recipe("folder", [f"source.path={json.dumps(str(folder))}"]))
    list(source.items())
    return source.notes


def test_hidden_folders_are_named(tmp_path: Path) -> None:
    for name in ("miku/1.png", "rin/1.png", ".hack/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    said = notes(tmp_path)
    assert any("hidden folders are skipped: '.hack'" in note for note in said), said


def test_hidden_sidecars_that_are_read_are_not_called_skipped(tmp_path: Path) -> None:
    post = json.dumps({"danbooru": {"id": 1, "rating": "q"}, "tags": {}}).encode()
    for name, content in {
        "miku/1.png": b"x", "miku/.1_meta.json": post, "rin/2.png": b"x", "rin/.2_meta.json": b"damaged",
        "rin/.DS_Store": b"",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    source = sources.make(animesion.load_recipe("folder", [f"source.path={json.dumps(str(tmp_path))}"]))
    assert [item.rating for item in source.items()] == ["q", ""]
    assert [note for note in source.notes if "skipped" in note] == ["2 hidden or system files skipped"]
    (tmp_path / "rin" / ".DS_Store").unlink()
    (tmp_path / "rin" / ".2_meta.json").write_bytes(post)
    assert not [note for note in notes(tmp_path) if "skipped" in note]


@pytest.mark.parametrize("options", [{"label_level": 1}, {"pattern": "(?P<class>[a-z]+)/.*"}])
def test_sidecars_count_whatever_names_the_class(options: dict[str, Any]) -> None:
    layout = understood({"miku/1.jpg": b"", "miku/1.jpg.json": b'{"rating": "q"}', "rin/2.jpg": b""}, **options)
    assert layout.readings["miku/1.jpg"].fields == {"rating": "q"}
    assert layout.sidecars == {"miku/1.jpg.json"}


def test_side_files_are_read_in_place_too(tmp_path: Path) -> None:
    for name, content in {"1.png": b"", "2.png": b"", "metadata.csv": TABLE}.items():
        (tmp_path / name).write_bytes(content)
    assert class_folders.read(tmp_path).splits == {"all": {"rin": ["1.png"], "miku": ["2.png"]}}


def test_sidecars_in_an_archive_are_read_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"c{i % 2}/{i}.jpg": b"x" for i in range(50)}
    files |= {f"{name}.json": b'{"rating": "s"}' for name in files}
    path = packed(files, tmp_path)["zip"]
    opened: list[Any] = []
    original = zipfile.ZipFile.__init__

    def counted(self: zipfile.ZipFile, *arguments: Any, **settings: Any) -> None:
        opened.append(arguments)
        original(self, *arguments, **settings)

    monkeypatch.setattr(zipfile.ZipFile, "__init__", counted)
    assert {item.rating for item in items(path)} == {"s"}
    assert len(opened) < 10


def test_a_backslash_in_a_tar_is_a_character(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name in ("back\\slash/1.png", "b/2.png"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    assert {item.labels for item in items(tmp_path / "set.tar")} == {("back\\slash",), ("b",)}


def test_a_folder_that_cannot_be_listed_is_no_empty_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("luka/1.png", "miku/1.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("miku"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)  # root may list anything, so the mode of the folder does not matter
    with pytest.raises(UsageError, match=r"miku cannot be listed \(Permission denied\)"):
        items(tmp_path)
    with pytest.raises(UsageError, match="cannot be listed"):
        class_folders.read(tmp_path)


def test_a_build_keeps_the_splits_of_folders_and_prints_what_was_understood(tmp_path: Path) -> None:
    for number, name in enumerate(("train/miku/1.png", "train/rin/2.png", "val/miku/3.png", "test/rin/4.png")):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        draw(number).save(tmp_path / "set" / name)
    (tmp_path / "set" / "README.md").write_text("stray")
    recipe = animesion.load_recipe("folder", [f"source.path={json.dumps(str(tmp_path / 'set'))}"])
    result = animesion.build(recipe, tmp_path / "out", workers=1)
    assert result.splits == {"train": 2, "val": 1, "test": 1}
    assert result.classes == ["miku", "rin"]
    assert result.notes[0].startswith("2 classes in splits train/val/test, by folder; 1 file beside the classes")
