"""Several processes train what one process trains: for any batch, rest, accumulation and method."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from animesion_training.models import create_model
from animesion_training.weights import save_model
from tests import ranks

_METHODS = {
    "plain": (),
    # a low rate: its logits are multiplied by 100, and so are differences of rounding
    "cal": ("model.selector=cal", "model.freeze=['head.attentions.bn']", "optimizer.lr=0.0001"),
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
    assert one.loss == pytest.approx(other.loss, rel=tolerance)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(
    world_size=st.integers(2, ranks.MOST),
    batch_size=st.integers(1, 9),
    count=st.integers(1, 14),
    accumulate=st.integers(1, 5),
    last=st.sampled_from(["keep", "join", "drop"]),
    method=st.sampled_from(sorted(_METHODS)),
    mixing=st.booleans(),
    ema=st.booleans(),
    broken=st.sets(st.integers(0, 13), max_size=5),
    options=st.sets(st.sampled_from(["static_graph", "gradient_as_bucket_view", "find_unused_parameters"])),
)
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
    assume(len(unread) < count)
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
