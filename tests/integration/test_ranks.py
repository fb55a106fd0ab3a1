"""Several processes train what one process trains: for any batch, rest, accumulation and method."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from animesion_training.engine import checkpoint
from animesion_training.models import create_model
from animesion_training.weights import read_card, save_model
from tests import ranks

_METHODS = {
    "plain": (),
    # a low rate: roots of features near 0 turn differences of rounding into different steps
    "cal": ("model.selector=cal", "model.freeze=['head.attentions.bn']", "optimizer.lr=0.00001"),
    "calmix": (
        *("model.selector=cal", "model.freeze=['head.attentions.bn']", "optimizer.lr=0.00001"),
        *("data.partners=true", "views.mix=true"),
    ),
    "kd": ("teacher.precision=fp32",),
    "tgda": ("teacher.precision=fp32", "teacher.views=true"),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[ranks.Pool]:
    with ranks.pool() as started:
        yield started


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a network with attention maps."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    small: dict[str, Any] = {"depth": 1, "embed_dim": 16, "num_heads": 2}
    save_model(create_model("vit_tiny_patch16", 3, 32, selector="cal", **small), path, ("a", "b", "c"))
    return path


def same(one: ranks.Trained, other: ranks.Trained, tolerance: float) -> None:
    assert one.steps == other.steps
    assert one.state.keys() == other.state.keys()
    for name, value in one.state.items():
        np.testing.assert_allclose(value, other.state[name], rtol=tolerance, atol=tolerance / 100, err_msg=name)
    assert one.numbers["train_loss"] == pytest.approx(other.numbers["train_loss"], rel=tolerance)


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(
    world_size=st.integers(2, ranks.MOST),
    batch_size=st.integers(1, 9),
    count=st.integers(1, 14),
    accumulate=st.integers(1, 5),
    last=st.sampled_from(["keep", "join", "drop"]),
    method=st.sampled_from(sorted(_METHODS.keys() - {"calmix"})),  # pairs need even batches, see the test above
    mixing=st.booleans(),
    ema=st.booleans(),
    broken=st.sets(st.integers(0, 13), max_size=5),
    options=st.sets(st.sampled_from(["static_graph", "gradient_as_bucket_view", "find_unused_parameters"])),
)
# shares that cannot be cut into as many equal pieces, ranks without images, and a batch of which nothing can be read
@example(2, 9, 14, 4, "keep", "plain", False, False, set(), set())
@example(2, 6, 12, 4, "join", "plain", True, True, set(), set())
@example(4, 1, 5, 2, "keep", "cal", False, True, set(), {"find_unused_parameters"})
@example(4, 3, 7, 1, "keep", "tgda", True, False, set(), {"static_graph", "gradient_as_bucket_view"})
@example(2, 2, 6, 1, "keep", "plain", False, False, {0, 1, 2, 3, 4}, set())
def test_ranks_train_what_one_process_trains(
    pool: ranks.Pool,
    teacher: Path,
    world_size: int,
    batch_size: int,
    count: int,
    accumulate: int,
    last: str,
    method: str,
    mixing: bool,
    ema: bool,
    broken: set[int],
    options: set[str],
) -> None:
    unread = frozenset(each for each in broken if each < count)
    used = count - count % batch_size if last == "drop" else count
    assume(len(unread) < used)  # an epoch of which nothing can be read is refused
    if "static_graph" in options:
        accumulate, options = 1, options - {"find_unused_parameters"}
    mixing = mixing and method != "cal" and not unread
    assume(count >= (batch_size if last == "drop" else 1 + mixing) and batch_size >= 1 + mixing)
    overrides = [
        *_METHODS[method],
        f"run.batch_size={batch_size}",
        f"run.accumulate={accumulate}",
        f"run.ema={0.7 if ema else 0}",
        f"data.last={last}",
        f"data.on_error={'skip' if unread else 'raise'}",
        *(f"run.{each}={str(each in options).lower()}" for each in ("gradient_as_bucket_view", *sorted(options))),
    ]
    if mixing:
        overrides += ["augment.mixup=0.4", "augment.cutmix=1.0", "objective.smoothing=0.1"]
    if method in ("kd", "tgda"):
        overrides.append(f"teacher.weights={teacher}")
    [alone] = pool(ranks.train, 1, overrides, count, unread)
    together = pool(ranks.train, world_size, overrides, count, unread)
    for each in together:
        same(each, together[0], 0.0)  # to the bit
    same(together[0], alone, 1e-4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_partners_are_mixed_by_any_number_of_processes(pool: ranks.Pool, accumulate: int) -> None:
    overrides = [*_METHODS["calmix"], "run.batch_size=8", f"run.accumulate={accumulate}"]
    [alone] = pool(ranks.train, 1, overrides, 7)
    for each in pool(ranks.train, 3, overrides, 7):
        same(each, alone, 1e-4)


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (3, 2)])
def test_transplants_are_those_of_one_process(
    pool: ranks.Pool, teacher: Path, world_size: int, accumulate: int
) -> None:
    overrides = [*_METHODS["tgda"], "teacher.transplants=true", f"teacher.weights={teacher}", "run.batch_size=10"]
    [alone] = pool(ranks.train, 1, overrides, 17)
    for each in pool(ranks.train, world_size, [*overrides, f"run.accumulate={accumulate}"], 17):
        same(each, alone, 1e-4)


@settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.too_slow])
@given(
    kills=st.lists(st.tuples(st.integers(1, ranks.MOST), st.integers(1, 10)), min_size=1, max_size=3),
    world_size=st.integers(1, ranks.MOST),
    batch_size=st.integers(2, 5),
    method=st.sampled_from(["plain", "cal", "tgda"]),
    mixing=st.booleans(),
)
def test_a_killed_run_goes_on_with_any_number_of_processes(
    pool: ranks.Pool,
    teacher: Path,
    tmp_path_factory: pytest.TempPathFactory,
    kills: list[tuple[int, int]],
    world_size: int,
    batch_size: int,
    method: str,
    mixing: bool,
) -> None:
    """Killed in the given steps of two epochs, each time with another number of processes."""
    overrides = [*_METHODS[method], f"run.batch_size={batch_size}", "schedule.epochs=2", "run.ema=0.7"]
    overrides += [f"teacher.weights={teacher}"] if method == "tgda" else []
    overrides += ["augment.mixup=0.4", "augment.cutmix=1.0"] if mixing and method != "cal" else []
    [alone] = pool(ranks.train, 1, overrides, 9)
    out = tmp_path_factory.mktemp("killed")
    nothing: frozenset[int] = frozenset()
    for processes, step in sorted(kills, key=lambda kill: kill[1]):
        if step < alone.steps:
            ended = pool(ranks.train, processes, [*overrides, "run.save_steps=1"], 9, nothing, out, step)
            assert ended == [None] * processes
    for each in pool(ranks.train, world_size, overrides, 9, nothing, out):
        same(each, alone, 1e-4)


@pytest.mark.parametrize(("world_size", "batch_size", "count"), [(2, 4, 9), (3, 2, 5), (4, 7, 15), (1, 4, 9)])
def test_batch_norms_agree_and_the_file_is_what_was_validated(
    pool: ranks.Pool, tmp_path: Path, world_size: int, batch_size: int, count: int
) -> None:
    """Also where a rest of one joins the batch before, and where only some ranks have images."""
    overrides = ["model.selector=cal", "optimizer.lr=0.002", "schedule.epochs=2", "data.val=val", "run.ema=0.5"]
    overrides += [f"run.batch_size={batch_size}", "run.accumulate=3"]
    together = pool(ranks.train, world_size, overrides, count, frozenset(), tmp_path)
    for each in together:
        assert each.state.keys() == together[0].state.keys()
        for name, value in each.state.items():
            if not name.endswith("num_batches_tracked"):
                np.testing.assert_array_equal(value, together[0].state[name], err_msg=name)
    moved = together[0].state["model.head.attentions.bn.running_var"]
    assert (moved != 1).all()
    card = read_card(tmp_path / "best.safetensors")
    [found] = pool(ranks.validate, 1, tmp_path / "best.safetensors", count)
    assert found == pytest.approx(card.facts["val_nll"], rel=1e-6)


def test_nothing_to_read_is_a_sentence_in_every_process(pool: ranks.Pool) -> None:
    with pytest.raises(RuntimeError) as caught:
        pool(ranks.train, 3, ["data.on_error=skip", "run.batch_size=4"], 6, frozenset(range(6)))
    sentence = "UsageError: none of the images of this epoch can be read: sample k"
    assert str(caught.value).count(sentence) == 3


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("run.batch_size=3", "run.accumulate=2"),
        ("model.selector=cal", "run.accumulate=3"),
        ("augment.mixup=0.4", "run.ema=0.9", "optimizer.name=adamw"),
    ],
    ids=["plain", "rank-without-images", "cal-in-pieces", "mixing-ema"],
)
def test_a_step_reduces_the_gradients_and_one_vector(pool: ranks.Pool, overrides: tuple[str, ...]) -> None:
    found = pool(ranks.collectives, 4, ["run.batch_size=8", *overrides], 24)
    assert all(each == found[0] for each in found)
    # the first step exchanges the names of the terms, the second the order in which gradients are reduced
    assert found[0][2:] == [{"c10d::allreduce_": 2}] * (len(found[0]) - 2)
    assert len(found[0]) > 2


def test_processes_agree_on_the_batch_that_fits_the_least_memory(pool: ranks.Pool) -> None:
    answers = pool(ranks.fitting_batch, 3, [1e12, 5e5, 1e12], 200)
    size = answers[0][0]
    assert [found for found, _ in answers] == [size] * 3
    assert size < pool(ranks.fitting_batch, 3, [1e12] * 3, 200)[0][0] == 3 * 4  # sixteen steps of 200 images
    assert f"{size // 3} for each of 3 processes" in answers[1][1][0]
    with pytest.raises(RuntimeError, match="not even 2 images fit"):
        pool(ranks.fitting_batch, 2, [1e12, 0], 40)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_signal_to_one_process_stops_all_after_the_same_step(pool: ranks.Pool, tmp_path: Path, rank: int) -> None:
    steps = pool(ranks.stop, 3, rank, 4, tmp_path)
    assert steps == [steps[0]] * 3
    assert 4 < steps[0] < 30  # noticed at one of the next readings, before the end of the epoch
    assert checkpoint.load(tmp_path / "last.ckpt")["step"] == steps[0]


@pytest.mark.parametrize("processes", [2, 4])
def test_the_processes_of_a_machine_share_one_cache(pool: ranks.Pool, processes: int) -> None:
    """Four processes on one machine, or on two."""
    [alone] = pool(ranks.cache, 1, 11, 1)
    together = pool(ranks.cache, 4, 11, processes)
    for rank, each in enumerate(together):
        np.testing.assert_array_equal(each.images, alone.images)
        np.testing.assert_array_equal(each.aspects, alone.aspects)
        assert each.seen == bytes([rank // processes * processes + 1] * 3)
        assert each.decoded <= -(-11 // processes)
    assert sum(each.decoded for each in together) == 11 * 4 // processes


def test_an_image_that_one_process_cannot_read_ends_all(pool: ranks.Pool) -> None:
    [sentence, *others] = pool(ranks.cache, 3, 9, 3, frozenset({7}))
    assert "drawn-7" in sentence
    assert others == [sentence] * 2
    [sentence, *others] = pool(ranks.score, 3, 9, frozenset({7}))
    assert "drawn-7" in sentence
    assert others == [sentence] * 2


_COSINES = ("model.head=cosine", "model.method_options.head={scale = 1.0, learn_scale = false}")


@pytest.mark.parametrize(
    ("overrides", "world_size", "batch_size", "count", "broken"),
    [
        (("objective.name=arcface", *_COSINES, "run.accumulate=2"), 2, 6, 12, ()),
        (("objective.name=proxy-anchor", *_COSINES), 3, 7, 12, ()),
        (("objective.name=proxy-anchor", *_COSINES), 2, 4, 9, (2, 5)),
        # a rest of one image, for which other processes have none
        (("objective.name=supcon",), 4, 6, 13, ()),
        (("objective.name=supcon", "data.images_per_class=2", "run.ema=0.5"), 2, 4, 12, (0, 3, 7)),
    ],
)
def test_ranks_compare_the_images_of_the_whole_batch(
    pool: ranks.Pool,
    overrides: tuple[str, ...],
    world_size: int,
    batch_size: int,
    count: int,
    broken: tuple[int, ...],
) -> None:
    given = [*overrides, f"run.batch_size={batch_size}", f"data.on_error={'skip' if broken else 'raise'}"]
    [alone] = pool(ranks.train, 1, given, count, frozenset(broken))
    together = pool(ranks.train, world_size, given, count, frozenset(broken))
    for each in together:
        same(each, together[0], 0.0)  # to the bit
    same(together[0], alone, 1e-4)
