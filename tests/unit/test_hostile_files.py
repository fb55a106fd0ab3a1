"""Archives, decisions and images that mean harm: each is one sentence or a drop reason, in bounded time."""

from __future__ import annotations

import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import tomli_w

import animesion
from animesion.config import decisions, settings
from animesion.errors import UsageError
from animesion.stats import class_counts
from tests.conftest import draw

END = bytes(2 * tarfile.BLOCKSIZE)


def member(name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content), kind
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def pax(key: str, value: str) -> bytes:
    record = f" {key}={value}\n"
    length = len(record) + len(str(len(record) + 2))
    return member("header", f"{length}{record}".encode(), tarfile.XHDTYPE)


LONG_NAME = member("././@LongLink", b"x" * 120 + b"\0", tarfile.GNUTYPE_LONGNAME)


@pytest.mark.parametrize(
    "hostile",
    [LONG_NAME * 3000, pax("path", "a/b.jpg") * 3000, pax("size", "1" + "0" * 17), pax("size", "1" + "0" * 30)],
    ids=["long-names", "pax-headers", "size-17", "size-30"],
)
def test_tars_of_hostile_headers_are_one_sentence(tmp_path: Path, hostile: bytes) -> None:
    draw(1).save(tmp_path / "one.png")
    image = (tmp_path / "one.png").read_bytes()
    for number, content in enumerate((member("a/1.png", image) + hostile, hostile)):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(content + member("a/2.png", image) + END)
        with pytest.raises(UsageError, match=rf"{number}\.tar (is damaged after|is neither a folder nor a readable)"):
            animesion.build(animesion.load_recipe("folder", [f"source.path={path}"]), tmp_path / "out", workers=1)
        with pytest.raises(UsageError, match="is not a whole uncompressed tar"):
            class_counts.count(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a" + ".a" * 200_000 + " = 1", "a key of more than 64 parts"),
        ("[" + "'a' . " * 200_000 + "b]", "a key of more than 64 parts"),
        ("label = {x = 1, " + '"a".' * 200_000 + "b = 1}", "a key of more than 64 parts"),
        ("exclude = " + "[" * 100_000, "is not valid TOML"),
        ("exclude = " + "9" * 100_000, "is not valid TOML"),
    ],
    ids=["key", "table", "inline", "nested", "number"],
)
def test_toml_of_hostile_keys_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "hostile.toml"
    path.write_text(text)
    start = time.monotonic()
    for read in (decisions.read, lambda path: settings.read("animesion", str(path))):
        with pytest.raises(UsageError, match=message):
            read(path)
    assert time.monotonic() - start < 5


def test_decisions_on_very_many_images_take_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "decisions.toml"
    sets = [[f"k{place + 999 * number}" for place in range(1000)] for number in range(60)]
    path.write_text(tomli_w.dumps({"different": sets}))
    start = time.monotonic()
    found = decisions.read(path)
    near = np.array([[0, 1], [0, 1001], [999, 1998], [998, 1000]])
    rows = {f"k{row}": row for row in range(60_000)}
    assert decisions.decided_pairs(near, rows, lambda row: row, found).tolist() == [[0, 1001], [998, 1000]]
    assert time.monotonic() - start < 5
    path.write_text(tomli_w.dumps({"same": sets}))
    with pytest.raises(
        UsageError, match="of which k0 and 59,940 others in one set, are more than 1,000,000: name fewer"
    ):
        decisions.read(path)
    path.write_text(tomli_w.dumps({"same": [["a", "b"], ["b", "c"]], "different": [["x", "c", "a"]]}))
    with pytest.raises(UsageError, match="a and c are declared both the same and different"):
        decisions.read(path)
