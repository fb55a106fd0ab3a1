"""The stream on built datasets, class folders, label CSVs and URLs: damage, threads and the cache."""

from __future__ import annotations

import gc
import json
import re
import shutil
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aiohttp import web
from PIL import Image

import animesion
from animesion.errors import UsageError
from animesion_training.data import (
    CachedStream,
    DataSplits,
    RandomResizedCrop,
    Resize,
    ResizeCenterCrop,
    ResizeRandomCrop,
    Stream,
    cache_samples,
    divide_split,
    open_data,
    stages,
)
from animesion_training.data.remote import RemoteFiles
from tests.running import run_here
from tests.serving import served


def decoding_threads() -> int:
    return len(_decoding() - _others)


def _decoding() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("animesion-decode")}


_others: set[threading.Thread] = set()


@pytest.fixture(autouse=True)
def _leave_out_the_threads_of_streams_that_wait_to_be_collected() -> None:
    _others.clear()
    _others.update(_decoding())


@pytest.fixture
def copy(small_dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_dataset, tmp_path / "copy"))


def pixels(stream: Stream) -> dict[int, bytes]:
    """The image of each seed: a sample's crop in this epoch."""
    return {
        seed: image.permute(1, 2, 0).numpy().tobytes()
        for batch in stream
        for seed, image in zip(batch.seeds.tolist(), batch.images, strict=True)
    }


# -- sources ---------------------------------------------------------------------------------------------------------


def test_a_built_dataset_is_what_animesion_says_it_is(small_dataset: Path) -> None:
    data, dataset = open_data(small_dataset), animesion.open_dataset(small_dataset)
    assert data.classes == tuple(entry.name for entry in dataset.classes)
    for split in dataset.splits:
        samples = data.select(split)
        expected = list(dataset.samples(split))
        assert list(samples.keys) == [sample.key for sample in expected]
        assert samples.labels.tolist() == [sample.label for sample in expected]
        assert [samples.read(i) for i in range(len(samples))] == [sample.image for sample in expected]


def test_a_built_dataset_streams_every_sample_with_its_label(small_dataset: Path) -> None:
    data = open_data(small_dataset)
    samples = data.select("train")
    stream = Stream(data, "train", 8, 32, workers=3)
    batches = list(stream)
    assert len(batches) == len(stream)
    indices = torch.cat([batch.indices for batch in batches])
    assert sorted(indices.tolist()) == list(range(len(samples)))
    assert (torch.cat([batch.labels for batch in batches]).numpy() == samples.labels[indices]).all()
    assert {tuple(batch.images.shape[1:]) for batch in batches} == {(3, 32, 32)}
    assert {batch.images.dtype for batch in batches} == {torch.uint8}


def test_a_built_dataset_takes_over_the_classes_of_a_blend(small_dataset: Path) -> None:
    own = open_data(small_dataset)
    joined = ("another", *reversed(own.classes))
    data = open_data(small_dataset, classes=joined)
    assert data.classes == joined
    named = [own.classes[label] for label in own.select("train").labels]
    assert [joined[label] for label in data.select("train").labels] == named
    # a reordered list is no blend, and the difference is told elsewhere
    assert open_data(small_dataset, classes=tuple(reversed(own.classes))).classes == own.classes


def test_pixels_do_not_depend_on_workers_ranks_or_batch_size(small_dataset: Path) -> None:
    data = open_data(small_dataset)
    one = pixels(Stream(data, "train", 5, 24, workers=0, seed=9))
    for workers, batch_size in ((1, 3), (2, 8), (5, 40)):
        assert pixels(Stream(data, "train", batch_size, 24, workers=workers, seed=9)) == one
    shared: dict[int, bytes] = {}
    for rank in range(3):
        shared |= pixels(Stream(data, "train", 2, 24, workers=2, seed=9, rank=rank, world_size=3))
    assert shared == one
    assert pixels(Stream(data, "train", 5, 24, workers=0, seed=8)).keys().isdisjoint(one)


def test_headers_that_are_remembered_change_no_pixel(small_dataset: Path) -> None:
    warm, cold = (Stream(open_data(small_dataset), "train", 5, 24, workers=1, seed=9) for _ in range(2))
    assert not warm.samples.plain.any()
    list(warm)
    assert warm.samples.plain.all()
    cold.set_epoch(1)
    assert pixels(warm) == pixels(cold)


def world(root: Path, images: dict[str, int]) -> Path:
    for name, count in images.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (20 + i, 30), (10 * i, 0, 0)).save(root / name / f"{i}.jpg")
    return root


def test_class_folders(tmp_path: Path) -> None:
    root = world(tmp_path / "w", {"b": 3, "a": 2, "empty": 0, ".hidden": 1})
    (root / "a" / "notes.txt").write_text("no image")
    data = open_data(root)
    assert data.classes == ("a", "b")
    assert list(data.select("all").keys) == ["a/0.jpg", "a/1.jpg", "b/0.jpg", "b/1.jpg", "b/2.jpg"]
    assert data.select("all").labels.tolist() == [0, 0, 1, 1, 1]
    assert open_data(root, classes=["x", "b", "a", "empty"]).select("all").labels.tolist() == [2, 2, 1, 1, 1]
    with pytest.raises(UsageError, match="'b', which is not one of the 2 given classes"):
        open_data(root, classes=["a", "empty"])
    with pytest.raises(UsageError, match="no split 'train'; it has all"):
        data.select("train")


def test_split_folders_share_one_class_map(tmp_path: Path) -> None:
    world(tmp_path / "w" / "train", {"a": 4, "c": 4})
    world(tmp_path / "w" / "validation", {"b": 1, "c": 1})
    data = open_data(tmp_path / "w")
    assert data.classes == ("a", "b", "c")
    assert data.select("val").labels.tolist() == [1, 2]


def test_class_folders_can_be_divided(tmp_path: Path) -> None:
    data = open_data(world(tmp_path / "w", {"a": 20, "b": 10, "c": 1}))
    parts = divide_split(data, "all", {"train": 0.8, "val": 0.1, "test": 0.1})
    keys = [set(parts.splits[name].keys) for name in ("train", "val", "test")]
    assert set.union(*keys) == set(data.select("all").keys)
    assert [len(part) for part in keys] == [16 + 8 + 1, 2 + 1, 2 + 1]
    assert np.bincount(parts.select("train").labels).tolist() == [16, 8, 1]
    assert Stream(parts, "test", 2, 8, train=False)
    again = divide_split(data, "all", {"train": 0.8, "val": 0.1, "test": 0.1}, seed=1)
    assert set(again.select("train").keys) != keys[0]


def test_label_files(tmp_path: Path) -> None:
    world(tmp_path / "images", {"0001": 4, "0002": 3})
    labels = tmp_path / "labels"
    labels.mkdir()
    (labels / "train.csv").write_text("class_id,dir\n0,0001/0.jpg\n2,0001\\1.jpg\n")
    (labels / "val.csv").write_text("1,0002/0.jpg\n")
    data = open_data(labels, images=tmp_path / "images")
    assert data.classes == ("0", "1", "2")
    assert open_data(labels / "val.csv", images=tmp_path / "images").num_classes == 3
    (labels / "classid_classname.csv").write_text("0,rin\n1,miku\n2,luka\n3,no image of her\n")
    data = open_data(labels, images=tmp_path / "images")
    assert data.classes == ("rin", "miku", "luka", "no image of her")
    [batch] = Stream(data, "train", 4, 16, train=False)
    assert batch.labels.tolist() == [0, 2]
    (labels / "train.csv").write_text("4,0001/0.jpg\n")
    with pytest.raises(UsageError, match=r"class id 4, which .* does not name"):
        open_data(labels)
    (labels / "train.csv").write_text("0,../../etc/passwd\n")
    with pytest.raises(UsageError, match="is outside the image folder"):
        open_data(labels)


def test_what_holds_no_images_is_refused(tmp_path: Path) -> None:
    for path, why in (
        (tmp_path / "none", "folder or label CSV .*none not found"),
        (tmp_path, "holds no image files"),
    ):
        with pytest.raises(UsageError, match=why):
            open_data(path)
    (tmp_path / "a").mkdir()
    with pytest.raises(UsageError, match="holds no image files"):
        open_data(tmp_path)


# -- damage ----------------------------------------------------------------------------------------------------------


def shard_of(dataset: Path, number: int = 0) -> Path:
    return sorted((dataset / "data").glob("train-*.tar"))[number]


def test_a_cut_shard_is_named_at_the_start(copy: Path) -> None:
    shard = shard_of(copy, 1)
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(UsageError, match=rf"{shard.name} has 3,000 bytes where"):
        Stream(open_data(copy), "train", 4, 16)
    shard.unlink()
    with pytest.raises(UsageError, match=rf"cannot read .*{shard.name} \(no such file"):
        Stream(open_data(copy), "train", 4, 16)


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_shard_cut_while_training_is_named_with_the_key(copy: Path, epochs: int) -> None:
    data = open_data(copy)
    stream = Stream(data, "train", 4, 16, workers=2)
    for _ in range(epochs):
        list(stream)
    shard = shard_of(copy, 1)
    with shard.open("r+b") as file:
        file.truncate(3000)
    with pytest.raises(UsageError, match=rf"{shard.name} has 3,000 bytes where"):
        list(stream)
    assert decoding_threads() == 0


@pytest.mark.parametrize("epochs", [0, 1])
def test_samples_of_a_shard_cut_while_training_can_be_skipped(copy: Path, epochs: int) -> None:
    stream = Stream(open_data(copy), "train", 20, 16, workers=2, on_error="skip")
    for _ in range(epochs):
        list(stream)
    shard = shard_of(copy, 1)
    with shard.open("r+b") as file:
        file.truncate(3000)
    seen = sum(len(batch.labels) for batch in stream)
    assert 0 < stream.skipped == len(stream.samples) - seen
    assert re.search(rf"sample [a-z0-9_-]+ in .*{shard.name} is truncated", stream.failures[0].message)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_changed_byte_is_an_error_or_a_counted_skip(copy: Path, workers: int) -> None:
    samples = open_data(copy).select("train")
    broken = [3, 17]
    for i in broken:
        path = Path(samples.source.name(int(samples.files[i])))
        content = bytearray(path.read_bytes())
        content[int(samples.offsets[i] + samples.sizes[i]) - 20] ^= 1
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"sample [a-z0-9_-]+ in .*\.tar differs from its digest in the index"):
        list(Stream(open_data(copy), "train", 4, 16, workers=workers))
    stream = Stream(open_data(copy), "train", 4, 16, workers=workers, on_error="skip")
    seen = [i for batch in stream for i in batch.indices.tolist()]
    assert sorted(seen) == [i for i in range(len(samples)) if i not in broken]
    assert stream.skipped == 2
    assert sorted(failure.sample for failure in stream.failures) == broken
    assert samples.keys[3] in str(stream.failures)


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    root = world(tmp_path / "w", {"a": 4, "b": 2})
    (root / "b" / "1.jpg").write_bytes((root / "b" / "1.jpg").read_bytes()[:200])
    with pytest.raises(UsageError, match=r"b/1\.jpg does not decode"):
        list(Stream(open_data(root), "all", 2, 16))
    data = open_data(root)
    (root / "a" / "2.jpg").unlink()
    with pytest.raises(UsageError, match=r"cannot read .*a/2\.jpg \(no such file"):
        list(Stream(data, "all", 2, 16, train=False))
    stream = Stream(data, "all", 6, 16, on_error="skip")
    assert [len(batch.labels) for batch in stream] == [4]
    single = Stream(data, "all", 1, 16, on_error="skip")
    batches = list(single)
    assert sorted(len(batch.labels) for batch in batches) == [0, 0, 1, 1, 1, 1]
    assert {batch.images.shape for batch in batches} == {(0, 3, 16, 16), (1, 3, 16, 16)}
    assert single.skipped == len(single.failures) == 2
    single.forget_failures()
    assert single.skipped == len(single.failures) == 0
    evaluation = Stream(data, "all", 1, 16, on_error="skip", train=False)
    assert sum(1 for _ in evaluation) == 4


# -- threads ---------------------------------------------------------------------------------------------------------


def test_no_thread_outlives_a_break_an_error_or_the_stream(small_dataset: Path) -> None:
    data = open_data(small_dataset)
    stream = Stream(data, "train", 2, 16, workers=3)
    for _ in stream:
        assert decoding_threads() > 0
        break
    assert decoding_threads() == 0

    def fails(over: Stream) -> None:
        for _ in over:
            raise RuntimeError("the loop body fails")

    with pytest.raises(RuntimeError, match="loop body"):
        fails(stream)
    gc.collect()
    assert decoding_threads() == 0
    list(stream)
    assert decoding_threads() > 0
    del stream
    gc.collect()
    assert decoding_threads() == 0


def test_threads_are_kept_between_epochs_until_closed(small_dataset: Path) -> None:
    stream = Stream(open_data(small_dataset), "train", 8, 16, workers=2)
    assert [len(list(stream)) for _ in range(3)] == [len(stream)] * 3
    assert decoding_threads() <= 2
    stream.close()
    assert decoding_threads() == 0
    assert len(list(stream)) == len(stream)
    stream.close()


def test_profile_data_times_each_stage_and_writes_nothing(
    small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stages.measure_stages, "__kwdefaults__", {"images": 20, "seconds": 0.05})
    command = ("train", "--data", str(small_dataset), "--profile-data", "--img-size", "24", "--batch-size", "8")
    done = run_here(*command, "--set", "data.workers=2", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    times = json.loads(done.stdout)
    assert (times["workers"], times["images"]) == (2, 20)
    assert {stage["name"]: stage["where"] for stage in times["stages"]} == {
        "order of an epoch": "main",
        "random numbers": "main",
        "read and compare with the digest": "first",
        "parse the header": "first",
        "read again": "threads",
        "decode": "threads",
        "crop and resize": "threads",
        "augment": "main",
    }
    assert min(stage["seconds"] for stage in times["stages"]) > 0
    assert min(times["stream"], times["decoding"]) > 0
    assert "threads that only decode" in run_here(*command, "--device", "cpu").stdout
    assert not list(tmp_path.iterdir())
    done = run_here(*command, "--cache", "ram")
    assert done.returncode == 2
    assert "profile without --cache" in done.stderr


# -- the cache -------------------------------------------------------------------------------------------------------


def test_the_cache_follows_the_schedule_of_the_stream(small_dataset: Path) -> None:
    data = open_data(small_dataset)
    messages: list[str] = []
    resident = cache_samples(data, "train", 24, notify=messages.append)
    assert resident.images.shape[1:] == (28, 28, 3)
    assert "images of 28 px take" in messages[0]
    # the last rank of four has no image of batches of three
    for batch_size, rank, world_size in ((5, 0, 1), (5, 0, 1), (3, 3, 4), (9, 1, 2)):
        ranks: dict[str, Any] = {
            "rank": rank,
            "world_size": world_size,
            "pairs": batch_size == 9,
            "sampling": "square-root",
        }
        stream = Stream(data, "train", batch_size, 24, seed=2, **ranks)
        cached = CachedStream(resident, batch_size, 24, seed=2, **ranks)
        for ours, theirs in zip(stream, cached, strict=True):
            assert ours.indices.tolist() == theirs.indices.tolist()
            assert ours.labels.tolist() == theirs.labels.tolist()
            assert ours.seeds.tolist() == theirs.seeds.tolist()
            assert ours.places.tolist() == theirs.places.tolist()
            assert ours.total == theirs.total
            assert theirs.images.shape == ours.images.shape
            assert theirs.images.dtype == torch.uint8


def test_a_run_changes_between_stream_and_cache(small_dataset: Path) -> None:
    data = open_data(small_dataset)
    stream = Stream(data, "train", 5, 16, seed=3)
    done = [batch.indices.tolist() for batch in islice(stream, 2)]
    cached = CachedStream(cache_samples(data, "train", 16, notify=lambda _: None), 7, 16, seed=3)
    cached.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    rest = [batch.indices.tolist() for batch in cached]
    assert [i for indices in done + rest for i in indices] == Stream(data, "train", 5, 16, seed=3).order().tolist()


def test_cached_views_are_the_streams(tmp_path: Path) -> None:
    root = tmp_path / "w" / "a"
    root.mkdir(parents=True)
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8))
    coarse.resize((180, 120), Image.Resampling.BICUBIC).save(root / "0.png")
    data = open_data(tmp_path / "w")
    resident = cache_samples(data, "all", 32, side=160, notify=lambda _: None)
    for transform in (Resize(32), ResizeCenterCrop(32)):
        [ours] = Stream(data, "all", 1, 32, train=False, transform=transform)
        [theirs] = CachedStream(resident, 1, 32, train=False, transform=transform)
        assert (ours.images.float() - theirs.images.float()).abs().mean() < 4
    for random_transform in (RandomResizedCrop(32), ResizeRandomCrop(32)):
        first, second = (
            torch.cat([batch.images for batch in CachedStream(resident, 1, 32, transform=random_transform, seed=seed)])
            for seed in (0, 1)
        )
        assert not torch.equal(first, second)


def test_a_cache_that_does_not_fit_is_refused_before_it_is_filled(small_dataset: Path) -> None:
    with pytest.raises(UsageError, match=r"images of 28 px take 0\.00 GB of RAM and 0\.00 GB are allowed"):
        cache_samples(open_data(small_dataset), "train", 24, most_bytes=1000)


# -- addresses -------------------------------------------------------------------------------------------------------


@pytest.fixture
def address(small_dataset: Path) -> Iterator[str]:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(small_dataset), "/world", recursive=True)
    yield "memory://world"
    memory.rm("/world", recursive=True)


def small_blocks(monkeypatch: pytest.MonkeyPatch, size: int = 2**12) -> None:
    """Cut small datasets into several blocks."""
    monkeypatch.setattr("animesion_training.data.sources.block_bytes", lambda total: size)


def remote_files(data: DataSplits) -> RemoteFiles:
    files = data.select("train").source
    assert isinstance(files, RemoteFiles)
    return files


@pytest.mark.parametrize("workers", [0, 3])
def test_a_remote_dataset_streams_like_the_local_one(
    address: str, small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    small_blocks(monkeypatch)
    facts = {"seed": 4, "window": 2}
    local = pixels(Stream(open_data(small_dataset), "train", 5, 16, **facts))  # type: ignore[arg-type]
    data = open_data(address, cache=tmp_path / "cache")
    assert pixels(Stream(data, "train", 5, 16, workers=workers, **facts)) == local  # type: ignore[arg-type]
    blocks = set(data.select("train").blocks.tolist())
    assert len(blocks) > 5
    assert len(list((tmp_path / "cache").glob("*.block"))) == remote_files(data).fetched == len(blocks)
    again = open_data(address, cache=tmp_path / "cache")
    assert pixels(Stream(again, "train", 5, 16, **facts)) == local  # type: ignore[arg-type]
    assert remote_files(again).fetched == 0


@pytest.mark.parametrize("moved", [False, True])
def test_a_dataset_on_a_web_server_streams_like_the_local_one(
    small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    small_blocks(monkeypatch)
    asked: list[str] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.append(request.headers.get("User-Agent", ""))
        path = request.match_info["path"]
        if moved and not path.startswith("moved/"):
            raise web.HTTPFound(f"/moved/{path}")
        return web.FileResponse(small_dataset / path.removeprefix("moved/"))

    application = web.Application()
    application.router.add_get("/{path:.*}", answer)
    local = pixels(Stream(open_data(small_dataset), "train", 5, 16, window=2))
    with served(application) as port:
        data = open_data(f"http://127.0.0.1:{port}", cache=tmp_path / "cache")
        assert pixels(Stream(data, "train", 5, 16, window=2, workers=2)) == local
    blocks = len(set(data.select("train").blocks.tolist()))
    assert remote_files(data).fetched == blocks
    # fsspec reads the tables, and what a redirect sends elsewhere
    assert asked.count("animesion") == blocks
    assert len(asked) == (3 * blocks + 4 if moved else blocks + 2)


def test_the_blocks_of_the_next_epoch_are_downloaded_in_this_one(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch)
    data = open_data(address, cache=tmp_path / "cache")
    asked: list[int] = []
    monkeypatch.setattr(remote_files(data), "prefetch", asked.extend)
    stream = Stream(data, "train", 5, 16, workers=1, epochs=2)
    used = set(data.select("train").blocks.tolist())
    list(stream)
    assert set(asked) == used
    assert len(asked) == 2 * len(used)
    asked.clear()
    list(stream)
    assert sorted(asked) == sorted(used)


def test_a_server_that_knows_no_ranges_sends_each_shard_once(
    address: str, small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch)
    data = open_data(address, cache=tmp_path / "cache")
    files, ranged = remote_files(data), remote_files(data).system.cat_file
    monkeypatch.setattr(files.system, "cat_file", lambda path, start=None, end=None: ranged(path))
    local = pixels(Stream(open_data(small_dataset), "train", 5, 16))
    assert pixels(Stream(data, "train", 5, 16, workers=1, window=0)) == local
    # those that were on their way when the first answer came are the exception
    assert files.fetched <= len(set(data.select("train").files.tolist())) + 32


def test_blocks_that_come_together_do_not_stay_together(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch)
    data = open_data(address, cache=tmp_path / "cache")
    files = remote_files(data)
    files.most_bytes = 2 * int((files.blocks.ends - files.blocks.starts).max())
    together, ranged = threading.Barrier(3), files.system.cat_file

    def meeting(path: str, start: int, end: int) -> bytes:
        together.wait(20)
        content: bytes = ranged(path, start=start, end=end)
        return content

    monkeypatch.setattr(files.system, "cat_file", meeting)
    places = [(int(files.blocks.files[block]), int(files.blocks.starts[block])) for block in range(3)]
    threads = [threading.Thread(target=files.read, args=(*place, 10)) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    left = [path.stat().st_size for path in (tmp_path / "cache").glob("*.block")]
    assert files.fetched == 3
    assert left
    assert sum(left) <= files.most_bytes


def test_the_local_cache_of_blocks_is_bounded(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    data = open_data(address, cache=tmp_path / "cache", cache_bytes=2**15)
    stream = Stream(data, "train", 3, 16, window=1, workers=2)
    assert len(pixels(stream)) == len(data.select("train"))
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.block")) <= 2**15
    assert remote_files(data).fetched_bytes > 2**15


def test_a_damaged_block_in_the_cache_is_downloaded_again(
    address: str, small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch)
    local = pixels(Stream(open_data(small_dataset), "train", 5, 16))
    assert pixels(Stream(open_data(address, cache=tmp_path / "cache"), "train", 5, 16, window=0)) == local
    changed, cut, *_ = sorted((tmp_path / "cache").glob("*.block"))
    changed.write_bytes(bytes(changed.stat().st_size))
    cut.write_bytes(cut.read_bytes()[:-1])
    again = open_data(address, cache=tmp_path / "cache")
    assert pixels(Stream(again, "train", 5, 16, window=0)) == local
    assert remote_files(again).fetched == 2


def test_each_rank_downloads_its_part(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 2**9)
    for train in (True, False):
        alone = open_data(address, cache=tmp_path / f"{train}-alone")
        whole = pixels(Stream(alone, "train", 16, 16, train=train))
        parts: dict[int, bytes] = {}
        for rank in range(2):
            data = open_data(address, cache=tmp_path / f"{train}-{rank}")
            part = pixels(Stream(data, "train", 16, 16, train=train, rank=rank, world_size=2))
            assert remote_files(data).fetched_bytes <= 1.1 * remote_files(alone).fetched_bytes / 2
            parts |= part
        assert len(parts) == len(whole)
        if train:  # in evaluation, seeds follow the order, which depends on the number of ranks
            assert parts == whole


def _local(address: str, tmp_path: Path) -> Path:
    import fsspec

    system, root = fsspec.core.url_to_fs(address)
    system.get(root, str(tmp_path / "local"), recursive=True)
    return tmp_path / "local"


def test_a_damaged_or_missing_remote_shard_is_named(address: str, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    path = sorted(memory.glob("/world/data/train-*.tar"))[0]
    content = memory.cat_file(path)
    memory.pipe_file(path, content[: len(content) // 2])
    with pytest.raises(UsageError, match=r"train-00000\.tar is not the shard that dataset\.json lists"):
        list(Stream(open_data(address, cache=tmp_path / "cache"), "train", 5, 16))
    image = content.index(b"\xff\xd8\xff")
    memory.pipe_file(path, content[: image + 99] + bytes([content[image + 99] ^ 1]) + content[image + 100 :])
    with pytest.raises(UsageError, match=r"train-00000\.tar differs from its digest in the index"):
        list(Stream(open_data(address, cache=tmp_path / "cache"), "train", 5, 16))
    memory.rm_file(path)
    with pytest.raises(UsageError, match=r"train-00000\.tar cannot be downloaded"):
        list(Stream(open_data(address, cache=tmp_path / "cache"), "train", 5, 16))
    assert not list((tmp_path / "cache").glob("*.part"))
    with pytest.raises(UsageError, match="cannot be read as a built dataset"):
        open_data("memory://nowhere", cache=tmp_path / "cache")
