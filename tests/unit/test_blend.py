"""Blends of datasets: draws by weight, classes by name, and no copies of what is evaluated."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from animesion.errors import UsageError
from animesion_training.data import DataSplits, Samples, Stream, blend, open_data
from animesion_training.data.sampling import blend_draws


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.floats(0.05, 3)), min_size=1, max_size=4),
    st.integers(0, 2**40),
    st.integers(1, 5),
)
def test_each_dataset_is_drawn_by_its_weight_and_evenly(
    datasets: list[tuple[int, float]], seed: int, epochs: int
) -> None:
    parts = [(count, max(1, round(count * weight))) for count, weight in datasets]
    drawn: Counter[int] = Counter()
    for epoch in range(epochs):
        draws = blend_draws(parts, seed=seed, epoch=epoch)
        assert len(draws) == sum(quota for _, quota in parts)
        drawn.update(draws.tolist())
    start = 0
    for count, quota in parts:
        times = [drawn[start + i] for i in range(count)]
        assert sum(times) == epochs * quota
        assert max(times) - min(times) <= 1
        start += count


def folders(root: Path, classes: dict[str, int], shade: int) -> DataSplits:
    for split in ("train", "val"):
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20, 20), (shade, 7 * i, len(name))).save(root / split / name / f"{i}.png")
    return open_data(root)


def test_classes_are_joined_by_name(tmp_path: Path) -> None:
    first = folders(tmp_path / "a", {"rin": 3, "miku": 4}, 10)
    second = folders(tmp_path / "b", {"luka": 2, "miku": 6}, 200)
    data, [note] = blend(first, "train", {"b": (second, 0.5)})
    assert note == "b: 8 images with weight 0.5; 1 of its 2 classes are joined by name, 1 are new"
    assert data.classes == ("miku", "rin", "luka")
    samples = data.select("train")
    assert [data.classes[label] for label in samples.labels] == ["miku"] * 4 + ["rin"] * 3 + ["luka"] * 2 + ["miku"] * 6
    assert data.select("val") is first.select("val")
    assert samples.draws == 7 + 4
    for i in range(len(samples)):  # the right file
        assert samples.place(i) == (first if i < 7 else second).select("train").place(i if i < 7 else i - 7)
        assert samples.read(i) == Path(samples.place(i)).read_bytes()
    streams = [Stream(data, "train", 4, 16, workers=0, rank=rank, world_size=2) for rank in range(2)]
    assert len(streams[0]) == 3
    seen: list[int] = []
    for _ in range(2):
        for parts in zip(*streams, strict=True):
            seen += [i for batch in parts for i in batch.indices.tolist()]
            for batch in parts:
                for image, i in zip(batch.images, batch.indices.tolist(), strict=True):
                    assert int(image[0].float().mean().round()) == (10 if i < 7 else 200)
    assert Counter(seen) == {i: 2 if i < 7 else 1 for i in range(15)}


def test_a_blend_resumes_and_refuses_other_weights(tmp_path: Path) -> None:
    first = folders(tmp_path / "a", {"rin": 9}, 10)
    second = folders(tmp_path / "b", {"miku": 8}, 200)

    def stream(weight: float, **settings: Any) -> Stream:
        return Stream(blend(first, "train", {"b": (second, weight)})[0], "train", 4, 16, workers=0, **settings)

    expected = [batch.indices.tolist() for batch in stream(2)]
    begun = stream(2)
    seen = [batch.indices.tolist() for batch in islice(begun, 3)]
    resumed = stream(2)
    resumed.load_state_dict(begun.state_dict())
    assert seen + [batch.indices.tolist() for batch in resumed] == expected
    with pytest.raises(UsageError, match=r"its draws was \[9, 16\] and is now \[9, 8\]"):
        stream(1).load_state_dict(begun.state_dict())
    with pytest.raises(UsageError, match="the two contradict each other"):
        stream(1, sampling="square-root")
    with pytest.raises(UsageError, match="the weight of b is 0: give a number above 0"):
        stream(0)


def digested(data: DataSplits, split: str) -> DataSplits:
    """The data with digests in which the number of an image stands for its bytes."""
    splits = {}
    for number, (name, samples) in enumerate(data.splits.items()):
        digests = np.zeros((len(samples), 32), dtype=np.uint8)
        digests[:, 0] = np.arange(len(samples)) + (100 * number if split else 1)
        columns = (samples.labels, samples.files, samples.offsets, samples.sizes, samples.keys, samples.source)
        splits[name] = Samples(name, *columns, digests)
    return DataSplits(data.path, data.classes, splits)


def test_copies_of_the_first_dataset_are_left_out(tmp_path: Path) -> None:
    first = digested(folders(tmp_path / "a", {"rin": 5}, 10), "train")
    second = digested(folders(tmp_path / "b", {"rin": 9}, 20), "")
    # 1 to 9: of which 0 to 4 are in train
    data, [note] = blend(first, "train", {"b": (second, 1)})
    assert note.endswith(f"; 4 images that {first.path} has already are left out")
    assert len(data.select("train")) == 5 + 5
    with pytest.raises(UsageError, match="all samples of a are in"):
        blend(first, "train", {"a": (first, 1)})
