"""Atomic files, receipts, the claim on a folder."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from animesion.errors import BusyError, FullDiskError, UsageError
from animesion.storage.workspace import Workspace, atomic_file, full_disk_is_clear, write_atomic


def test_a_file_appears_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def interrupted() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            assert not path.exists()
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    write_atomic(path, b"whole")
    assert path.read_bytes() == b"whole"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
def test_a_full_disk_is_one_sentence(number: int, tmp_path: Path) -> None:
    with pytest.raises(FullDiskError, match="run the same command again"), full_disk_is_clear(tmp_path):
        raise OSError(number, os.strerror(number))


def test_a_real_file_size_limit_leaves_nothing_behind(tmp_path: Path) -> None:
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from animesion.storage.workspace import write_atomic\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_atomic(Path(sys.argv[1]) / 'file', bytes(5000))\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert "FullDiskError: no space to write" in run.stderr
    assert list(tmp_path.iterdir()) == []


def committed(workspace: Workspace) -> None:
    digest = write_atomic(workspace.path("a/out.bin"), b"result")
    workspace.commit("unit/one", "code-1", "params", {"in": "digest"}, {"a/out.bin": digest}, {"items": 3})


def test_receipts_hold_until_something_changes(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    committed(workspace)
    receipt = workspace.done("unit/one", "code-1", "params", {"in": "digest"})
    assert receipt is not None
    assert receipt.facts == {"items": 3}
    assert workspace.done("unit/one", "code-2", "params", {"in": "digest"}) is None
    assert workspace.done("unit/one", "code-1", "other", {"in": "digest"}) is None
    assert workspace.done("unit/one", "code-1", "params", {"in": "changed"}) is None
    assert workspace.done("unit/two", "code-1", "params", {"in": "digest"}) is None


def test_outputs_are_checked_by_content_when_their_times_changed(tmp_path: Path) -> None:
    committed(Workspace(tmp_path / "one"))
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)
    copy = Workspace(tmp_path / "two")
    assert copy.done("unit/one", "code-1", "params", {"in": "digest"})
    copy.path("a/out.bin").write_bytes(b"REsult")
    assert copy.done("unit/one", "code-1", "params", {"in": "digest"}) is None
    copy.path("a/out.bin").unlink()
    assert copy.done("unit/one", "code-1", "params", {"in": "digest"}) is None


def test_a_damaged_receipt_counts_as_none(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    committed(workspace)
    for text in ("", "{", "[]", '{"unit": 3}'):
        workspace.path(".receipts/unit/one.json").write_text(text)
        assert workspace.receipt("unit/one") is None


def test_forgotten_units_lose_their_files(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    committed(workspace)
    workspace.forget("unit", set())
    assert not workspace.path("a/out.bin").exists()
    assert workspace.receipt("unit/one") is None


def test_a_folder_serves_one_build_at_a_time(tmp_path: Path) -> None:
    first, second = Workspace(tmp_path / "out"), Workspace(tmp_path / "out")
    with (
        first.claim("", "digest"),
        pytest.raises(BusyError, match="in use by another build"),
        second.claim("", "digest"),
    ):
        pass
    with second.claim("", "digest"):
        pass


def test_a_folder_of_another_recipe_is_refused_unless_replaced(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "out")
    with workspace.claim("", "zero"):
        pass  # failed before it did anything: nothing to protect
    with workspace.claim("", "one"):
        committed(workspace)
    with pytest.raises(UsageError, match="written by another recipe"), workspace.claim("", "two"):
        pass
    for damaged in ("null", "{}", "[1]", "{"):
        workspace.path(".receipts/recipe.json").write_text(damaged)
        with pytest.raises(UsageError, match="written by another recipe"):
            workspace.check("two")
    with workspace.claim("", "two", replace=True):
        pass
    with workspace.claim("", "two"):
        pass


def test_a_folder_that_is_not_a_build_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(UsageError, match="is not a build"), Workspace(tmp_path).claim("", "digest"):
        pass
    with pytest.raises(UsageError, match="is a file"), Workspace(tmp_path / "photo.jpg").claim("", "digest"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_leftovers_of_a_killed_build_are_swept(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    with workspace.claim("", "digest"):
        pass
    workspace.path("raw").mkdir()
    workspace.path("raw/.tmp-123-part-00000.tar").write_bytes(b"half")
    with workspace.claim("", "digest"):
        assert not list(tmp_path.rglob(".tmp-*"))
