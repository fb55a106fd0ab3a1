"""What pack, finalize and listing do again: nothing that has not changed, and the same bytes as from nothing."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
from PIL import Image

import animesion
from animesion import executors
from animesion.dataset import shards
from animesion.errors import UsageError
from animesion.executors.base import Answer, Executor, Job, run_job
from animesion.images import codec
from animesion.pipeline import runner
from animesion.report import images as thumbnails
from animesion.report import pairs
from animesion.sources import stamps
from animesion.stats import plots
from animesion.verification import checks
from tests.conftest import draw


class Here(Executor):
    """Runs jobs in this process, where their calls can be counted."""

    def __init__(self) -> None:
        super().__init__(1)
        self._answers: dict[int, Answer] = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._answers.clear()

    def _submit(self, job: Job) -> int:
        self._answers[len(self._answers)] = run_job(job)
        return len(self._answers) - 1

    def _ended(self, handles: Sequence[Any]) -> Iterator[tuple[int, Answer]]:
        yield from [(handle, self._answers[handle]) for handle in handles]


class Calls:
    """Counts the calls of a function."""

    def __init__(self, patch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        self.count, self.stop = 0, -1
        original = getattr(module, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            if self.count == self.stop:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        patch.setattr(module, name, counted)


@pytest.fixture
def encodes(monkeypatch: pytest.MonkeyPatch) -> Calls:
    monkeypatch.setattr(executors, "make", lambda engine="local", workers=0: Here())
    return Calls(monkeypatch, codec, "encode")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Images of two classes with names that JSON escapes; those of one are copied, those of the other encoded."""
    for i in range(24):
        name, kind = ('say "ah"\\', "png") if i % 2 else ("初音\u2028ミク\x01", "jpg")
        path = tmp_path / "images" / name / f"{i}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(i).save(path)
    return tmp_path / "images"


def build(images: Path, out: Path, *settings: str, **options: Any) -> runner.BuildResult:
    chosen = [f'source.path="{images}"', "pack.shard_samples=5", "split.train=50", "split.test=40", *settings]
    return runner.run(animesion.load_recipe("folder", ["name=small", *chosen]), out, replace=True, **options)


def outputs(out: Path) -> dict[str, bytes]:
    found = [path for path in out.rglob("*") if path.is_file() and path.relative_to(out).parts[0] != ".receipts"]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in found}


def test_another_split_encodes_nothing_and_has_the_bytes_of_a_new_build(
    images: Path, tmp_path: Path, encodes: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Calls(monkeypatch, thumbnails, "encoded")
    assert build(images, tmp_path / "out").changed
    assert encodes.count == 12
    assert made.count >= 24
    assert checks.verify(animesion.open_dataset(tmp_path / "out"), workers=1).clean
    encodes.count = made.count = 0
    assert not build(images, tmp_path / "out").changed
    build(images, tmp_path / "out", "split.seed=3", "pack.caption=a drawing of {name}")
    assert encodes.count == made.count == 0
    build(images, tmp_path / "new", "split.seed=3", "pack.caption=a drawing of {name}")
    assert outputs(tmp_path / "out") == outputs(tmp_path / "new")
    assert {path.name for path in (tmp_path / "out" / "pack").iterdir()} == {"encoded.parquet", "thumbnails.parquet"}


def test_another_split_draws_no_plot_no_pair_and_no_dropped_image_again(
    images: Path, tmp_path: Path, encodes: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = next(images.rglob("2.jpg"))
    with Image.open(path) as image:
        image.resize((image.width * 3 // 4, image.height * 3 // 4)).save(path.with_name("copy.jpg"), quality=70)
    drawn = [
        Calls(monkeypatch, pairs.Pairs, "_strip"),
        Calls(monkeypatch, thumbnails.Images, "_dropped"),
        Calls(monkeypatch, plots, "write_plots"),
    ]
    assert build(images, tmp_path / "out").dropped == {"near duplicate": 1}
    assert all(calls.count for calls in drawn)
    for calls in drawn:
        calls.count = 0
    build(images, tmp_path / "out", "split.seed=3")
    assert [calls.count for calls in drawn] == [0, 0, 0]
    build(images, tmp_path / "new", "split.seed=3")
    assert outputs(tmp_path / "out") == outputs(tmp_path / "new")
    (tmp_path / "out" / "plots" / "lorenz.png").unlink()
    build(images, tmp_path / "out", "split.seed=3")
    assert outputs(tmp_path / "out") == outputs(tmp_path / "new")


def test_a_build_that_is_stopped_between_its_shards_goes_on_from_the_old_ones(
    images: Path, tmp_path: Path, encodes: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(images, tmp_path / "old")
    build(images, tmp_path / "new", "split.seed=3")
    due = outputs(tmp_path / "new")
    written = Calls(monkeypatch, shards, "sample")
    for stop in (1, 7, 13, 20):
        out = tmp_path / f"stopped-{stop}"
        shutil.copytree(tmp_path / "old", out)
        encodes.count, written.count, written.stop = 0, 0, stop
        with pytest.raises(KeyboardInterrupt):
            build(images, out, "split.seed=3")
        assert not (out / "SHA256SUMS").exists()
        build(images, out, "split.seed=3")
        assert encodes.count == 0
        assert outputs(out) == due
        written.count, written.stop = 0, stop  # and back, stopped again
        with pytest.raises(KeyboardInterrupt):
            build(images, out)
        build(images, out)
        assert encodes.count == 0
        assert outputs(out) == outputs(tmp_path / "old")


def damage(path: Path, offset: int) -> None:
    """Change a byte so that neither size nor time tells."""
    content, status = bytearray(path.read_bytes()), path.stat()
    content[offset] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_what_was_damaged_since_is_not_copied(images: Path, tmp_path: Path, encodes: Calls) -> None:
    out = tmp_path / "out"
    build(images, out)
    due = outputs(out)
    rows = animesion.open_dataset(out).index.to_pylist()
    encoded = next(row for row in rows if '"name":"say' in json_of(out, row))
    damage(out / encoded["shard"], encoded["offset"] + 40)
    build(images, out, "split.seed=3")  # reads all shards again
    build(images, out)
    assert encodes.count == 12 + 12
    assert outputs(out) == due
    raw = next((out / "raw").glob("*.tar"))
    jpeg = next(member for member in shards.members(raw) if member.field == "jpg")
    damage(raw, jpeg.offset + 40)
    with pytest.raises(UsageError, match="was changed after it was fetched"):
        build(images, out, "split.seed=3")


def json_of(out: Path, row: dict[str, Any]) -> str:
    return shards.read(out / row["shard"], row["sample_offset"], row["sample_size"]).decode("utf-8", "replace")


def test_a_stamp_tells_what_has_changed(tmp_path: Path) -> None:
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    (root / "a" / "1.jpg").write_bytes(b"one")
    seen = [stamps.of([str(root)])]
    assert stamps.of([str(root)]) == seen[0]

    def changed() -> bool:
        seen.append(stamps.of([str(root)]))
        return len(set(seen)) == len(seen)

    (root / "a" / "2.jpg").write_bytes(b"two")
    assert changed()
    (root / "a" / "2.jpg").rename(root / "a" / "3.jpg")
    assert changed()
    (root / "a" / "3.jpg").write_bytes(b"three")
    assert changed()
    os.utime(root / "a" / "3.jpg", ns=(1, 1))
    assert changed()
    (root / "a").rename(root / "b")
    assert changed()
    (root / "b" / "link").symlink_to(root / "nothing")
    assert changed()
    (root / "loop").symlink_to(root, target_is_directory=True)
    assert changed()
    (root / "out" / ".receipts").mkdir(parents=True)
    assert changed()
    (root / "out" / "4.jpg").write_bytes(b"four")  # sources pass over the output of a build
    assert not changed()
    assert stamps.of(["s3://bucket/images"]) == ""
    assert stamps.of([str(tmp_path / "nowhere")]) == ""
    assert hashlib.sha256(b"").hexdigest() not in seen
