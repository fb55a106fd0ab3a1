"""Shards: tarfile reads what is written here, and short or malformed shards are refused."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from animesion.dataset import shards

KEYS = st.text("abcdefghijklmnopqrstuvwxyz0123456789_-", min_size=1, max_size=90)


def write(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    path.write_bytes(b"".join(shards.sample(key, samples[key]) for key in sorted(samples)) + shards.END)
    return path


@given(st.dictionaries(KEYS, st.binary(max_size=1500), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_any_sample_reads_back_in_tarfile_and_here(
    tmp_path_factory: pytest.TempPathFactory, samples: dict[str, bytes]
) -> None:
    path = write(tmp_path_factory.mktemp("t") / "s.tar", {k: {"jpg": v, "cls": b"1"} for k, v in samples.items()})
    with tarfile.open(path) as archive:
        infos = archive.getmembers()
        found = {info.name: archive.extractfile(info).read() for info in infos}
    assert found == {f"{k}.jpg": v for k, v in samples.items()} | {f"{k}.cls": b"1" for k in samples}
    assert all((info.mtime, info.uid, info.gid, info.mode, info.uname) == (0, 0, 0, 0o644, "") for info in infos)
    ours = {member.name: shards.read(path, member.offset, member.size) for member in shards.members(path)}
    assert ours == found


def test_headers_are_those_of_tarfile() -> None:
    info = tarfile.TarInfo("danbooru-1-0.jpg")
    info.size = 12_345
    assert shards.header(info.name, info.size) == info.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize("key", ["", "a.b", "../up", "A", "ü", "x" * 91, "a b", "a\n"])
def test_keys_that_readers_would_split_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="sample key"):
        shards.sample(key, {"cls": b"1"})


def shard(tmp_path: Path) -> Path:
    return write(tmp_path / "s.tar", {f"k{i}": {"jpg": bytes(700), "cls": b"1"} for i in range(4)})


@pytest.mark.parametrize("cut", [1, 512, 1024, 1500, 3072, 8000])
def test_a_shard_that_was_cut_anywhere_is_refused(tmp_path: Path, cut: int) -> None:
    path = shard(tmp_path)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(shards.ShardError, match="cut short"):
        list(shards.members(path))


def test_damage_and_strange_members_are_named(tmp_path: Path) -> None:
    path = shard(tmp_path)
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    with pytest.raises(shards.ShardError, match="damaged header at byte 0"):
        list(shards.members(path))
    for name, kind in (("../evil.jpg", tarfile.REGTYPE), ("k.jpg", tarfile.SYMTYPE), ("Dir.x/k.jpg", tarfile.REGTYPE)):
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
            info = tarfile.TarInfo(name)
            info.type = kind
            archive.addfile(info, io.BytesIO())
        with pytest.raises(shards.ShardError, match="not a member of a sample"):
            list(shards.members(path))
