"""The guarantees of the stream for any shards, workers, ranks, batch sizes and interruptions."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from animesion.errors import UsageError
from animesion_training.data import Batch, DataSplits, Samples, Stream
from animesion_training.data.schedule import Last, batch_ends, share, spread, training_order
from animesion_training.data.seeds import IntArray


def _image() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 100, 50)).save(out, "JPEG")
    return out.getvalue()


IMAGE = _image()


class Memory:
    """Shards of which every sample is the same image."""

    def name(self, file: int) -> str:
        return f"memory-{file}"

    def read(self, file: int, offset: int, size: int) -> bytes:
        return IMAGE

    view = read

    def check(self, files: IntArray) -> None:
        pass

    def prefetch(self, blocks: Sequence[int]) -> None:
        pass

    def discard(self, file: int, offset: int) -> bool:
        return False


def drawn(shards: list[int], num_classes: int = 3) -> DataSplits:
    """A split whose shards have these numbers of samples."""
    total = sum(shards)
    files = np.repeat(np.arange(len(shards)), shards)
    numbers = np.arange(total)
    samples = Samples(
        "train",
        numbers**2 % num_classes,
        files,
        numbers,
        np.full(total, len(IMAGE)),
        [f"k{i}" for i in range(total)],
        Memory(),
    )
    return DataSplits("drawn", tuple("abcdefgh"[:num_classes]), {"train": samples})


SHARDS = st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(lambda sizes: sum(sizes) >= 2)
LAYOUT = st.tuples(st.integers(2, 17), st.integers(1, 5), st.integers(0, 5))  # batch size, ranks, workers
WINDOW = st.integers(0, 3)


def ranks(data: DataSplits, layout: tuple[int, int, int], **settings: object) -> list[Stream]:
    """The streams of all ranks."""
    batch_size, world_size, workers = layout
    return [
        Stream(data, "train", batch_size, 8, rank=rank, world_size=world_size, workers=workers, **settings)  # type: ignore[arg-type]
        for rank in range(world_size)
    ]


def seen(batches: list[list[Batch]]) -> list[int]:
    """The indices of all ranks in the global order, given each rank's batches."""
    order: list[int] = []
    for step in zip(*batches, strict=True):
        by_place = {place: i for batch in step for place, i in zip(*map(Tensor.tolist, batch[4:1:-2]), strict=True)}
        assert {batch.total for batch in step} == {len(by_place)}
        assert sorted(by_place) == list(range(len(by_place)))
        order += [by_place[place] for place in range(len(by_place))]
    return order


@settings(deadline=None, max_examples=60)
@given(SHARDS, LAYOUT, WINDOW, st.integers(0, 3), st.integers(0, 2**40), st.booleans())
def test_training_sees_each_sample_once_in_the_batches_of_one_process(
    shards: list[int], layout: tuple[int, int, int], window: int, epoch: int, seed: int, pairs: bool
) -> None:
    streams = ranks(drawn(shards), layout, window=window, seed=seed, pairs=pairs)
    for stream in streams:
        stream.set_epoch(epoch)
    expected = streams[0].order().tolist()
    batches = [list(stream) for stream in streams]
    assert seen(batches) == expected
    assert sorted(expected) == list(range(sum(shards)))
    assert {len(of_rank) for of_rank in batches} == {len(streams[0])}
    assert {stream.epoch for stream in streams} == {epoch + 1}
    [alone] = ranks(drawn(shards), (layout[0], 1, layout[2]), window=window, seed=seed, pairs=pairs)
    alone.set_epoch(epoch)
    assert [batch.total for batch in alone] == [batch.total for batch in batches[0]]


@settings(deadline=None, max_examples=60)
@given(
    SHARDS,
    LAYOUT,
    LAYOUT,
    WINDOW,
    st.sampled_from(["instance", "class-balanced", "square-root", "progressive"]),
    st.integers(0, 50),
)
def test_a_run_resumes_exactly_with_another_layout(
    shards: list[int],
    before: tuple[int, int, int],
    after: tuple[int, int, int],
    window: int,
    sampling: str,
    stop: int,
) -> None:
    data = drawn(shards)
    facts = {"window": window, "sampling": sampling, "seed": 5, "epochs": 4}
    if window:  # the order depends on the size of the batches
        after = (before[0], *after[1:])
    streams = ranks(data, before, **facts)
    for stream in streams:
        stream.set_epoch(2)
    order = streams[0].order().tolist()
    done = seen([list(islice(stream, min(stop, len(stream)))) for stream in streams])
    states = [stream.state_dict() for stream in streams]
    assert all(state == states[0] for state in states)
    resumed = ranks(data, after, **facts)
    for stream in resumed:
        stream.load_state_dict(states[0])
    batches = [list(stream) for stream in resumed]
    rest = seen(batches)
    assert done + rest == order
    expected_epoch = 3
    assert {stream.epoch for stream in resumed} == {expected_epoch}
    following = seen([list(stream) for stream in resumed])
    undisturbed = ranks(data, (after[0], 1, 0), **facts)[0]
    undisturbed.set_epoch(3)
    assert following == undisturbed.order().tolist()


@settings(deadline=None, max_examples=60)
@given(SHARDS, LAYOUT)
def test_evaluation_sees_each_sample_once(shards: list[int], layout: tuple[int, int, int]) -> None:
    streams = ranks(drawn(shards), layout, train=False)
    for _ in range(2):
        batches = [list(stream) for stream in streams]
        assert [len(of_rank) for of_rank in batches] == [len(stream) for stream in streams]
        indices = [i for of_rank in batches for batch in of_rank for i in batch.indices.tolist()]
        assert sorted(indices) == list(range(sum(shards)))


def test_evaluation_starts_anew_after_a_break() -> None:
    stream = Stream(drawn([9, 9]), "train", 4, 8, train=False, workers=2)
    next(iter(stream))
    assert [i for batch in stream for i in batch.indices.tolist()] == list(range(18))


def test_epochs_differ_and_seeds_repeat() -> None:
    def order(seed: int, epoch: int, window: int) -> list[int]:
        stream = Stream(drawn([20] * 6), "train", 8, 8, seed=seed, window=window)
        stream.set_epoch(epoch)
        return stream.order().tolist()

    for window in (0, 2):
        assert order(1, 0, window) == order(1, 0, window)
        assert len({tuple(order(seed, epoch, window)) for seed in range(3) for epoch in range(4)}) == 12


def test_a_column_holds_one_window_after_the_other() -> None:
    blocks = np.repeat(np.arange(10), 30)
    ends = batch_ends(300, 3)
    firsts = set()
    for epoch in range(6):
        order = training_order(np.arange(300), blocks, ends, seed=0, epoch=epoch, window=3)
        # three columns of 100 samples, which one after the other are windows of 90 samples
        columns = order.reshape(100, 3).T.ravel()
        windows = [set(blocks[columns[i : i + 90]].tolist()) for i in range(0, 300, 90)]
        assert [len(window) for window in windows] == [3, 3, 3, 1]
        assert set.union(*windows) == set(range(10))
        firsts.add(frozenset(windows[0]))
    assert len(firsts) > 1


@given(
    st.integers(1, 300),
    st.integers(1, 40),
    st.integers(1, 9),
    st.sampled_from(["keep", "join", "drop"]),
    st.booleans(),
)
def test_a_rank_has_ranges_of_what_is_spread(
    total: int, batch_size: int, world_size: int, last: Last, pairs: bool
) -> None:
    batch_size += pairs
    ends = batch_ends(total, batch_size, last=last, pairs=pairs)
    order = spread(np.arange(total), ends)
    assert sorted(order.tolist()) == list(range(total))
    starts = [0, *ends.tolist()]
    for rank in range(world_size):
        places = [
            share(start, end, rank, world_size, pairs=pairs) for start, end in zip(starts, ends.tolist(), strict=False)
        ]
        mine = np.sort(order[np.concatenate(places)]) if places else np.zeros(0)
        # one range, or two with pairs; a column that two ranks share in batches of different sizes is cut
        assert int((np.diff(mine) > 1).sum()) <= (1 if pairs else 0) + (4 if len(set(np.diff(starts))) > 1 else 0)
    # in evaluation, one range each, whatever the sizes
    order = spread(np.arange(total), batch_ends(total, batch_size), world_size)
    starts = [0, *batch_ends(total, batch_size).tolist()]
    ranges = [
        [order[share(start, end, rank, world_size)] for start, end in pairwise(starts)] for rank in range(world_size)
    ]
    assert np.concatenate([part for of_rank in ranges for part in of_rank]).tolist() == list(range(total))


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([16, 64, 100]), st.sampled_from([1, 2, 3, 4, 8]), st.booleans(), st.integers(0, 2**40))
def test_each_rank_reads_its_part_of_the_blocks(batch_size: int, world_size: int, pairs: bool, seed: int) -> None:
    sizes = np.random.default_rng(seed).integers(5, 30, 200)
    total, blocks = int(sizes.sum()), np.repeat(np.arange(200), sizes)
    ends = batch_ends(total, batch_size, pairs=pairs)
    order = training_order(np.arange(total), blocks, ends, seed=seed, epoch=3, window=1)
    read = 0
    for rank in range(world_size):
        places = [share(start, end, rank, world_size, pairs=pairs) for start, end in pairwise([0, *ends.tolist()])]
        mine = order[np.concatenate(places)]
        part = sizes[np.unique(blocks[mine])].sum()
        # parts of blocks at both ends of a range, of two with pairs, and where the last batch is divided otherwise
        assert part <= len(mine) + (4 if pairs else 2) * 1.5 * sizes.max()
        read += part
    assert read <= total + (world_size - 1) * (4 if pairs else 2) * sizes.max()


def test_a_hundred_kills_lose_and_repeat_nothing() -> None:
    """A run is killed 100 times and goes on with other ranks and workers from its last checkpoint."""
    rng = np.random.default_rng(0)
    data = drawn([7, 31, 2, 16, 40, 9, 23, 5, 28, 3, 17, 36])
    for window, sampling, pairs in ((1, "instance", True), (2, "progressive", False), (0, "square-root", False)):
        facts = {"window": window, "sampling": sampling, "pairs": pairs, "seed": 11, "epochs": 14}
        [alone] = ranks(data, (12, 1, 0), **facts)
        expected = [
            (epoch, *row)
            for epoch in range(14)
            for batch in alone
            for row in zip(batch.indices.tolist(), batch.seeds.tolist(), strict=True)
        ]
        kept: list[tuple[int, int, int]] = []  # what went into the weights of the newest checkpoint
        checkpoint = json.dumps(alone.state_dict() | {"epoch": 0})
        kills = 0
        while len(kept) < len(expected):
            layout = (12, int(rng.choice([1, 2, 4, 8])), int(rng.integers(0, 4)))
            streams = ranks(data, layout, prefetch=int(rng.integers(0, 3)), **facts)
            for stream in streams:
                stream.load_state_dict(json.loads(checkpoint))
            steps = int(rng.integers(1, 5)) if kills < 100 else 10**6
            since = list(kept)
            while steps > 0 and streams[0].epoch < 14:
                epoch, sources = streams[0].epoch, [iter(stream) for stream in streams]
                for parts in zip(*sources, strict=True):
                    rows = sorted(
                        (place, i, seed)
                        for batch in parts
                        for place, i, seed in zip(
                            batch.places.tolist(), batch.indices.tolist(), batch.seeds.tolist(), strict=True
                        )
                    )
                    since += [(epoch, i, seed) for _, i, seed in rows]
                    steps -= 1
                    states = [json.dumps(stream.state_dict()) for stream in streams]
                    assert len(set(states)) == 1
                    if rng.random() < 0.4:  # otherwise the kill comes before the checkpoint
                        kept, checkpoint = list(since), states[0]
                    if steps == 0:
                        break
                else:
                    # at the end of an epoch, every process writes a checkpoint
                    kept, checkpoint = list(since), json.dumps(streams[0].state_dict())
                    continue
                for source in sources:
                    source.close()  # type: ignore[attr-defined]
            kills += steps == 0
        assert kept == expected
        assert kills == 100


@given(st.integers(1, 200), st.integers(2, 40), st.sampled_from(["keep", "join", "drop"]), st.booleans(), st.data())
def test_batches_are_full_but_for_the_last(
    total: int, batch_size: int, last: Last, pairs: bool, data: st.DataObject
) -> None:
    consumed = data.draw(st.integers(0, total))
    ends = batch_ends(total, batch_size, consumed=consumed, last=last, pairs=pairs).tolist()
    full, rest = divmod(total - consumed, batch_size)
    if last == "drop" or rest == 0 or (pairs and rest == 1 and not full):
        expected = [batch_size] * full
    elif full and (last == "join" or (pairs and rest == 1)):
        expected = [batch_size] * (full - 1) + [batch_size + rest]
    else:
        expected = [batch_size] * full + [rest]
    assert np.diff([consumed, *ends]).tolist() == expected


@given(st.integers(0, 99), st.integers(1, 60), st.integers(1, 9), st.booleans())
def test_ranks_share_a_batch_evenly_and_mirror_images_stay_together(
    start: int, size: int, world_size: int, pairs: bool
) -> None:
    size += pairs
    shares = [share(start, start + size, rank, world_size, pairs=pairs).tolist() for rank in range(world_size)]
    assert sorted(place for of_rank in shares for place in of_rank) == list(range(start, start + size))
    assert all(of_rank == sorted(of_rank) for of_rank in shares)
    lengths = [len(of_rank) for of_rank in shares]
    assert lengths[0] > 0
    assert max(lengths) - min(lengths) <= (3 if pairs else 1)
    if pairs:
        assert all(count != 1 for count in lengths)
        assert all({2 * start + size - 1 - place for place in of_rank} == set(of_rank) for of_rank in shares)


def test_a_new_seed_for_each_draw_of_a_sample() -> None:
    stream = Stream(drawn([1, 30]), "train", 8, 8, sampling="class-balanced", workers=0)
    seeds = [seed for _ in range(3) for batch in stream for seed in batch.seeds.tolist()]
    assert Counter(seeds).most_common(1)[0][1] == 1
    assert len(seeds) == 93


def test_another_dataset_seed_or_sampling_is_refused() -> None:
    state = Stream(drawn([5, 5]), "train", 2, 8).state_dict()
    for other in (
        Stream(drawn([5, 6]), "train", 2, 8),
        Stream(drawn([5, 5], num_classes=4), "train", 2, 8),
        Stream(drawn([5, 5]), "train", 2, 8, seed=1),
        Stream(drawn([5, 5]), "train", 2, 8, sampling="square-root"),
        Stream(drawn([5, 5]), "train", 2, 8, window=1),
    ):
        with pytest.raises(UsageError, match="cannot resume"):
            other.load_state_dict(state)
    with pytest.raises(UsageError, match="damaged"):
        Stream(drawn([5, 5]), "train", 2, 8).load_state_dict({**state, "consumed": 11})


def test_another_batch_size_is_refused_where_the_order_depends_on_it() -> None:
    stream = Stream(drawn([5, 5]), "train", 2, 8, window=1)
    at_start = stream.state_dict()
    next(iter(stream))
    within = stream.state_dict()
    other = Stream(drawn([5, 5]), "train", 3, 8, window=1)
    other.load_state_dict(at_start)
    with pytest.raises(UsageError, match="its batch size was 2 and is now 3"):
        other.load_state_dict(within)
    scoring = Stream(drawn([5, 5]), "train", 2, 8, train=False)
    next(iter(scoring))
    with pytest.raises(UsageError, match="its number of ranks was 1 and is now 2"):
        Stream(drawn([5, 5]), "train", 2, 8, train=False, rank=1, world_size=2).load_state_dict(scoring.state_dict())


def test_impossible_requests_are_refused() -> None:
    data = drawn([3])
    with pytest.raises(UsageError, match="3 samples, and batches of 4 need at least 4"):
        Stream(data, "train", 4, 8, last="drop")
    with pytest.raises(UsageError, match="batches of 1 need at least 2"):
        Stream(data, "train", 1, 8, pairs=True)
    with pytest.raises(UsageError, match="last must be one of keep, join, drop"):
        Stream(data, "train", 2, 8, last="pad")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="unknown sampling 'balanced'"):
        Stream(data, "train", 2, 8, sampling="balanced")
    with pytest.raises(UsageError, match="batch size 0"):
        Stream(data, "train", 0, 8)
    with pytest.raises(UsageError, match="no split 'val'"):
        Stream(data, "val", 2, 8)
