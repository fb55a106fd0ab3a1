"""Reading `.mat` files: the arrays that published sets have, against SciPy's writer, and hostile files."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st

from animesion.errors import UsageError
from animesion.sources import mat_files


def saved(arrays: dict[str, Any], compress: bool = True) -> bytes:
    out = io.BytesIO()
    scipy.io.savemat(out, arrays, do_compression=compress)
    return out.getvalue()


def cell(*texts: str) -> Any:
    found = np.empty((len(texts), 1), dtype=object)
    found[:, 0] = texts
    return found


def element(kind: int, data: bytes, order: str = "<") -> bytes:
    return struct.pack(f"{order}II", kind, len(data)) + data + bytes(-len(data) % 8)


def matrix(kind: int, dimensions: tuple[int, ...], name: bytes, body: bytes, order: str = "<") -> bytes:
    size = struct.pack(f"{order}{len(dimensions)}i", *dimensions)
    head = element(6, struct.pack(f"{order}II", kind, 0), order) + element(5, size, order) + element(1, name, order)
    return element(14, head + body, order)


def file_of(*elements: bytes, order: str = "<") -> bytes:
    head = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack(f"{order}H", 0x0100)
    return head + (b"IM" if order == "<" else b"MI") + b"".join(elements)


@pytest.mark.parametrize("compress", [False, True])
def test_arrays_as_scipy_writes_them(compress: bool) -> None:
    rows = np.zeros((1, 2), dtype=[("fname", object), ("class", object)])
    rows[0, 0], rows[0, 1] = ("00001.jpg", np.uint8(14)), ("a longer name.jpg", np.uint8(3))
    content = saved(
        {
            "file_list": cell("n01-x/n01_1.jpg", "é/ü.jpg"),
            "labels": np.array([[1], [120]], dtype=np.uint8),
            "doubles": np.array([[1.0, 2.5], [3.0, 4.0]]),
            "annotations": rows,
            "other": np.zeros((50, 50)),
        },
        compress,
    )
    found: dict[str, Any] = mat_files.read(content, ["file_list", "labels", "doubles", "annotations"], "x.mat")
    assert list(found) == ["file_list", "labels", "doubles", "annotations"]  # nothing else is decoded
    assert found["file_list"] == ["n01-x/n01_1.jpg", "é/ü.jpg"]
    assert found["labels"].tolist() == [1, 120]
    assert found["doubles"].tolist() == [1.0, 3.0, 2.5, 4.0]  # by column
    assert found["annotations"]["fname"] == ["00001.jpg", "a longer name.jpg"]
    assert [each.tolist() for each in found["annotations"]["class"]] == [[14], [3]]


def test_a_big_endian_file() -> None:
    numbers = element(3, struct.pack(">3h", 1, -2, 300), ">")
    content = file_of(matrix(10, (1, 3), b"setid", numbers, ">"), order=">")
    assert mat_files.read(content, ["setid"], "x")["setid"].tolist() == [1, -2, 300]


def test_a_small_element_has_its_bytes_in_the_tag() -> None:
    body = struct.pack("<HH4s", 2, 3, bytes([7, 8, 9, 0]))
    content = file_of(matrix(9, (1, 3), b"labels", body))
    assert mat_files.read(content, ["labels"], "x")["labels"].tolist() == [7, 8, 9]


NUMBERS = matrix(9, (1, 2), b"labels", element(2, b"\1\2"))


def nested(depth: int) -> bytes:
    inner = matrix(9, (1, 1), b"", element(2, b"\1"))
    for _ in range(depth):
        inner = matrix(1, (1, 1), b"labels", inner)
    return inner


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a .mat file of version 5 to 7"),
        (b"\x89HDF\r\n\x1a\n" + bytes(200), "version 7.3, not of 5 to 7"),
        (file_of(NUMBERS)[:-3], "damaged"),
        (file_of(matrix(9, (1, 3), b"labels", element(2, b"\1\2"))), "damaged"),  # states three, has two
        (file_of(matrix(9, (1, 2), b"label", element(2, b"\1\2"))), "has no array 'labels'"),
        (file_of(matrix(1, (2**31 - 1, 2**31 - 1), b"labels", b"")), "more than 5,000,000 cells"),
        (file_of(matrix(1, (1000, 1), b"labels", b"")), "damaged"),
        (file_of(nested(20)), "too deeply"),
        (file_of(matrix(17, (1, 1), b"labels", b"")), "of a class that"),
        (file_of(struct.pack("<II", 15, 4) + b"junk"), "damaged"),
    ],
    ids=range(10),
)
def test_faults(content: bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        mat_files.read(content, ["labels"], "set/labels.mat")
    assert str(refused.value).startswith("set/labels.mat ")


def test_compressed_data_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mat_files, "_MOST_BYTES", 3000)
    part = zlib.compress(matrix(9, (1, 2000), b"other", element(2, bytes(2000))))
    packed = struct.pack("<II", 15, len(part)) + part
    with pytest.raises(UsageError, match="more than"):
        mat_files.read(file_of(packed, packed), ["labels"], "x")


SOUND = saved(
    {"annotations": np.array([("a", 1)], dtype=[("f", object), ("c", object)]), "labels": cell("ab", "c")}, False
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_are_read_or_refused(changes: list[tuple[int, int]]) -> None:
    content = bytearray(SOUND)
    for place, value in changes:
        content[place] = value
    with contextlib.suppress(UsageError):
        assert set(mat_files.read(bytes(content), ["annotations", "labels"], "x")) == {"annotations", "labels"}
