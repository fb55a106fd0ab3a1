"""Archives, decisions and images that mean harm: each is one sentence or a drop reason, in bounded time."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

import animesion
from animesion.config import decisions, settings
from animesion.dataset import text_tables
from animesion.errors import UsageError
from animesion.stats import class_counts
from animesion.verification.checks import verify
from tests.conftest import draw
from tests.running import run_here

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


@given(st.text(alphabet="'=+-@\t\r1.ea|(! \u3042", max_size=6))
@example("=cmd|' -C calc'!A0")
@example("'=1+1|")
@example("- dash")
def test_cells_of_spreadsheets_call_nothing_and_read_back(text: str) -> None:
    cell = text_tables.cell_of(text)
    assert text_tables.text_of_cell(cell) == text
    if cell.lstrip()[:1] in ("=", "+", "-", "@"):
        assert not set("|(!").intersection(cell)
        assert cell == text


def test_class_names_that_are_formulas(tmp_path: Path) -> None:
    evil = "=cmd|' -C calc'!A0"
    for number in range(8):
        path = tmp_path / "images" / (evil if number % 2 else "plain") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(number).save(path)
    recipe = animesion.load_recipe("folder", [f"source.path={tmp_path / 'images'}", "classes.minimum=1"])
    animesion.build(recipe, tmp_path / "out", workers=1)
    names = [info.name for info in animesion.open_dataset(tmp_path / "out").classes]
    rows = list(csv.reader((tmp_path / "out" / "classes.csv").read_text(encoding="utf-8").splitlines()))[1:]
    assert [row[1] for row in rows] == [f"'{name}" if name.startswith("=") else name for name in names]
    assert any(name.startswith("=") for name in names)
    assert [str(name) for name in class_counts.count(str(tmp_path / "out" / "classes.csv")).counts.names] == names
    assert not any(verify(animesion.open_dataset(tmp_path / "out"), workers=1).faults.values())


@pytest.mark.parametrize("name", ["\x1b[31mred\x07", "a\nb", "\x9b0m"])
def test_class_names_that_act_on_a_terminal_are_refused(small_dataset: Path, tmp_path: Path, name: str) -> None:
    facts = json.loads((small_dataset / "dataset.json").read_bytes())
    facts["class_names"][0] = name
    (tmp_path / "dataset.json").write_text(json.dumps(facts))
    with pytest.raises(UsageError, match="a class name has control characters"):
        animesion.open_dataset(tmp_path)


def test_an_error_message_does_not_act_on_a_terminal() -> None:
    done = run_here("verify", "nowhere\x1b]0;title\x07")
    assert done.returncode == 2
    assert "nowhere?]0;title?" in done.stderr
    assert "\x1b" not in done.stderr


def test_decoders_print_nothing(tmp_path: Path) -> None:
    """In a process of its own, as C code prints past `sys.stderr`."""
    out = io.BytesIO()
    Image.linear_gradient("L").save(out, "TIFF", compression="tiff_lzw")
    (tmp_path / "whole.tif").write_bytes(out.getvalue())
    script = (
        "import random, sys; from animesion.images import codec\n"
        "random.seed(1); whole = open(sys.argv[1], 'rb').read()\n"
        "for number in range(200):\n"
        "    damaged = bytearray(whole)\n"
        "    for _ in range(4): damaged[random.randrange(len(damaged))] = random.randrange(256)\n"
        "    try: codec.decode(bytes(damaged), codec.Limits())\n"
        "    except codec.RejectedImageError: pass\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "whole.tif")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
