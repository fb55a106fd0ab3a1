"""Find the row of a key in a column of keys, without a Python object per key."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc


class Places:
    """Rows by key.

    Args:
        keys: n keys, each once.
    """

    def __init__(self, keys: pa.Array) -> None:
        self._keys = keys

    def __getitem__(self, key: str) -> int:
        place = self.get(key)
        if place is None:
            raise KeyError(key)
        return place

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.get(key) is not None

    def get(self, key: str) -> int | None:
        """The row of a key; None if there is none."""
        low, high, order = 0, len(self._keys), self._order
        while low < high:
            middle = (low + high) // 2
            found = self._keys[middle if order is None else int(order[middle])].as_py()
            if found == key:
                return middle if order is None else int(order[middle])
            low, high = (middle + 1, high) if found < key else (low, middle)
        return None

    @functools.cached_property
    def _order(self) -> npt.NDArray[np.uint64] | None:
        """Rows in the order of their keys; None if they are in it already."""
        # Arrow compares bytes of UTF-8, which is the order of code points and thus Python's
        if len(self._keys) < 2 or pc.all(pc.less(self._keys[:-1], self._keys[1:])).as_py():
            return None
        order: npt.NDArray[np.uint64] = pc.sort_indices(self._keys).to_numpy()
        return order
