"""Digests as 32 bytes a row: the same texts come back, whatever stands among them."""

from __future__ import annotations

import hashlib

import hypothesis
import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from animesion.dedup import search
from animesion.dedup.digests import Digests

HEX = [hashlib.sha256(bytes([i])).hexdigest() for i in range(4)]
#: digests, the empty text of a missing one, and texts that only look like digests
TEXTS = [*HEX, "", HEX[0].upper(), HEX[1][:-1], f"{HEX[2]}0", f"{HEX[3][:-1]}g", "s1", "é" * 32]


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.data())
def test_digests_are_the_texts_that_they_were_made_of(data: st.DataObject) -> None:
    halves = [data.draw(st.lists(st.sampled_from(TEXTS), max_size=12)) for _ in range(2)]
    texts = [*halves[0], *halves[1]]
    column = Digests.joined([Digests(pa.array(half, pa.string())) for half in halves])
    assert len(column) == len(texts)
    assert column[:].to_pylist() == texts
    assert [column[i].as_py() for i in range(len(texts))] == texts
    assert column.filled().tolist() == [bool(text) for text in texts]
    order = np.array(data.draw(st.permutations(range(len(texts)))), dtype=np.int64)
    assert column.take(pa.array(order)).to_pylist() == [texts[i] for i in order]
    turned = column.ordered(order)
    assert turned[1:5].to_pylist() == [texts[i] for i in order[1:5]]
    assert turned.filled().tolist() == [bool(texts[i]) for i in order]
    chosen = np.flatnonzero(np.arange(len(texts)) % 3 > 0)
    for rows in (None, chosen):
        due = search.equal_pairs(pa.array(texts, pa.string()), rows)
        assert np.array_equal(search.equal_pairs(column, rows), due)


def test_a_digest_takes_33_bytes() -> None:
    column = Digests(pa.array(HEX * 1000))
    assert column.nbytes == 33 * 4000


def test_texts_in_chunks_have_the_pairs_of_one_array() -> None:
    chunks = [pa.array([*HEX[:3], ""]), pa.array([], pa.string()), pa.array(["", HEX[1], HEX[3], HEX[1]])]
    pairs = search.equal_pairs(pa.chunked_array(chunks))
    assert pairs.tolist() == search.equal_pairs(pa.concat_arrays(chunks)).tolist() == [[1, 5], [5, 7]]
