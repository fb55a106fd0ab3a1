"""Publishing to a Hub and an S3 server on loopback, and to folders: refusals, kills, resumption, verification."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
import torch
from aiohttp import web

import animesion
from animesion import publishing, sources
from animesion.verification.checks import CHECKS
from animesion_sample.faults import local_server
from animesion_training.models import create_model
from animesion_training.weights import load_model, save_model
from tests.conftest import draw_folders
from tests.integration import hub_server, s3_server
from tests.integration.hub_server import TOKEN, Hub, wait_for
from tests.running import in_environment, run_here

CLI = "from animesion.cli import main; main()"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server.serving() as served:
        yield served


def environment(tmp_path: Path, hub: Hub | None = None, **more: str) -> dict[str, str]:
    """Environment variables without credentials of this machine."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "AWS_", "HUGGING"))}
    own = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    return kept | own | ({"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN} if hub else {}) | more


def publish(folder: Path, to: str, env: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    return run_here("publish", str(folder), "--to", to, "--workers", "1", *options, env=env)


def names(folder: Path) -> set[str]:
    return {line.partition("  ")[2] for line in (folder / "SHA256SUMS").read_text().splitlines()} | {"SHA256SUMS"}


def leaking(small_dataset: Path, tmp_path: Path) -> Path:
    """A dataset whose recipe allows one image in two splits, and has one."""
    world = tmp_path / "world"
    (world / "one").mkdir(parents=True)
    sample = next(iter(animesion.open_dataset(small_dataset).samples("train")))
    for i in range(10):
        (world / "one" / f"{i}.jpg").write_bytes(sample.image)
    settings = [f"source.path={world}", "duplicates.action=report", "split.strategy=legacy-dafre"]
    animesion.build(animesion.load_recipe("folder", settings), tmp_path / "leaking", workers=1)
    return tmp_path / "leaking"


# -- networks ---------------------------------------------------------------------------------------------------------


def test_a_network_is_pushed_once_and_timm_loads_it(hub: Hub, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_model(create_model("resnet18", 3, 32), tmp_path / "w.safetensors", ("red", "green", "blue"))

    def run(*options: str, **more: str) -> subprocess.CompletedProcess[str]:
        env = environment(tmp_path, hub, **more)
        return run_here("export", str(tmp_path / "w.safetensors"), "--to", "hf", *options, env=env)

    done = run("--push", "user/net", "--private")
    assert done.returncode == 0, done.stderr
    assert 'timm.create_model("hf-hub:user/net", pretrained=True)' in done.stdout
    repo = hub.repos["user/net"]
    assert (repo.kind, repo.private) == ("model", True)
    files = repo.files("main")
    assert json.loads(files["config.json"][1])["label_names"] == ["red", "green", "blue"]
    assert files["model.safetensors"][0] == "lfs"
    assert len(hub.uploads) == 1

    (tmp_path / "copy").mkdir()
    for name, (_, content) in files.items():
        (tmp_path / "copy" / name).write_bytes(content)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'copy'}", pretrained=True).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(loaded(images), load_model(tmp_path / "w.safetensors")[0](images))

    again = run("--push", "user/net", "--json", HF_TOKEN="hf_" + "someoneElses0123456789")
    assert again.returncode == 1
    assert "denies write access" in again.stderr
    assert "someoneElses" not in again.stderr


def test_what_cannot_be_pushed_is_refused_before_anything_is_exported(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").touch()
    for options, sentence in [
        (["--to", "onnx", "--push", "user/net"], "--push is for --to hf, not onnx"),
        (["--to", "hf"], "give --out for a file or folder, or --push"),
        (["--to", "hf", "--out", "x", "--private"], "--private is for --push"),
        (["--to", "hf", "--push", "net"], "--push net is not a repository: give user/name"),
    ]:
        done = run_here("export", str(tmp_path / "w.safetensors"), *options)
        assert done.returncode == 2
        assert sentence in done.stderr


# -- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_gets_what_the_checksums_list(small_dataset: Path, tmp_path: Path) -> None:
    env, to = environment(tmp_path), f"file://{tmp_path / 'out'}"
    shown = publish(small_dataset, to, env, "--dry-run", "--json")
    assert shown.returncode == 0, shown.stderr
    assert {file["name"] for file in json.loads(shown.stdout)["files"]} == names(small_dataset)
    assert not (tmp_path / "out").exists()
    done = publish(small_dataset, to, env)
    assert done.returncode == 0, done.stderr
    copied = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert copied == names(small_dataset)
    for name in copied:
        assert (tmp_path / "out" / name).read_bytes() == (small_dataset / name).read_bytes()
    # a spoiled and a lost file are sent again, the rest is not
    shard = tmp_path / "out" / "data" / "val-00000.tar"
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    (tmp_path / "out" / "README.md").unlink()
    again = publish(small_dataset, to, env, "--json")
    assert again.returncode == 0, again.stderr
    assert {file["name"] for file in json.loads(again.stdout)["files"] if not file["present"]} == {
        "data/val-00000.tar", "README.md", "dataset.json", "SHA256SUMS",
    }  # fmt: skip
    assert shard.read_bytes() == (small_dataset / "data" / "val-00000.tar").read_bytes()


def test_old_shards_in_a_folder_are_refused(small_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "data").mkdir(parents=True)
    (tmp_path / "out" / "data" / "train-00099.tar").write_bytes(b"old")
    done = publish(small_dataset, f"file://{tmp_path / 'out'}", environment(tmp_path))
    assert done.returncode == 2
    assert "data/train-00099.tar" in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == ["data", "train-00099.tar"]


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("out", (), "for a folder give file:///"),
        ("ftp://host/x", (), "is not a destination"),
        ("s3://key:secret@bucket/x", (), "keys and options are not part of an address"),
        ("hf://only-a-name", (), "give hf://user/name"),
        ("file://relative", (), "must be absolute"),
        ("file:///tmp/x", ("--private",), "--private is for hf://"),
        ("file:///tmp/x", ("--tag", "v1"), "put v1 into the prefix"),
    ],
)
def test_wrong_requests(small_dataset: Path, tmp_path: Path, to: str, options: tuple[str, ...], message: str) -> None:
    done = publish(small_dataset, to, environment(tmp_path), *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert "secret" not in done.stderr
    assert done.stderr.count("error:") == 1


def test_checks_of_the_command_are_those_of_verify() -> None:
    from animesion.cli.publish import publish as command

    force = next(parameter for parameter in command.params if parameter.name == "force")
    assert list(force.type.choices) == list(CHECKS)  # type: ignore[attr-defined]


# -- what is refused -------------------------------------------------------------------------------------------------


def test_a_leak_is_refused_unless_it_is_named(small_dataset: Path, tmp_path: Path) -> None:
    folder, to, env = leaking(small_dataset, tmp_path), f"file://{tmp_path / 'out'}", environment(tmp_path)
    for options in ((), ("--dry-run",), ("--force", "checksums")):
        refused = publish(folder, to, env, *options)
        assert refused.returncode == 1
        assert "--force leaks" in refused.stderr
        assert not (tmp_path / "out").exists()
    forced = publish(folder, to, env, "--force", "leaks")
    assert forced.returncode == 0, forced.stderr
    assert "of leaks" in forced.stdout


def test_a_damaged_shard_is_refused(small_dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(small_dataset, folder)
    shard = folder / "data" / "test-00000.tar"
    shard.write_bytes(shard.read_bytes()[:-700])
    refused = publish(folder, f"file://{tmp_path / 'out'}", environment(tmp_path))
    assert refused.returncode == 1
    assert "--force checksums --force archives" in refused.stderr


# -- the Hub ---------------------------------------------------------------------------------------------------------


def test_the_hub_from_nothing_to_a_tag(small_dataset: Path, tmp_path: Path, hub: Hub) -> None:
    env, to = environment(tmp_path, hub), "hf://user/small"
    shown = publish(small_dataset, to, env, "--dry-run", "--private")
    assert shown.returncode == 0, shown.stderr
    assert not hub.repos
    done = publish(small_dataset, to, env, "--private", "--tag", "v1")
    assert done.returncode == 0, done.stderr
    repo = hub.repos["user/small"]
    assert repo.private
    there = {name: content for name, (_, content) in repo.files("v1").items()}
    assert there == {name: (small_dataset / name).read_bytes() for name in names(small_dataset)}
    # nothing changed, nothing sent; the tag stays
    uploads, commits = list(hub.uploads), len(repo.commits)
    again = publish(small_dataset, to, env, "--private", "--tag", "v1")
    assert again.returncode == 0, again.stderr
    assert "sent 0 files" in again.stdout
    assert (hub.uploads, len(repo.commits)) == (uploads, commits)
    # a shard that went missing there comes back alone
    del repo.commits[-1]["files"]["data/val-00000.tar"]
    repaired = publish(small_dataset, to, env)
    assert repaired.returncode == 0, repaired.stderr
    assert "sent 1 file," in repaired.stdout
    assert {name: content for name, (_, content) in repo.files("main").items()} == there
    for each in (shown, done, again, repaired):
        assert TOKEN not in each.stdout + each.stderr


def test_another_dataset_takes_the_shards_of_the_last_away(small_dataset: Path, tmp_path: Path, hub: Hub) -> None:
    env = environment(tmp_path, hub)
    assert publish(small_dataset, "hf://user/small", env, "--tag", "v1").returncode == 0
    repo = hub.repos["user/small"]
    old = dict(repo.files("main"))
    repo.commits[-1]["files"]["data/train-00099.tar"] = ("lfs", b"old")
    repo.commits[-1]["files"]["notes.md"] = ("regular", b"notes")
    other = tmp_path / "other"
    settings = [f"source.path={draw_folders(other / 'world')}", "split.strategy=single"]
    animesion.build(animesion.load_recipe("folder", settings), other / "built", workers=1)
    assert publish(other / "built", "hf://user/small", env, "--tag", "v1").returncode == 2  # the tag is taken
    done = publish(other / "built", "hf://user/small", env, "--tag", "v2")
    assert done.returncode == 0, done.stderr
    now = repo.files("main")
    assert {name for name in now if name.endswith(".tar")} == {n for n in names(other / "built") if n.endswith(".tar")}
    assert "notes.md" in now
    assert {n: c for n, c in repo.files("v1").items() if n in old} == old


def test_a_killed_publication_goes_on(small_dataset: Path, tmp_path: Path, hub: Hub) -> None:
    env = environment(tmp_path, hub)
    hub.slow_after = 2
    command = [sys.executable, "-c", CLI, "publish", str(small_dataset), "--to", "hf://user/small", "--workers", "1"]
    running = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(hub.uploads) == 2)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert "dataset.json" not in hub.repos["user/small"].files("main")
    hub.slow_after = None
    done = publish(small_dataset, "hf://user/small", env)
    assert done.returncode == 0, done.stderr
    assert len(hub.uploads) == len(set(hub.uploads)), "what had arrived was sent again"
    there = {name: content for name, (_, content) in hub.repos["user/small"].files("main").items()}
    assert there == {name: (small_dataset / name).read_bytes() for name in names(small_dataset)}


def test_what_arrives_spoiled_is_a_fault(small_dataset: Path, tmp_path: Path, hub: Hub) -> None:
    hub.spoiled = "data/val-00000.tar"
    done = publish(small_dataset, "hf://user/small", environment(tmp_path, hub), "--tag", "v1")
    assert done.returncode == 1
    assert "data/val-00000.tar has another digest than the local file" in done.stderr
    assert not hub.repos["user/small"].tags


def test_a_public_repository_is_not_private(small_dataset: Path, tmp_path: Path, hub: Hub) -> None:
    env = environment(tmp_path, hub)
    assert publish(small_dataset, "hf://user/small", env).returncode == 0
    assert not hub.repos["user/small"].private
    refused = publish(small_dataset, "hf://user/small", env, "--private")
    assert refused.returncode == 2
    assert "is public" in refused.stderr


def test_a_gate_is_closed_before_anything_is_sent(tmp_path: Path, hub: Hub) -> None:
    for gate in ("manual", "off"):  # the second leaves what the first has set
        with in_environment(environment(tmp_path, hub)):
            publishing.destination("hf://user/small", gate=gate).prepare()
        assert hub.repos["user/small"].gated == "manual"
        assert len(hub.repos["user/small"].commits) == 1


def test_a_wrong_token_is_not_repeated(
    small_dataset: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = "hf_" + "wrongSecret987654321"
    for options in ((), ("--debug",)):
        refused = publish(small_dataset, "hf://user/small", environment(tmp_path, hub, HF_TOKEN=wrong), *options)
        assert refused.returncode == 1
        assert "hf auth login" in refused.stderr
        assert "Secret" not in refused.stdout + refused.stderr
    nowhere = environment(tmp_path, hub, HF_ENDPOINT="http://127.0.0.1:9")
    # it would wait 23 seconds between its attempts to connect
    monkeypatch.setattr("huggingface_hub.utils._http.time", mock.Mock(wraps=time, sleep=lambda seconds: None))
    gone = publish(small_dataset, "hf://user/small", nowhere)
    assert gone.returncode == 1
    assert "Secret" not in gone.stderr


# -- S3 --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3_server.Shelf]:
    with s3_server.serving(tmp_path_factory.mktemp("home")) as served:
        yield served


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_bucket(small_dataset: Path, tmp_path: Path, shelf: s3_server.Shelf) -> None:
    bucket, client = shelf.env, shelf.client
    to = "s3://shelf/sets/small"
    # what a killed run leaves: some whole files, and one that is of another size
    client.upload_file(str(small_dataset / "data/val-00000.tar"), "shelf", "sets/small/data/val-00000.tar")
    client.put_object(Bucket="shelf", Key="sets/small/index.parquet", Body=b"half")
    done = publish(small_dataset, to, bucket, "--json")
    assert done.returncode == 0, done.stderr
    assert [f["name"] for f in json.loads(done.stdout)["files"] if f["present"]] == ["data/val-00000.tar"]
    assert shelf.objects("sets/small/") == {name: (small_dataset / name).read_bytes() for name in names(small_dataset)}
    assert "sent 0 files" in publish(small_dataset, to, bucket).stdout
    missing = publish(small_dataset, "s3://no-such-bucket/x", bucket)
    assert missing.returncode == 1
    assert "s3://no-such-bucket/x: the bucket does not exist" in missing.stderr
    assert "Secret" not in missing.stderr + done.stderr


@pytest.mark.slow
def test_a_publication_to_a_bucket_that_was_killed_goes_on(small_dataset: Path, shelf: s3_server.Shelf) -> None:
    due = {name: (small_dataset / name).read_bytes() for name in names(small_dataset)}
    to = "s3://shelf/killed/small"
    command = [sys.executable, "-c", CLI, "publish", str(small_dataset), "--to", to, "--workers", "1"]
    running = subprocess.Popen(command, env=shelf.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(shelf.written("killed/small/")) >= 3)
    running.send_signal(signal.SIGKILL)
    running.wait()
    arrived = shelf.objects("killed/small/")
    arrived.pop("lease.json", None)
    assert arrived.items() <= due.items()
    assert "SHA256SUMS" not in arrived
    done = publish(small_dataset, to, shelf.env, "--json")
    assert done.returncode == 0, done.stderr
    assert {f["name"] for f in json.loads(done.stdout)["files"] if f["present"]} == set(arrived)
    assert shelf.objects("killed/small/") == due
    sent = shelf.written("killed/small/")
    assert max(sent[name] for name in due) == 1, "what had arrived was sent again"


# -- URLs instead of pixels ------------------------------------------------------------------------------------------


def test_urls_rebuild_the_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of a site, published as URLs and fetched again with `rebuild.toml`, give the same samples."""
    host = "images.invalid"
    world = draw_folders(tmp_path / "world")
    images = sorted(path for path in world.rglob("*") if path.is_file())[::3]  # ten a second are fetched, twice

    def application() -> web.Application:
        async def file(request: web.Request) -> web.Response:
            return web.Response(body=images[int(request.match_info["number"])].read_bytes())

        app = web.Application()
        app.router.add_get(r"/{number:\d+}", file)
        return app

    lines = [
        json.dumps({"url": f"http://{host}/{i}", "label": path.parent.name, "box": "0.125,0.1,0.9,0.8"})
        for i, path in enumerate(images)
    ]
    (tmp_path / "table.jsonl").write_text("\n".join(lines), encoding="utf-8")
    crawl = ["source.contact=me@example.org", "source.requests_per_second=10", "source.robots=false"]
    with local_server(application) as server:
        original = sources.make

        def made(recipe: Any) -> Any:
            source: Any = original(recipe)
            source.connect_to = {host: server.address}
            return source

        monkeypatch.setattr(sources, "make", made)
        settings = [f"source.path={tmp_path / 'table.jsonl'}", "source.box_column=box", *crawl]
        settings += ["crop.detector=boxes", "crop.margin=0.1", "crop.square=true", "pack.size=32", "pack.format=png"]
        first, to = tmp_path / "first", tmp_path / "published"
        animesion.build(animesion.load_recipe("urls", settings), first, workers=1)
        sent = publish(first, f"file://{to}", environment(tmp_path), "--urls-only")
        assert sent.returncode == 0, sent.stderr
        assert not [path for path in to.rglob("*") if path.suffix in (".tar", ".jpg")]
        monkeypatch.chdir(to)
        animesion.build(animesion.load_recipe(str(to / "rebuild.toml"), crawl), tmp_path / "second", workers=1)
    before, after = (
        {(s.name, s.split, s.image, tuple(s.meta["box"])) for s in animesion.open_dataset(folder).samples()}
        for folder in (first, tmp_path / "second")
    )
    assert len(before) == len(images)
    assert after == before


def test_urls_only_needs_urls(small_dataset: Path, tmp_path: Path) -> None:
    refused = publish(small_dataset, f"file://{tmp_path / 'out'}", environment(tmp_path), "--urls-only")
    assert refused.returncode == 2
    assert "--urls-only has nothing to send" in refused.stderr
