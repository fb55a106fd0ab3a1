"""A column of digests that takes 32 bytes a row and not the 68 of their text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

_BYTES = 32

#: Rows whose text is made at once.
_CHUNK = 1 << 16

#: Value of each byte as a digit in lower case, and the digit of each value.
_DIGITS = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)
_VALUES = np.full(256, 255, dtype=np.uint8)
_VALUES[_DIGITS] = np.arange(16)


class Digests:
    """Digests of 256 bits as lower-case hex, of n rows; any other text is kept as it is.

    Args:
        texts: an array of texts without nulls; None for no rows.
    """

    def __init__(self, texts: pa.Array | None = None) -> None:
        texts = pa.array([], pa.string()) if texts is None else texts
        self._content, self._is_digest = _packed(texts)
        odd = np.flatnonzero(~self._is_digest)
        others = zip(odd.tolist(), texts.take(pa.array(odd)).to_pylist(), strict=True)
        self._others: dict[int, str] = {row: text for row, text in others if text}

    def __len__(self) -> int:
        return len(self._is_digest)

    def __getitem__(self, rows: Any) -> Any:
        """The text of a row as a scalar, or those of a slice as an array, as an array of texts has them."""
        if isinstance(rows, slice):
            return self.take(np.arange(*rows.indices(len(self))))
        digest = self._is_digest[rows]
        return pa.scalar(self._content[rows].tobytes().hex() if digest else self._others.get(int(rows), ""))

    @property
    def nbytes(self) -> int:
        """Bytes in memory, without texts that are no digests."""
        return self._content.nbytes + self._is_digest.nbytes

    @property
    def type(self) -> pa.DataType:
        """The type of the texts."""
        return pa.string()

    def take(self, rows: pa.Array | npt.NDArray[np.int64]) -> pa.Array:
        """The texts of some rows."""
        places = np.asarray(rows, dtype=np.int64)
        known = self._is_digest[places]
        digits = np.empty((int(known.sum()), _BYTES, 2), dtype=np.uint8)
        chosen = places[known]
        for start in range(0, len(chosen), _CHUNK):  # as each step makes arrays of its own
            content = self._content[chosen[start : start + _CHUNK]]
            part = digits[start : start + _CHUNK]
            part[..., 0], part[..., 1] = _DIGITS[content >> 4], _DIGITS[content & 15]
        ends = np.concatenate([[0], np.cumsum(known, dtype=np.int64)]) * (2 * _BYTES)
        if ends[-1] >= 2**31:
            found = pa.Array.from_buffers(
                pa.large_string(), len(places), [None, pa.py_buffer(ends), pa.py_buffer(digits)]
            )
        else:
            ends = ends.astype(np.int32)
            found = pa.Array.from_buffers(pa.string(), len(places), [None, pa.py_buffer(ends), pa.py_buffer(digits)])
        others = [self._others.get(row, "") for row in places[~known].tolist()] if self._others else []
        return pc.replace_with_mask(found, ~known, pa.array(others, found.type)) if any(others) else found

    @classmethod
    def joined(cls, pieces: Sequence[Digests]) -> Digests:
        """Several columns, one after another."""
        found = cls()
        starts = np.cumsum([0, *map(len, pieces)]).tolist()
        found._content = np.concatenate([found._content, *(piece._content for piece in pieces)])
        found._is_digest = np.concatenate([found._is_digest, *(piece._is_digest for piece in pieces)])
        for start, piece in zip(starts, pieces, strict=False):
            found._others |= {start + row: text for row, text in piece._others.items()}
        return found

    def ordered(self, order: npt.NDArray[np.int64]) -> Digests:
        """The column with its rows in another order."""
        found = Digests()
        found._content, found._is_digest = self._content[order], self._is_digest[order]
        if self._others:
            place = np.empty(len(order), dtype=np.int64)
            place[order] = np.arange(len(order))
            found._others = {int(place[row]): text for row, text in self._others.items()}
        return found

    def filled(self) -> npt.NDArray[np.bool_]:
        """Which rows have a text that is not empty, shape (n,)."""
        found = self._is_digest.copy()
        found[list(self._others)] = True
        return found

    def sums(self) -> npt.NDArray[np.uint64]:
        """A number for each row, shape (n,): equal texts have equal numbers, and few others do."""
        found = self._content[:, :8].copy().view("<u8").ravel()
        sums = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in self._others.values())
        found[list(self._others)] = np.frombuffer(b"".join(sums), dtype="<u8")
        return found


def _packed(texts: pa.Array) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """The digests of some texts, shape (n, 32), and which of them are digests, shape (n,); others are zeros."""
    content = np.zeros((len(texts), _BYTES), dtype=np.uint8)
    known = pc.equal(pc.binary_length(texts), 2 * _BYTES).to_numpy(zero_copy_only=False).copy()
    rows = np.flatnonzero(known)
    chosen = texts.take(pa.array(rows)).cast(pa.large_string())
    if len(rows):
        _, ends, letters = chosen.buffers()
        start = int(np.frombuffer(ends, dtype=np.int64)[chosen.offset])
        flat = np.frombuffer(letters, dtype=np.uint8)[start : start + len(rows) * 2 * _BYTES]
        values = _VALUES[flat].reshape(len(rows), _BYTES, 2)
        proper = (values < 16).all(axis=(1, 2))
        known[rows[~proper]] = False
        content[rows[proper]] = values[proper, :, 0] << 4 | values[proper, :, 1]
    return content, known
