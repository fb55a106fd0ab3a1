"""Datasets for detection and segmentation are refused for what they are, and never read as classes of images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from animesion.dataset import layouts, readings
from animesion.errors import UsageError
from animesion.sources import class_folders


def understood(files: Iterable[str] | Mapping[str, bytes], **options: Any) -> readings.Layout:
    contents = files if isinstance(files, Mapping) else dict.fromkeys(files, b"")
    return layouts.understand(list(contents), lambda paths: [contents[path] for path in paths], "set/", **options)


YOLO_BOX = b"0 0.51 0.5 0.25 1e-1\n12 .5 0.5 0.2 0.2\n"
POLYGON = b"3 0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2\n"
VOC = b'<?xml version="1.0"?>\n<annotation verified="yes">\n<folder>x</folder>'
COCO = b'{\n "info": {"year": 2026}, "licenses": [], "images": []}'

#: Exports for detection -> the kind that is named.
DETECTION: dict[str, tuple[Mapping[str, bytes], str]] = {
    "YOLO, images above splits": (
        {"images/train/1.jpg": b"", "images/val/2.jpg": b"", "labels/train/1.txt": YOLO_BOX, "labels/val/2.txt": b"",
         "data.yaml": b"names: [miku, rin]"},
        "YOLO, such as labels/train/1.txt",
    ),
    "YOLO, splits above images": (
        {"train/images/1.jpg": b"", "train/labels/1.txt": b"",
         "valid/images/2.jpg": b"", "valid/labels/2.txt": POLYGON},
        "YOLO, such as valid/labels/2.txt",
    ),
    "YOLO, one folder": ({"images/1.jpg": b"", "labels/1.txt": YOLO_BOX, "classes.txt": b"miku"}, "YOLO"),
    "darknet": ({"obj_train_data/1.jpg": b"", "obj_train_data/1.txt": YOLO_BOX, "obj.names": b"miku"}, "YOLO"),
    "darknet, flat": ({"1.jpg": b"", "1.txt": YOLO_BOX, "2.jpg": b"", "classes.txt": b"miku"}, "YOLO"),
    "Roboflow's COCO": (
        {"train/1.jpg": b"", "train/_annotations.coco.json": b"{}", "valid/2.jpg": b""},
        "COCO, such as train/_annotations.coco.json",
    ),
    "COCO": (
        {"train2017/1.jpg": b"", "val2017/2.jpg": b"", "annotations/instances_train2017.json": COCO},
        "COCO, such as annotations/instances_train2017.json",
    ),
    "CVAT's COCO": ({"images/default/1.jpg": b"", "annotations/instances_default.json": COCO}, "COCO"),
    "Label Studio's COCO": ({"images/1.jpg": b"", "result.json": COCO}, "COCO"),
    "CreateML": ({"train/1.jpg": b"", "train/_annotations.createml.json": b"[]"}, "CreateML"),
    "a table of boxes": ({"train/1.jpg": b"", "train/_annotations.csv": b"filename,class,xmin"}, "a table of boxes"),
    "Pascal VOC": (
        {"VOC2007/JPEGImages/1.jpg": b"", "VOC2007/Annotations/1.xml": VOC, "VOC2007/ImageSets/Main/train.txt": b"1"},
        "Pascal VOC, such as VOC2007/Annotations/1.xml",
    ),
    "Roboflow's Pascal VOC": ({"train/1.jpg": b"", "train/1.xml": VOC, "test/2.jpg": b""}, "Pascal VOC"),
    "Pascal VOC beside one folder": ({"pets/1.jpg": b"", "pets/1.xml": VOC}, "Pascal VOC"),
    "LabelMe": ({"img/1.jpg": b"", "img/1.json": b'{"version": "5.0", "flags": {}, "shapes": []}'}, "LabelMe"),
}  # fmt: skip


@pytest.mark.parametrize("name", DETECTION)
def test_datasets_for_detection_are_named(name: str) -> None:
    files, kind = DETECTION[name]
    with pytest.raises(UsageError) as refused:
        understood(files)
    assert f"is a dataset for detection ({kind}" in str(refused.value)
    assert "set source.label_level if the folders are the classes" in str(refused.value)
    labelled = b"file_name,label\n" + b"".join(b"%s,x\n" % path.encode() for path in files if path.endswith(".jpg"))
    assert understood({**files, "metadata.csv": labelled}).classes == ["x"]


@pytest.mark.parametrize(
    "files",
    [["images/1.jpg", "masks/1.png"], ["images/a/1.jpg", "annotations/a/1.png"], ["x/image/1.png", "x/mask/1.png"]],
)
def test_masks_are_no_images_of_a_class(files: list[str]) -> None:
    with pytest.raises(UsageError, match="holds masks, such as"):
        understood(files)
    assert understood(["images/1.jpg", "masks/2.png"]).classes == ["images", "masks"]


@pytest.mark.parametrize("options", [{"label_level": 1}, {"pattern": r"(?P<split>[a-z]+)/images/(?P<class>[a-z]+).*"}])
def test_options_of_the_user_come_first(options: dict[str, Any]) -> None:
    files = {"train/images/a1.jpg": b"", "train/labels/a1.txt": YOLO_BOX}
    assert len(understood(files, **options).classes) == 1


def test_folders_on_disk_are_refused_too(tmp_path: Path) -> None:
    for name, content in DETECTION["YOLO, images above splits"][0].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match="is a dataset for detection"):
        class_folders.read(tmp_path)
