"""A build over every kind of bad image, a full disk, a busy folder: one sentence or one counted drop."""

from __future__ import annotations

import functools
import io
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

import animesion
from animesion.cli.build import build
from animesion.errors import AnimesionError, UsageError
from tests.running import run_here

CLI = "from animesion.cli import main; main()"


def image(seed: int, side: int = 64) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def put(root: Path, name: str, content: bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def class_folders(root: Path, per_class: int = 6) -> Path:
    for c, label in enumerate(("asuka", "rei")):
        for i in range(per_class):
            put(root, f"{label}/{i:03d}.jpg", saved(image(100 * c + i)))
    return root


def recipe(root: Path, *overrides: str) -> Any:
    return animesion.load_recipe("folder", [f"source.path={root}", *overrides])


def rows(out: Path) -> dict[str, dict[str, Any]]:
    return {row["source_id"]: row for row in pq.read_table(out / "curated.parquet").to_pylist()}


def test_every_bad_image_is_one_counted_drop(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set")
    good = saved(image(1))
    exif = Image.Exif()
    exif[0x0112] = 6
    bad = {
        "empty": (b"", "empty file"),
        "text": (b"hello", "not an image"),
        "cut": (good[: len(good) // 2], "truncated image"),
        "broken": (saved(image(7), "PNG").replace(b"IDAT", b"IDAT\xff\xff", 1), "corrupt image"),
        "huge": (
            good[: good.index(b"\xff\xc0") + 5] + b"\xff" * 4 + good[good.index(b"\xff\xc0") + 9 :],
            "too many pixels",
        ),
        "moving": (saved(image(8), "GIF", save_all=True, append_images=[image(9)]), "animated"),
        "film": (b"\x00\x00\x00\x18ftypmp42" + bytes(20), "unsupported format"),
        "tiny": (saved(image(10, 8)), "too small"),
        "strip": (saved(image(11, 640).crop((0, 0, 640, 40))), "aspect ratio"),
        "copy": ((root / "rei/000.jpg").read_bytes(), "exact duplicate"),
    }
    odd = {
        "cmyk": saved(image(20).convert("CMYK")),
        "palette": saved(image(21).convert("P"), "PNG"),
        "sixteen": saved(Image.fromarray(np.linspace(0, 65535, 4096).astype(np.uint16).reshape(64, 64)), "PNG"),
        "glass": saved(image(23).convert("RGBA"), "PNG"),
        "turned": saved(image(24).crop((0, 0, 64, 48)), exif=exif),
        "png-as-jpg": saved(image(25), "PNG"),
    }
    for name, (content, _) in bad.items():
        put(root, f"rei/{name}.jpg", content)
    for name, content in odd.items():
        put(root, f"rei/{name}.jpg", content)
    out = tmp_path / "out"
    result = animesion.build(recipe(root, "filter.min_side=16", "filter.max_aspect=4.0"), out, workers=2)
    found = rows(out)
    assert {name: found[f"rei/{name}.jpg"]["reason"] for name in bad} == {n: reason for n, (_, reason) in bad.items()}
    assert all(found[f"rei/{name}.jpg"]["kept"] for name in odd)
    assert found["rei/turned.jpg"]["width"] == 48
    assert result.seen == len(found) == result.kept + sum(result.dropped.values())
    dataset = animesion.open_dataset(out)
    assert {sample.decode().mode for sample in dataset.samples()} == {"RGB"}


def test_one_image_under_two_labels_is_dropped_with_its_twin(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set")
    put(root, "asuka/twin.jpg", (root / "rei/001.jpg").read_bytes())
    put(root, "asuka/near.jpg", saved(Image.open(root / "rei/002.jpg"), quality=60))
    animesion.build(recipe(root), tmp_path / "out", workers=1)
    found = rows(tmp_path / "out")
    conflicts = {name for name, row in found.items() if row["reason"] == "label conflict"}
    assert conflicts == {"asuka/twin.jpg", "rei/001.jpg", "asuka/near.jpg", "rei/002.jpg"}
    assert "also under asuka as folder-twin-" in found["rei/001.jpg"]["detail"]
    animesion.build(recipe(root, "duplicates.conflicts=keep"), tmp_path / "kept", workers=1)
    assert sum(row["kept"] for row in rows(tmp_path / "kept").values()) == 12


def test_nothing_left_is_one_sentence_with_the_table_written(tmp_path: Path) -> None:
    put(tmp_path / "set", "a/1.jpg", b"no")
    with pytest.raises(AnimesionError, match="no image is left of 1: most were dropped as 'not an image'"):
        animesion.build(recipe(tmp_path / "set"), tmp_path / "out", workers=1)
    assert rows(tmp_path / "out")["a/1.jpg"]["reason"] == "not an image"


def test_too_little_address_space_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (600_000_000, resource.RLIM_INFINITY))
    refused = run_here("stats", str(tmp_path))
    assert refused.returncode == 1
    assert refused.stderr == (
        "error: this process may use 0.6 GB of address space and needs 3.0 GB: raise the limit (ulimit -v)\n"
    )
    assert run_here("--help").returncode == 0
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (4_000_000_000, resource.RLIM_INFINITY))
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    assert run_here("stats", str(tmp_path)).returncode == 2
    assert os.environ["OPENBLAS_NUM_THREADS"] == "1"


@pytest.mark.slow
@pytest.mark.parametrize("gigabytes", [0.3, 0.5, 0.7, 1.0, 1.2, 1.5, 1.8, 2.0])
def test_a_build_in_little_address_space_is_one_sentence(tmp_path: Path, gigabytes: float) -> None:
    limit = int(gigabytes * 1e9)

    def little() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    line = [sys.executable, "-c", CLI, "build", "folder", "--set", f"source.path={class_folders(tmp_path / 'set')}"]
    refused = subprocess.run(
        [*line, "--out", str(tmp_path / "out")], capture_output=True, text=True, preexec_fn=little, timeout=60
    )
    assert refused.returncode == 1
    assert refused.stderr.startswith(
        f"error: this process may use {gigabytes:.1f} GB of address space and needs 3.0 GB"
    )
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["file", "file/out"])
def test_a_file_where_a_folder_belongs_is_one_sentence(tmp_path: Path, place: str) -> None:
    root = class_folders(tmp_path / "set")
    (tmp_path / "file").write_text("mine")
    refused = run_here("build", "folder", "--set", f"source.path={root}", "--out", str(tmp_path / place))
    assert refused.returncode == 2
    assert f"{tmp_path / 'file'} is a file" in refused.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_leaves_nothing_half_written_and_resumes(tmp_path: Path) -> None:
    """The disk is full three times, each time a bit later."""
    root = class_folders(tmp_path / "set", 30)
    out = tmp_path / "out"
    command = ("build", "folder", "--set", f"source.path={root}", "--out", str(out), "--workers", "2")

    process = [sys.executable, "-c", CLI, *command]
    for limit in (3_000, 20_000, 60_000):
        small_files = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
        full = subprocess.run(process, capture_output=True, text=True, preexec_fn=small_files)
        assert full.returncode == 1
        assert full.stderr.count("error:") == 1
        assert "no space to write" in full.stderr
        assert "Traceback" not in full.stderr
        assert not list(out.rglob(".tmp-*"))
    again = run_here(*command)
    assert again.returncode == 0, again.stderr
    animesion.build(recipe(root), tmp_path / "other", workers=1)
    for shard in (tmp_path / "other" / "data").glob("*.tar"):
        assert (out / "data" / shard.name).read_bytes() == shard.read_bytes()


def test_a_busy_folder_and_another_recipe_are_refused(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set")
    out = tmp_path / "out"
    animesion.build(recipe(root), out, workers=1)
    with pytest.raises(UsageError, match="written by another recipe"):
        animesion.build(recipe(root, "pack.size=32"), out, workers=1)
    result = animesion.build(recipe(root, "pack.size=32"), out, workers=1, replace=True)
    assert result.kept == 12
    assert next(iter(animesion.open_dataset(out).samples())).decode().size == (32, 32)


def test_changed_sources_are_noticed(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set")
    out = tmp_path / "out"
    animesion.build(recipe(root), out, workers=1)
    (root / "rei/000.jpg").unlink()
    put(root, "rei/new.jpg", saved(image(999)))
    result = animesion.build(recipe(root), out, workers=1)
    assert result.seen == 12
    assert "rei/new.jpg" in rows(out)
    assert "rei/000.jpg" not in rows(out)


def test_a_dataset_that_is_being_rebuilt_is_no_dataset(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set")
    out = tmp_path / "out"
    put(root, "empty/.keep", b"")
    animesion.build(recipe(root), out, workers=1)
    assert "class folder 'empty' is empty" in (out / "dataset.json").read_text()
    animesion.build(recipe(root, "classes.cap=3"), out, workers=1, until="pack", replace=True)
    with pytest.raises(UsageError, match="not a built dataset"):
        animesion.open_dataset(out)
    with pytest.raises(UsageError, match="no stage 'pck'"):
        animesion.build(recipe(root), out, until="pck")


def test_a_failed_first_build_does_not_claim_its_folder(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set")
    with pytest.raises(UsageError, match=r"source\.path: .*absent not found"):
        animesion.build(recipe(tmp_path / "absent"), tmp_path / "out", workers=1)
    assert animesion.build(recipe(root), tmp_path / "out", workers=1).kept == 12


def test_until_stops_and_the_next_build_carries_on(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set")
    out = tmp_path / "out"
    for stage, present, absent in (
        ("fetch", "raw/part-00000.tar", "features"),
        ("inspect", "features/part-00000.parquet", "curated.parquet"),
        ("curate", "curated.parquet", "data"),
        ("pack", "index.parquet", "README.md"),
        ("finalize", "README.md", "absent"),
    ):
        animesion.build(recipe(root), out, workers=1, until=stage)
        assert (out / present).exists()
        assert not (out / absent).exists()


def test_a_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = class_folders(tmp_path / "set")
    before = sorted(tmp_path.rglob("*"))
    run = run_here("build", "folder", "--set", f"source.path={root}", "--dry-run")
    assert run.returncode == 0, run.stderr
    assert "12 images listed, 12 to fetch" in run.stdout
    assert sorted(tmp_path.rglob("*")) == before
    # what an earlier build left in the folder is said as it is
    given = ["folder", "--set", f"source.path={root}", "--set", "filter.min_side=9999", "--out", "out", "--dry-run"]
    (tmp_path / "out" / ".receipts").mkdir(parents=True)
    assert "out (exists, with no part fetched yet)" in CliRunner().invoke(build, given).output
    settings = [f"source.path={root}", "filter.min_side=9999", "name=out"]
    with pytest.raises(AnimesionError, match="no image is left of 12"):
        animesion.build(animesion.load_recipe("folder", settings), tmp_path / "out", workers=1)
    assert "out (exists, with 1 part fetched and 1 inspected)" in CliRunner().invoke(build, given).output
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir(tmp_path / "out")
        lost = CliRunner().invoke(build, ["folder", "--set", "source.path=set", "--dry-run"])
        assert str(lost.exception) == f"source.path: set not found in {tmp_path / 'out'}"
    (tmp_path / "file").write_text("mine")
    refused = run_here("build", "folder", "--set", f"source.path={root}", "--dry-run", "--out", "file")
    assert refused.returncode == 2
    assert "is a file" in refused.stderr


def test_the_command_prints_the_funnel_and_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = class_folders(tmp_path / "set")
    put(root, "rei/no.jpg", b"no")
    out = tmp_path / "out"
    run = run_here("build", "folder", "--set", f"source.path={root}", "--out", str(out))
    assert run.returncode == 0, run.stderr
    for words in ("seen", "not an image", "kept", "train", "animesion verify"):
        assert words in run.stdout
    for arguments, status in (
        (("build", "folder", "--set", "source.path=/absent"), 2),
        (("build", "folder", "--set", "splt.train=3"), 2),
        (("build", "nothing"), 2),
        (("build", "folder", "--workers", "0"), 2),
        (("bild",), 2),
        (("build", "cotton80"), 2),
    ):
        wrong = run_here(*arguments)
        assert wrong.returncode == status, wrong
        assert "Traceback" not in wrong.stderr
        assert not wrong.stdout
        assert "rror: " in wrong.stderr


def test_an_output_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set")
    (tmp_path / "file").write_text("mine")
    run = run_here("build", "folder", "--set", f"source.path={root}", "--out", str(tmp_path / "file"))
    assert run.returncode == 2
    assert "is a file" in run.stderr
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        run = run_here("build", "folder", "--set", f"source.path={root}", "--out", str(tmp_path / "locked/out"))
        assert run.returncode == 1
        assert "cannot write" in run.stderr
