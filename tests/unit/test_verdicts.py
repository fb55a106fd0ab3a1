"""Verdicts of an earlier comparison: kept where both samples, their order and their close hashes are the same."""

from __future__ import annotations

import random
from pathlib import Path

import hypothesis
import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from animesion.dedup.candidates import Candidates
from animesion.dedup.compare import Found
from animesion.dedup.verdict import Verdict
from animesion.pipeline import verdicts
from animesion.storage import parquet
from animesion.storage.workspace import Workspace

Listed = list[tuple[int, int, int]]


def candidates(listed: Listed) -> Candidates:
    rows = np.array([each[:2] for each in listed], dtype=np.int64).reshape(-1, 2)
    bits = np.array([each[2] for each in listed], dtype=np.int64)
    return Candidates(rows, *(bits & bit > 0 for bit in (1, 2, 4, 8, 16)))


def column(digests: list[bytes]) -> pa.Array:
    return pa.array(digests, pa.binary(16))


def random_pairs(rng: random.Random, n: int, most: int) -> Listed:
    pairs = {(min(pair), max(pair)) for pair in (rng.sample(range(n), 2) for _ in range(rng.randrange(most)))}
    return [(*pair, rng.choice((0, 1, 5))) for pair in sorted(pairs)]


def judged(rng: random.Random, listed: Listed) -> list[Found]:
    chosen = [each for each in listed if rng.random() < 0.5]
    values = [Verdict.COPY, Verdict.ALTERNATE]
    transforms = [(1.0, 0, 0, 0, 1.0, i) for i in range(len(chosen))]
    return [
        Found(a, b, rng.choice(values), False, False, 20, 1.5, "", transform)
        for (a, b, _), transform in zip(chosen, transforms, strict=True)
    ]


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.randoms(use_true_random=False))
def test_exactly_the_pairs_that_did_not_change_keep_their_verdict(rng: random.Random) -> None:
    names = [f"{i:016d}".encode() for i in range(12)]
    before, after = rng.sample(names, 9), rng.sample(names, 9)
    old, new = random_pairs(rng, 9, 30), random_pairs(rng, 9, 30)
    found = judged(rng, old)
    keys = [name.decode() for name in before]
    related, compared, _ = verdicts.tables(candidates(old), found, column(before), keys.__getitem__)
    known, reused = verdicts.reused(
        verdicts.Earlier("", column(before), compared, related), candidates(new), column(after)
    )
    of_pair = {(each.first, each.second): each for each in found}
    was = {(before[a], before[b], bits): of_pair.get((a, b)) for a, b, bits in old}
    assert known.tolist() == [(after[a], after[b], bits) in was for a, b, bits in new]
    expected = [
        each._replace(first=a, second=b)
        for a, b, bits in new
        if (each := was.get((after[a], after[b], bits))) is not None
    ]
    assert sorted(reused) == expected


def test_a_sample_is_known_by_pixels_crop_and_features() -> None:
    samples = [
        ("a", None, (10, 10), b"x"), ("b", None, (10, 10), b"x"), ("a", (0, 0, 5, 5), (5, 5), b"x"),
        ("a", None, (10, 10), b"y"), ("a", None, (10, 10), None), ("a", None, (10, 10), b""),
        ("a", None, (5, 20), b"x"),
    ]  # fmt: skip
    digests = [verdicts.digest(*each) for each in samples]
    assert len(set(digests)) == len(samples)
    assert {len(each) for each in digests} == {16}


def test_an_earlier_comparison_counts_only_if_it_is_whole(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    pairs = [(0, 1, 1), (0, 2, 0)]
    one = [Found(0, 1, Verdict.COPY, False, False, 20, 1.5, "", (1.0, 0, 0, 0, 1.0, 0))]
    tables = verdicts.tables(candidates(pairs), one, column([b"%016d" % i for i in range(3)]), "abc".__getitem__)
    files = (verdicts.PAIRS_FILE, verdicts.COMPARED_FILE, verdicts.SEARCHED_FILE)

    def commit() -> None:
        outputs = {name: parquet.write(tmp_path / name, table) for name, table in zip(files, tables, strict=True)}
        workspace.commit(
            "compare", "code", "params", {}, outputs, {"pairs": 1, "compared": 2, "searched": 3, "notes": []}
        )

    assert verdicts.earlier(workspace, "code") is None
    commit()
    assert verdicts.earlier(workspace, "code") is not None
    assert verdicts.earlier(workspace, "other code") is None
    parquet.write(tmp_path / files[0], tables[0].slice(0, 0))
    assert verdicts.earlier(workspace, "code") is None
    # a receipt that fits tables that do not fit each other
    whole = tables
    for harmed in (
        (whole[0].slice(0, 0), *whole[1:]),
        (*whole[:2], whole[2].slice(0, 2)),
    ):
        tables = harmed
        commit()
        assert verdicts.earlier(workspace, "code") is None


def test_votes_hold_if_no_sample_is_gone_or_elsewhere() -> None:
    names = [b"%016d" % i for i in range(6)]
    before = [names[0], names[2], names[5]]
    pairs = candidates([(0, 1, 8), (1, 2, 1), (2, 0, 8 + 16)])
    related, compared, searched = verdicts.tables(pairs, [], column(before), "abc".__getitem__)
    earlier = verdicts.Earlier("", searched["digest"].combine_chunks(), compared, related)
    found = verdicts.votes(earlier, column(names))
    assert found is not None
    assert found.new.tolist() == [1, 3, 4]
    assert found.pairs.tolist() == [[0, 2], [0, 5], [0, 5]]
    assert found.mirrored.tolist() == [False, False, True]
    assert verdicts.votes(earlier, column(names[:5])) is None
    assert verdicts.votes(earlier, column(names[::-1])) is None
