from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from animesion.cli.stats import stats
from animesion.errors import UsageError

PUBLISHED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "daf-re"


def report(*arguments: str | Path) -> dict[str, Any]:
    result = CliRunner().invoke(stats, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def tables(*arguments: str | Path) -> str:
    result = CliRunner().invoke(stats, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(path: str | Path) -> str:
    with pytest.raises(UsageError) as caught:
        CliRunner().invoke(stats, [str(path)], catch_exceptions=False)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_shard(path: Path, members: list[tuple[str | tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as shard:
        for member, content in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    return path


def sample(key: str, label: int, name: str = "") -> list[tuple[str | tarfile.TarInfo, bytes]]:
    described = json.dumps({"label": label, **({"name": name} if name else {})}).encode()
    return [(f"{key}.cls", str(label).encode()), (f"{key}.jpg", b"pixels"), (f"{key}.json", described)]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "built"
    folder.mkdir()
    (folder / "dataset.json").write_text("{}")
    (folder / "classes.csv").write_text("class_id,name,train,val,test,total\n0,rin,7,1,2,10\n1,miku,2,1,0,3\n")
    rows = [("train", 0)] * 7 + [("val", 0)] + [("test", 0)] * 2 + [("train", 1)] * 2 + [("val", 1)]
    write_index(folder, rows)
    return folder


def write_index(folder: Path, rows: list[tuple[str, int]]) -> None:
    columns = {"key": [f"k{i}" for i in range(len(rows))], "split": [s for s, _ in rows], "label": [c for _, c in rows]}
    pq.write_table(pa.table(columns), folder / "index.parquet")


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published DAF:re files are not on this machine")
def test_published_label_files() -> None:
    found = report(PUBLISHED)
    assert (found["kind"], found["images"], found["classes"]) == ("labels", 463_437, 3_263)
    assert (found["train"], found["val"], found["test"]) == (322_947, 46_050, 94_440)
    assert found["gini"] == pytest.approx(0.6597, abs=5e-5)
    assert found["imbalance_factor"] == pytest.approx(534.15)
    assert found["bands"] == {
        "of": "train",
        "many": {"classes": 650, "images": 233_163},
        "medium": {"classes": 1_793, "images": 76_635},
        "few": {"classes": 820, "images": 13_149},
    }
    assert found["splits"]["train"]["gini"] == pytest.approx(0.6625, abs=5e-5)
    assert found["files"]["val.csv"] == {"rows": 46_050, "classes": 3_263, "repeated_paths": 0}
    assert found["files"]["train_first20pct.csv"]["counted"] is False
    assert {name: found["consistency"][name]["mismatched_classes"] for name in ("val", "test", "names")} == {
        "val": 0,
        "test": 0,
        "names": 0,
    }
    assert found["consistency"]["shared_paths"] == {"val/test": 0}
    assert found["legacy_dafre"] == {"train": 322_947, "val": 46_050, "test": 94_440, "mismatched_classes": 0}


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published DAF:re files are not on this machine")
def test_published_files_alone() -> None:
    assert report(PUBLISHED / "per_class_counts.csv")["legacy_dafre"]["mismatched_classes"] == 0
    alone = report(PUBLISHED / "test.csv")
    assert (alone["images"], alone["test"], alone["classes"]) == (94_440, 94_440, 3_263)
    assert alone["total"]["head"][0]["name"] == "hatsune_miku"
    split = report(PUBLISHED / "per_class_counts.csv", "--split", "legacy-dafre")["split"]
    assert (split["train"], split["val"], split["test"]) == (322_947, 46_050, 94_440)


def test_built_dataset(dataset: Path) -> None:
    found = report(dataset)
    assert (found["kind"], found["images"], found["train"], found["val"], found["test"]) == ("dataset", 13, 9, 2, 2)
    assert found["splits"]["test"]["empty_classes"] == 1
    assert found["files"]["index.parquet"] == {"rows": 13, "classes": 2}
    assert {name: each["mismatched_classes"] for name, each in found["consistency"].items()} == {
        "train": 0,
        "val": 0,
        "test": 0,
    }


def test_built_dataset_whose_index_disagrees(dataset: Path) -> None:
    write_index(dataset, [("train", 0)] * 9 + [("extra", 1)])
    consistency = report(dataset)["consistency"]
    assert consistency["train"]["mismatched_classes"] == 2
    assert consistency["unknown_splits"] == ["extra"]
    assert "train: the counts and index.parquet disagree in 2 classes" in tables(dataset)
    (dataset / "index.parquet").write_bytes(b"not parquet")
    assert "index.parquet" in refused(dataset)


def test_dataset_with_one_split(dataset: Path) -> None:
    (dataset / "index.parquet").unlink()
    (dataset / "classes.csv").write_text("class_id,name,train,total\n0,rin,7,7\n")
    found = report(dataset)
    assert (found["train"], list(found["splits"]), "val" in found) == (7, ["train"], False)


def test_label_folder_without_counts(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "labels"
    folder.mkdir(parents=True)
    (folder / "train.csv").write_text("0,0001/1.jpg\n0,0002/2.jpg\n1,0003/3.jpg\n")
    (folder / "test.csv").write_text("class_id,dir\n0,0001/1.jpg\n0,0001/1.jpg\n")
    (folder / "train_val.csv").write_text("0,0001/1.jpg\n")
    (folder / "classid_classname.csv").write_text("0,rin\n1,miku\n2,luka\n")
    (folder / "train_tags.csv").write_text("id,dir,class_id,tags\n1,a,0,x\n")
    (folder / "notes.csv").write_text("id,note,tags\n1,a,x\n")
    found = report(folder.parent)
    assert (found["images"], found["classes"], found["train"], found["test"]) == (5, 3, 3, 2)
    assert found["total"]["empty_classes"] == 1
    assert found["files"]["test.csv"]["repeated_paths"] == 1
    assert found["files"]["train_tags.csv"] == {"classes": 1, "counted": False, "repeated_paths": 0, "rows": 1}
    assert found["files"]["notes.csv"] == {"counted": False}
    assert found["consistency"]["shared_paths"] == {"train/test": 1}
    text = tables(folder.parent)
    assert "paths in both train and test: 1" in text
    assert "1 repeated paths" in text


def test_shards(tmp_path: Path) -> None:
    link = tarfile.TarInfo("k9.cls")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device = tarfile.TarInfo("k8.cls")
    device.type = tarfile.CHRTYPE
    named = sample("a/k0", 4, "rin")
    # the JSON may come before the label
    write_shard(tmp_path / "train-00000.tar", [(link, b""), (device, b""), *named[::-1], *sample("a/k1", 4, "rin")])
    write_shard(tmp_path / "train-00001.tar", [*sample("k2", 1), ("k3.jpg", b"pixels")])
    write_shard(tmp_path / "val-00000.tar", sample("k4", 4))
    for path in (tmp_path, tmp_path / "*-0000?.tar"):
        found = report(path)
        assert (found["kind"], found["images"], found["train"], found["val"]) == ("shards", 4, 3, 1)
        assert [(c["class_id"], c["name"], c["images"]) for c in found["total"]["head"]] == [(4, "rin", 3), (1, "1", 1)]
        assert found["consistency"] == {"samples_without_label": 1}
    assert report(tmp_path / "val-00000.tar")["images"] == 1


@pytest.mark.parametrize("label", [b"x" * 65, b"-1", b"", b"9" * 30, "٣".encode()])
def test_a_hostile_label_names_shard_and_key(tmp_path: Path, label: bytes) -> None:
    shard = write_shard(tmp_path / "train-00000.tar", [("key7.cls", label)])
    message = refused(shard)
    assert "train-00000.tar" in message
    assert "key7" in message


@pytest.mark.parametrize("content", [b"\xff", b"[" * 100_000, b"[]", b'{"name": 3}'])
def test_a_hostile_json_costs_the_name_only(tmp_path: Path, content: bytes) -> None:
    shard = write_shard(tmp_path / "s.tar", [("k.cls", b"3"), ("k.json", content)])
    assert report(shard)["total"]["head"][0]["name"] == "3"


def test_a_giant_json_is_refused(tmp_path: Path) -> None:
    assert "'k'" in refused(write_shard(tmp_path / "s.tar", [("k.cls", b"3"), ("k.json", b" " * (1 << 20) + b"{}")]))


def test_damaged_shards(tmp_path: Path) -> None:
    whole = write_shard(tmp_path / "whole-0.tar", [*sample("k0", 0), *sample("k1", 1)]).read_bytes()
    for size in (0, 100, 512 + 10, 1024, 1536, 4 * 512, 5 * 512):
        cut = tmp_path / "cut-0.tar"
        cut.write_bytes(whole[:size])
        assert "not a whole uncompressed tar" in refused(cut)
    scratched = bytearray(whole)
    scratched[1024:1100] = b"?" * 76
    (tmp_path / "scratched.tar").write_bytes(scratched)
    assert "not a whole uncompressed tar" in refused(tmp_path / "scratched.tar")


def test_class_folders(tmp_path: Path) -> None:
    for name in ("b/1.jpg", "b/deep/2.PNG", "b/notes.txt", "a/3.webp", ".cache/4.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    os.symlink(tmp_path / "b", tmp_path / "c", target_is_directory=True)
    found = report(tmp_path)
    assert (found["kind"], found["images"], found["classes"]) == ("folders", 3, 2)  # c is b once more
    assert [(c["class_id"], c["name"]) for c in found["total"]["head"]] == [(1, "b"), (0, "a")]


def test_class_folders_in_split_folders(tmp_path: Path) -> None:
    for name in ("train/a/1.jpg", "train/b/1.jpg", "val/a/2.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = report(tmp_path)
    assert (found["train"], found["val"], found["splits"]["val"]["empty_classes"]) == (2, 1, 1)


def test_what_cannot_be_counted(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "none")
    assert "holds no image files" in refused(tmp_path)
    assert "is not a supported store" in refused("ftp://host/dataset")
    (tmp_path / "classid_classname.csv").write_text("0,rin\n")
    assert "has class names but no counts" in refused(tmp_path / "classid_classname.csv")
    (tmp_path / "notes.txt").write_text("")
    assert "neither .csv nor .tar" in refused(tmp_path / "notes.txt")
    (tmp_path / "wrong.csv").write_text("0,a.jpg\nx,b.jpg\n")
    assert "wrong.csv, line 2" in refused(tmp_path / "wrong.csv")
    assert "no labelled image" in refused(write_shard(tmp_path / "s.tar", [("rin/1.jpg", b"pixels")]))


def test_strategies_and_plots(dataset: Path, tmp_path: Path) -> None:
    found = report(dataset, "--split", "grouped", "--plots", tmp_path / "plots")
    assert found["split"]["strategy"] == "grouped"
    assert found["split"]["train"] + found["split"]["val"] + found["split"]["test"] == 13
    assert [Path(p).name for p in found["plots"]] == ["lorenz.png", "rank-frequency.png"]
    assert all(Path(p).stat().st_size > 10_000 for p in found["plots"])


def test_tables_fit_80_columns_and_carry_no_escape(dataset: Path) -> None:
    (dataset / "classes.csv").write_text(
        "class_id,name,train,val,test,total\n0,[red]rin\x1b[2J" + "n" * 90 + ",7,1,2,10\n1,miku,2,1,0,3\n"
    )
    text = tables(dataset, "--split", "legacy-dafre")
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert "[red]rin?[2J" in text
    assert "13 images in 2 classes" in text


def test_help_is_light() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from animesion.cli.stats import stats;"
        "out = CliRunner().invoke(stats, ['--help']).output; assert 'animesion stats runs/daf-re' in out;"
        "print(sorted({'numpy', 'pandas', 'pyarrow', 'rich', 'matplotlib', 'torch'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
