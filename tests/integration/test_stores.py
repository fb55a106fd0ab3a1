"""Builds that go to a bucket or come from one: the same bytes as on disk, killed, resumed, refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from hypothesis import strategies as st

import animesion
from animesion import sources
from animesion.errors import AnimesionError, BusyError, UsageError
from animesion.pipeline import preview, runner
from animesion.publishing.lease import Lease
from animesion.storage import stores
from tests.conftest import draw_folders
from tests.integration import s3_server
from tests.integration.s3_server import BUCKET, SECRET, Shelf
from tests.unit.test_layouts import trees

CLI = "from animesion.cli import main; main()"
SMALL = ["pack.shard_samples=3", "split.train=70", "split.test=20"]

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "7")  # every listing has several pages
        with s3_server.serving(tmp_path_factory.mktemp("home")) as shelf:
            yield shelf


@pytest.fixture
def shelf(served: Shelf, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    """The server, also for this process."""
    for name, value in served.env.items():
        monkeypatch.setenv(name, value)
    return served


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folders(tmp_path_factory.mktemp("stores") / "world")


@pytest.fixture(scope="module")
def local(world: Path) -> Path:
    """The build of the world into a folder."""
    out = world.parent / "local"
    animesion.build(recipe(world), out, workers=1)
    return out


def recipe(path: Path | str, *more: str) -> animesion.config.recipe.Recipe:
    return animesion.load_recipe("folder", [f'source.path="{path}"', *SMALL, *more])


def published(folder: Path) -> dict[str, bytes]:
    """Every file of a finished dataset."""
    names = [line.partition("  ")[2] for line in (folder / "SHA256SUMS").read_text().splitlines()]
    return {name: (folder / name).read_bytes() for name in [*names, "SHA256SUMS"]}


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("data/*.tar")}


def command(world: Path | str, out: str, *options: str) -> list[str]:
    settings = [part for each in [f'source.path="{world}"', "name=folder", *SMALL] for part in ("--set", each)]
    return [sys.executable, "-c", CLI, "build", "folder", *settings, "--workers", "1", "--out", out, *options]


# -- outputs ---------------------------------------------------------------------------------------------------------


def test_a_bucket_has_the_same_files_as_a_folder(world: Path, local: Path, shelf: Shelf, tmp_path: Path) -> None:
    prefix = "sets/small/"
    out = f"s3://{BUCKET}/{prefix}"
    first = animesion.build(recipe(world), out, workers=4, work=tmp_path / "work")
    assert shelf.objects(prefix) == published(local)
    assert (first.url, sorted(first.sent)) == (out.rstrip("/"), sorted(published(local)))
    written = shelf.written(prefix)
    assert set(written.values()) == {1}
    # without differences nothing is sent; damaged files are sent again, with the files that mark a complete dataset
    assert animesion.build(recipe(world), out, work=tmp_path / "work").sent == []
    assert shelf.written(prefix) == written
    content = bytearray(shelf.objects(prefix)["data/val-00000.tar"])
    content[700] ^= 1
    shelf.client.put_object(Bucket=BUCKET, Key=f"{prefix}data/val-00000.tar", Body=bytes(content))
    shelf.client.delete_object(Bucket=BUCKET, Key=f"{prefix}classes.csv")
    repaired = animesion.build(recipe(world), out, work=tmp_path / "work")
    assert repaired.sent == ["SHA256SUMS", "classes.csv", "data/val-00000.tar", "dataset.json"]
    assert shelf.objects(prefix) == published(local)
    # a kill between the two that are sent last leaves one of them
    shelf.client.delete_object(Bucket=BUCKET, Key=f"{prefix}SHA256SUMS")
    assert animesion.build(recipe(world), out, work=tmp_path / "work").sent == ["SHA256SUMS", "dataset.json"]
    assert shelf.objects(prefix) == published(local)
    # another machine has no work folder: everything is built again, and no file that exists is sent
    assert animesion.build(recipe(world), out, workers=1, work=tmp_path / "elsewhere").sent == []
    assert shelf.objects(prefix) == published(local)


def test_another_dataset_is_replaced_only_on_request(world: Path, shelf: Shelf, tmp_path: Path) -> None:
    out = f"s3://{BUCKET}/taken"
    animesion.build(recipe(world), out)  # in the cache folder of the URL
    before = shelf.objects("taken/")
    other = recipe(world, "pack.shard_samples=10", "split.strategy=single")
    for work in (None, tmp_path / "elsewhere"):
        with pytest.raises(UsageError, match="was written by another recipe"):
            animesion.build(other, out, work=work)
        with pytest.raises(UsageError, match="was written by another recipe"):
            preview.preview(other, *runner.places(out, work)[:1], to=out)
    assert not (tmp_path / "elsewhere").exists()
    assert shelf.objects("taken/") == before
    result = animesion.build(other, out, replace=True)
    assert shelf.objects("taken/") == published(result.out)
    assert len(shards(result.out)) < sum(name.endswith(".tar") for name in before)
    # what is no dataset is never touched
    shelf.client.put_object(Bucket=BUCKET, Key="letters/1.txt", Body=b"mine")
    with pytest.raises(UsageError, match="is not empty and holds no dataset"):
        animesion.build(other, f"s3://{BUCKET}/letters", replace=True)
    assert shelf.objects("letters/") == {"1.txt": b"mine"}


def test_a_build_that_stops_before_it_publishes_is_no_dataset(world: Path, shelf: Shelf, tmp_path: Path) -> None:
    out = f"s3://{BUCKET}/until"
    animesion.build(recipe(world), out, work=tmp_path / "work", until="curate")
    assert not shelf.objects("until/")
    packed = animesion.build(recipe(world), out, work=tmp_path / "work", until="pack")
    assert shelf.objects("until/").keys() == {"recipe.toml", *(f"data/{name}" for name in shards(packed.out))}


def killed_builds(world: Path, local: Path, shelf: Shelf, tmp_path: Path, seed: int, kills: int) -> None:
    """Kill builds whose upload has begun at random instants; then let one finish."""
    prefix, rng = f"killed/{seed}/", random.Random(seed)
    line = command(world, f"s3://{BUCKET}/{prefix}", "--work", str(tmp_path / "work"))
    due = published(local)
    for _ in range(kills):
        enough = rng.randrange(len(due) - 1)
        process = subprocess.Popen(line, env=shelf.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(shelf.written(prefix)) <= enough:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        objects = shelf.objects(prefix)
        objects.pop("lease.json", None)
        if "SHA256SUMS" in objects:  # then the dataset is complete
            assert objects == due
        assert objects.items() <= due.items()
    done = subprocess.run([*line, "--json"], env=shelf.env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert shelf.objects(prefix) == due
    sent = shelf.written(prefix)
    assert max(sent[name] for name in due if name.startswith("data/")) == 1, "what had arrived was sent again"
    assert not list((tmp_path / "work").rglob(".tmp-*"))


@pytest.mark.slow
def test_a_build_that_was_killed_while_sending_goes_on(world: Path, local: Path, shelf: Shelf, tmp_path: Path) -> None:
    killed_builds(world, local, shelf, tmp_path, seed=3, kills=1)


# -- two writers -----------------------------------------------------------------------------------------------------


def lease_at(url: str) -> Lease:
    return Lease(*stores.connect(url), url)


@pytest.mark.parametrize("place", ["bucket", "folder"])
def test_one_process_at_a_time_writes_to_a_place(
    world: Path, local: Path, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    url = f"s3://{BUCKET}/leased" if place == "bucket" else f"file://{tmp_path}/leased"
    system, root = stores.connect(url)
    busy = rf"{url} is being written by .+, process {os.getpid()}, seen 0 minutes ago: wait for it"
    with lease_at(url) as first:
        with pytest.raises(BusyError, match=busy):
            animesion.build(recipe(world), url, work=tmp_path / "work", workers=1)
        with pytest.raises(BusyError, match=busy), lease_at(url):
            pass
        assert [name.rpartition("/")[2] for name in system.ls(root, detail=False)] == ["lease.json"]
        first.check()
        # one whose owner was not seen for long is taken, and the owner notices before its next file
        monkeypatch.setattr("animesion.publishing.lease._STALE", -60.0)
        monkeypatch.setattr("animesion.publishing.lease._SETTLED", 0.01)
        with lease_at(url) as second:
            second.check()
            with pytest.raises(BusyError, match="so this process stops: run the same command again later"):
                first.check()
    monkeypatch.undo()
    for name, value in shelf.env.items():
        monkeypatch.setenv(name, value)
    done = animesion.build(recipe(world), url, work=tmp_path / "work", workers=1)
    assert done.sent
    assert not system.exists(f"{root}/lease.json")


def test_what_a_killed_process_leaves_holds_nobody_up(shelf: Shelf) -> None:
    url = f"s3://{BUCKET}/orphan"
    script = (
        "import os, signal; from animesion.publishing.lease import Lease; from animesion.storage import stores\n"
        f"Lease(*stores.connect({url!r}), {url!r}).take(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script], env=shelf.env).returncode == -signal.SIGKILL
    assert shelf.objects("orphan/").keys() == {"lease.json"}
    with lease_at(url):
        pass
    assert not shelf.objects("orphan/")
    for content in (b"", b"[]", b"{" * 5000, b'{"id": 1, "owner": "\x1b[31m", "place": "", "process": 1e400}'):
        shelf.client.put_object(Bucket=BUCKET, Key="orphan/lease.json", Body=content)
        with pytest.raises(BusyError, match="is being written by an unknown process"), lease_at(url):
            pass


@pytest.mark.parametrize("scheme", ["s3", "file", "memory"])
def test_of_many_that_want_a_lease_one_gets_it(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """S3 and folders check conditions; the file system in memory is as a store that checks none."""
    url = {"s3": f"s3://{BUCKET}/race", "file": f"file://{tmp_path}/race", "memory": "memory://race"}[scheme]
    system, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    monkeypatch.setattr("animesion.publishing.lease._SETTLED", 0.3)
    leases = [Lease(system, root, url) for _ in range(6)]

    def take(lease: Lease) -> bool:
        try:
            lease.take()
        except BusyError:
            return False
        return True

    with ThreadPoolExecutor(len(leases)) as pool:
        taken = list(pool.map(take, leases))
    assert taken.count(True) == 1
    for lease in leases:
        lease.release()
    assert not system.exists(f"{root}/lease.json")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 15))
def test_builds_that_were_killed_again_and_again(
    world: Path, local: Path, shelf: Shelf, tmp_path: Path, seed: int
) -> None:
    killed_builds(world, local, shelf, tmp_path, seed, kills=6)


@pytest.mark.slow
def test_workers_engines_and_places_make_no_difference(shelf: Shelf, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (extra ray)")
    small = ["source.posts=300", "classes.minimum=5", "pack.shard_samples=50"]
    chosen = animesion.load_recipe("daf-re", small, sample=True)
    built = []
    for workers in (1, 2, 4):
        animesion.build(chosen, tmp_path / str(workers), workers=workers)
        built.append(published(tmp_path / str(workers)))
    for engine in ("local", "ray"):
        url = f"s3://{BUCKET}/engines/{engine}"
        runner.run(chosen, tmp_path / engine, workers=2, engine=engine, to=url)
        built.append(shelf.objects(f"engines/{engine}/"))
    assert all(each == built[0] for each in built)
    assert sum(name.endswith(".tar") for name in built[0]) > 3


def test_a_folder_by_its_url(world: Path, local: Path, tmp_path: Path) -> None:
    out = f"file://{tmp_path / 'out'}"
    result = animesion.build(recipe(world), out, work=tmp_path / "work")
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == published(local).keys() == set(result.sent)
    assert published(tmp_path / "out") == published(local)
    (tmp_path / "out" / "data" / "train-00000.tar").write_bytes(b"spoiled")
    assert "data/train-00000.tar" in animesion.build(recipe(world), out, work=tmp_path / "work").sent
    assert published(tmp_path / "out") == published(local)


# -- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("s3://no-such-bucket/x", (), "s3://no-such-bucket/x: the bucket does not exist"),
        ("s3://key:word@shelf/x", (), "keys and options are not part of an address"),
        ("s3:///x", (), "has no bucket"),
        ("file://x/y", (), "must be absolute"),
        ("ftp://host/x", (), "is not a destination"),
        ("hf://user/name", (), "`animesion publish FOLDER --to` that URL"),
        ("datasets/x", ("--work", "y"), "--work is only for outputs that are URLs"),
    ],
)
def test_wrong_outputs(
    world: Path, shelf: Shelf, tmp_path: Path, out: str, options: tuple[str, ...], message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from animesion.cli import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(command(world, out, *options)[3:])
    printed = capsys.readouterr().err
    assert left.value.code in (1, 2)
    assert message in printed
    assert printed.count("error:") == 1
    assert SECRET not in printed
    assert "word@" not in printed


def test_denied_access_is_one_sentence(
    world: Path, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import moto.settings
    import s3fs

    shelf.put("closed/", world)
    monkeypatch.setattr(moto.settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0.0)
    for path, out in ((str(world), f"s3://{BUCKET}/denied"), (f"s3://{BUCKET}/closed", str(tmp_path / "out"))):
        with pytest.raises(AnimesionError, match=r"denies access .*: check the credentials") as refused:
            animesion.build(recipe(path), out, workers=1)
        assert SECRET not in str(refused.value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(AnimesionError, match=r"denies access .*: check the credentials"):
        animesion.build(recipe(world), f"s3://{BUCKET}/denied", workers=1)
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_package_that_is_missing_is_named(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.registry import _registry

    monkeypatch.delitem(_registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for path, out in ((str(world), f"s3://{BUCKET}/x"), (f"s3://{BUCKET}/x", str(tmp_path / "out"))):
        with pytest.raises(UsageError, match=r"pip install 'animesion\[cloud\]'"):
            animesion.build(recipe(path), out, workers=1)


# -- inputs ----------------------------------------------------------------------------------------------------------


def test_images_from_a_bucket_are_those_of_the_folder(world: Path, shelf: Shelf, tmp_path: Path) -> None:
    folder = tmp_path / "world"
    shutil.copytree(world, folder)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "a.jpg").write_bytes(b"hidden")
    for name, content in (("empty.jpg", b""), ("large.jpg", bytes(200_001)), ("broken.jpg", b"\xff\xd8\xff")):
        (folder / "crème_brûlée" / name).write_bytes(content)
    shelf.put("in/", folder)
    shelf.client.put_object(Bucket=BUCKET, Key="in/初音ミク/", Body=b"")  # what consoles make of a folder
    shelf.client.put_object(Bucket=BUCKET, Key="input/x/1.jpg", Body=b"of something else")
    built = {}
    for name, path in (("disk", str(folder)), ("bucket", f"s3://{BUCKET}/in"), ("slash", f"s3://{BUCKET}/in/")):
        result = animesion.build(recipe(path, "source.max_bytes=200000"), tmp_path / name, workers=2)
        built[name] = (shards(result.out), (result.out / "curated.parquet").read_bytes(), result.dropped, result.notes)
    assert built["disk"] == built["bucket"] == built["slash"]
    assert built["disk"][2].keys() >= {"empty file", "too many bytes"}


@pytest.mark.parametrize(
    "files",
    [
        ["train/miku/1.png", "valid/rin/2.png", "test/rin/3.png", "README.md"],
        ["set/miku/1.png", "set/rin/more/2.png", ".hack/3.png"],
        ["1.png", "2.png", "metadata.csv"],
    ],
    ids=["splits", "root", "table"],
)
def test_layouts_in_a_bucket_are_those_of_the_folder(files: list[str], shelf: Shelf, tmp_path: Path) -> None:
    for name in files:
        content = b"file_name,label\n1.png,miku\n2.png,rin\n" if name.endswith(".csv") else name.encode()
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    prefix = f"layouts-{tmp_path.name}/"
    shelf.put(prefix, tmp_path / "in")
    listed = []
    for place in (str(tmp_path / "in"), f"s3://{BUCKET}/{prefix}"):
        source = sources.make(animesion.load_recipe("folder", [f"source.path={place}"]))
        items = list(source.items())
        contents = [payload.content for payload in source.read(items)]
        listed.append([(item.key, item.labels, item.split, item.families) for item in items] + contents)
        assert any("2 classes" in note for note in source.notes)
    assert listed[0] == listed[1]


@given(files=trees(), stray=st.sampled_from(["README.md", "LICENSE", ".DS_Store"]))
@limits(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_layout_in_a_bucket_is_that_of_the_folder(files: dict[str, bytes], stray: str, shelf: Shelf) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in {**files, stray: b"stray"}.items():
            Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
            Path(folder, name).write_bytes(content)
        prefix = f"{Path(folder).name}/"
        shelf.put(prefix, Path(folder))
        listed = [
            [(item.key, item.labels, item.split, item.families) for item in sources.make(recipe(place)).items()]
            for place in (folder, f"s3://{BUCKET}/{prefix}")
        ]
    assert listed[0] == listed[1]
    assert all(labels for _, labels, _, _ in listed[0])


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_archives_in_a_bucket(world: Path, shelf: Shelf, tmp_path: Path, kind: str) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "world"), kind, world))
    shelf.client.upload_file(str(archive), BUCKET, f"archives/world.{kind}")
    url = f"s3://{BUCKET}/archives/world.{kind}"
    built = [
        animesion.build(recipe(path), tmp_path / name, workers=1).out
        for name, path in (("disk", archive), ("bucket", url))
    ]
    assert shards(built[0]) == shards(built[1])
    assert shards(built[0])


def test_label_files_and_dumps_name_images_in_a_bucket(world: Path, shelf: Shelf, tmp_path: Path) -> None:
    images = sorted(world.rglob("*.png"))[:12]
    lines, records = [], []
    for number, image in enumerate(images, 1_000_291):
        name = f"{number % 1000:03d}/{number}.png"
        (tmp_path / "faces" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, tmp_path / "faces" / name)
        lines.append(f"{number % 2},0{name}")  # three digits there, four in the file
        tags = [{"name": f"c{number % 2}", "category": "4"}]
        records.append(json.dumps({"id": str(number), "file_ext": "png", "rating": "s", "tags": tags}))
    shelf.put("faces/", tmp_path / "faces")
    (tmp_path / "train.csv").write_text("\n".join([*lines, "0,0999/1999.jpg", "1,../1.jpg"]) + "\n")
    (tmp_path / "posts.json").write_text("\n".join(records) + "\n")
    wanted = {
        "labels": [f"source.labels={tmp_path / 'train.csv'}"],
        "dump": [f"source.metadata={tmp_path / 'posts.json'}", "crop.detector=none", "filter.ratings=[]"],
    }
    for kind, settings in wanted.items():
        settings += [f"source.kind={kind}", "split.strategy=single", "classes.minimum=1"]
        built = []
        for name, root in (("disk", tmp_path / "faces"), ("bucket", f"s3://{BUCKET}/faces")):
            chosen = animesion.load_recipe("daf-re", [*settings, f"source.images={root}"])
            result = animesion.build(chosen, tmp_path / f"{kind}-{name}", workers=1)
            built.append((shards(result.out), result.dropped, result.kept))
        assert built[0] == built[1]
        assert built[0][2] >= 10
    assert built[0][1].keys() <= {"near duplicate", "exact duplicate"}


def test_what_changed_in_the_bucket_is_fetched_again(world: Path, shelf: Shelf, tmp_path: Path) -> None:
    shelf.put("changing/", world)
    chosen, tar = recipe(f"s3://{BUCKET}/changing"), tmp_path / "out" / "raw" / "part-00000.tar"

    def fetched() -> tuple[int, bytes]:
        animesion.build(chosen, tmp_path / "out", workers=1, until="fetch")
        return tar.stat().st_mtime_ns, tar.read_bytes()

    before = fetched()
    assert fetched() == before
    image = sorted(world.rglob("*.jpg"))[0]
    content = image.read_bytes()[:-40] + bytes(40)  # of equal size
    assert content not in before[1]
    key = f"changing/{image.relative_to(world).as_posix()}"
    shelf.client.put_object(Bucket=BUCKET, Key=key, Body=content)
    assert content in fetched()[1]


def test_an_object_that_vanished_is_a_missing_file_and_a_store_that_did_stops_the_build(
    world: Path, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from animesion import sources
    from animesion.sources.stored import StoredPlace

    shelf.put("going/", world)
    source = sources.make(recipe(f"s3://{BUCKET}/going"))
    items = list(source.items())
    gone = json.loads(items[3].locator)["path"]
    shelf.client.delete_object(Bucket=BUCKET, Key=f"going/{gone}")
    payloads = list(source.read(items))
    assert [payload.reason for payload in payloads] == ["missing file" if i == 3 else "" for i in range(len(items))]
    assert payloads[5].content == (world / json.loads(items[5].locator)["path"]).read_bytes()
    place = StoredPlace(f"s3://{BUCKET}/going")

    def fails(*_: object, **__: object) -> list[Exception]:
        return [OSError("the connection was reset")] * len(items)

    monkeypatch.setattr(place._fs, "cat_ranges", fails)
    with pytest.raises(AnimesionError, match=r"the connection was reset.*it resumes"):
        next(place.contents([(gone, 10)], 100))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (f"s3://{BUCKET}/nothing/here", "s3://shelf/nothing/here not found"),
        ("s3://no-such-bucket", "s3://no-such-bucket not found"),
        (f"s3://{BUCKET}/nothing/", "contains no files"),
        ("s3://key:word@shelf/x", "keys and options are not part of an address"),
        ("https://example.org/images", "is not a supported store"),
    ],
)
def test_wrong_inputs(shelf: Shelf, tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        animesion.build(recipe(path), tmp_path / "out", workers=1)
    assert "word@" not in str(refused.value)


def test_keys_in_an_input_are_written_nowhere(shelf: Shelf, tmp_path: Path) -> None:
    for kind, option in (("folder", "path"), ("labels", "images"), ("dump", "images"), ("moeimouto", "path")):
        settings = [f"source.kind={kind}", f"source.{option}=s3://key:word@{BUCKET}/x"]
        settings += [f"source.{name}=x" for name in {"labels": ["labels"], "dump": ["metadata"]}.get(kind, [])]
        chosen = animesion.load_recipe("moeimouto", settings)
        with pytest.raises(UsageError, match="keys and options are not part of an address") as refused:
            animesion.build(chosen, f"s3://{BUCKET}/leaks", work=tmp_path / "work")
        assert "word@" not in str(refused.value)
        assert not (tmp_path / "work").exists()
    assert not shelf.objects("leaks/")


# -- datasets behind URLs -------------------------------------------------------------------------------------------


def animesion_cli(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    from animesion.cli import main

    with pytest.raises(SystemExit) as left:
        main(arguments)
    printed = capsys.readouterr()
    return int(left.value.code or 0), printed.out, printed.err


def test_a_dataset_in_a_bucket_is_looked_into(local: Path, shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"s3://{BUCKET}/look"
    for name in published(local):
        shelf.client.upload_file(str(local / name), BUCKET, f"look/{name}")
    for command in ("stats", "card"):
        from_folder, from_url = (
            animesion_cli([command, place], capsys)[1].splitlines()[1:] for place in (str(local), url)
        )
        assert from_folder == from_url
    assert animesion_cli(["diff", str(local), url], capsys)[0] == 0
    [copy] = Path(shelf.env["XDG_CACHE_HOME"]).glob("animesion/datasets/*")
    assert not list(copy.glob("data/*.tar"))
    assert animesion_cli(["verify", url, "--workers", "1"], capsys)[0] == 0
    assert shards(copy) == shards(local)
    # damage behind the URL is found, and intact files are not fetched again
    times = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    spoiled = bytearray((local / "data" / "val-00000.tar").read_bytes())
    spoiled[700] ^= 1
    changes = {"data/val-00000.tar": bytes(spoiled), "data/extra.tar": b"x"}
    for name, content in changes.items():
        shelf.client.put_object(Bucket=BUCKET, Key=f"look/{name}", Body=content)
    shelf.client.delete_object(Bucket=BUCKET, Key="look/data/test-00000.tar")
    status, printed, _ = animesion_cli(["verify", url, "--workers", "1"], capsys)
    assert status == 1
    for fault in (
        "data/val-00000.tar does not have the SHA-256 in SHA256SUMS",
        "data/test-00000.tar is listed in SHA256SUMS but missing",
        "data/extra.tar is not a shard of dataset.json",
    ):
        assert fault in printed
    same = [path for path, time in times.items() if path.exists() and path.stat().st_mtime_ns == time]
    changed = {"SHA256SUMS", "val-00000.tar", "val-00000.tar.json", "test-00000.tar"}
    assert {path.name for path in times if path not in same} == changed


def test_what_is_no_dataset_in_a_bucket(shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shelf.client.put_object(Bucket=BUCKET, Key="odd/SHA256SUMS", Body=b"0" * 64 + b"  ../../out\n" + b"1" * 64 + b"  x")
    for command in (["verify"], ["stats"], ["card"], ["diff", "."]):
        status, _, printed = animesion_cli([*command, f"s3://{BUCKET}/nothing"], capsys)
        assert (status, printed.count("error:")) == (2, 1)
        assert command[0] == "diff" or "has no finished dataset" in printed
        status, _, printed = animesion_cli([*command, f"s3://{BUCKET}/odd"], capsys)
        assert (status, printed.count("error:")) == (2, 1)
    assert not (Path(shelf.env["XDG_CACHE_HOME"]) / "animesion" / "out").exists()
