"""Every reader of files from outside, on damaged ones: a result, or an error that is meant for the user."""

from __future__ import annotations

import io
import json
import socket
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st
from PIL import Image

import animesion
from animesion import sources
from animesion.config import decisions
from animesion.dataset import label_files, shards
from animesion.errors import UsageError
from animesion.images import codec
from animesion.schemas import CURATED, INDEX
from animesion.storage import checksums, parquet, receipts
from animesion_scrapers import ScraperError
from animesion_scrapers.http.addresses import Routes, is_public
from animesion_scrapers.http.robots import parse
from animesion_scrapers.url_tables import UrlTables
from tests.conftest import draw
from tests.fuzz import changed, damaged, fuzz

IMAGES = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")


def encoded(kind: str, side: int = 24, **options: Any) -> bytes:
    out = io.BytesIO()
    draw(3, side).save(out, kind, **options)
    return out.getvalue()


def test_images() -> None:
    wholes = [encoded(kind) for kind in IMAGES]
    wholes += [encoded("TIFF", compression="tiff_lzw"), encoded("JPEG", progressive=True)]
    wholes.append(encoded("PNG", exif=Image.Exif().tobytes()))

    def check(content: bytes) -> None:
        try:
            found = codec.decode(content, codec.Limits(1000, 100_000))
        except codec.RejectedImageError as error:
            assert "\n" not in error.detail
            return
        assert found.image.mode == "RGB"
        assert found.image.width * found.image.height <= 100_000

    fuzz("images", damaged(wholes), check, 300)


def archives() -> tuple[bytes, bytes]:
    """A tar and a zip with the same images in two class folders."""
    tar_bytes, zip_bytes = io.BytesIO(), io.BytesIO()
    with (
        tarfile.open(fileobj=tar_bytes, mode="w", format=tarfile.PAX_FORMAT) as tar,
        zipfile.ZipFile(zip_bytes, "w") as zipped,
    ):
        for name in ("a/1.png", "a/2.png", "b/3.png", f"b/{'long' * 30}.png", "b/\u3042.png"):
            info = tarfile.TarInfo(name)
            info.size = len(content := encoded("PNG", 8))
            tar.addfile(info, io.BytesIO(content))
            zipped.writestr(name, content)
    return tar_bytes.getvalue(), zip_bytes.getvalue()


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_archives(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"images.{kind}"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        source = sources.make(animesion.load_recipe("folder", [f"source.path={path}"]))
        try:
            with source.session():
                items = list(source.items())
                payloads = list(source.read([item for item in items if not item.failure]))
        except UsageError as error:
            assert str(path) in str(error)
            return
        assert len(payloads) == sum(not item.failure for item in items)

    fuzz(kind, damaged([archives()[kind == "zip"]]), check, 60)


def test_shards(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.tar"
    fields = {"jpg": encoded("JPEG", 8), "cls": b"0", "json": b"{}"}

    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            for member in shards.members(path):
                assert member.offset + member.size <= len(content)
        except shards.ShardError:
            pass

    fuzz("shards", damaged([shards.sample("a", fields) + shards.sample("b", fields) + shards.END]), check)


def test_receipts(small_dataset: Path) -> None:
    units = ("plan", "fetch/part-00000", "curate", "shards/train-00000", "index", "finalize")
    known = {unit: json.loads((small_dataset / ".receipts" / f"{unit}.json").read_bytes()) for unit in units}

    def check(given: tuple[str, bytes]) -> None:
        unit, content = given
        receipt = receipts.parse(unit, content)
        for name in receipt.outputs if receipt else ():
            assert not name.startswith(("/", "."))
            assert ".." not in name.split("/")

    texts = st.one_of(
        *(
            st.tuples(st.just(unit), changed(content).map(lambda c: json.dumps(c).encode()))
            for unit, content in known.items()
        ),
        *(st.tuples(st.just(unit), damaged([json.dumps(content).encode()])) for unit, content in known.items()),
    )
    fuzz("receipts", texts, check)


def test_dataset_json(small_dataset: Path, tmp_path: Path) -> None:
    facts = json.loads((small_dataset / "dataset.json").read_bytes())

    def check(content: bytes) -> None:
        (tmp_path / "dataset.json").write_bytes(content)
        try:
            dataset = animesion.open_dataset(tmp_path)
        except UsageError as error:
            assert "dataset.json" in str(error)
            return
        assert all(shard.path.startswith("data/") for split in dataset.splits.values() for shard in split.shards)
        assert len(dataset.classes) == len({info.name for info in dataset.classes})
        assert 0 <= len(dataset) < 2**66

    texts = changed(facts).map(lambda changes: json.dumps(changes).encode())
    fuzz("dataset-json", st.one_of(texts, damaged([json.dumps(facts).encode()])), check)


@pytest.mark.parametrize(("name", "schema"), [("index.parquet", INDEX), ("curated.parquet", CURATED)])
def test_tables(small_dataset: Path, tmp_path: Path, name: str, schema: Any) -> None:
    pq.write_table(pq.read_table(small_dataset / name).slice(0, 3), tmp_path / "small.parquet")

    def check(content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        try:
            table = parquet.read(tmp_path / name, schema)
        except parquet.DamagedTableError:
            return
        assert table.schema.names == schema.names

    fuzz(name, damaged([(tmp_path / "small.parquet").read_bytes()]), check, 60)


def test_checksums(tmp_path: Path) -> None:
    whole = checksums.render(dict.fromkeys(("data/train-00000.tar", "README.md", "plots/x.png"), "0" * 64))

    def check(content: bytes) -> None:
        (tmp_path / checksums.CHECKSUMS).write_bytes(content)
        try:
            digests = checksums.read(tmp_path)
        except UsageError:
            return
        assert all((tmp_path / name).resolve().is_relative_to(tmp_path.resolve()) for name in digests)

    fuzz("checksums", damaged([whole.encode()]), check)


def test_robots() -> None:
    whole = (
        b"User-agent: *\nDisallow: /a*b$\nAllow: /a/%7Ec\nCrawl-delay: 2\n\nUser-agent: animesion\nUser-agent: x\n"
        b"Disallow: /private/\nAllow: /private/*.jpg$\nSitemap: https://x/\n"
    )

    def check(given: tuple[bytes, str]) -> None:
        content, path = given
        rules = parse(content, "animesion")
        assert rules.allows(path) is rules.allows(path)
        assert rules.allows("/robots.txt")
        assert 0 <= rules.delay <= 60

    fuzz("robots", st.tuples(damaged([whole]), st.text(max_size=30).map("/".__add__)), check, 300)


def test_label_tables(tmp_path: Path) -> None:
    names = {
        "train.csv": b"class_id,dir\n0,a/1.png\n1,b/2.png\n",
        "classid_classname.csv": b"0,a\n1,b\n",
        "classes.csv": b"class_id,name,train,val,total\n0,a,1,2,3\n1,'=b,0,0,0\n",
    }
    readers = {
        "train.csv": label_files.read_labels,
        "classid_classname.csv": label_files.read_class_names,
        "classes.csv": label_files.read_class_counts,
    }

    def check(given: tuple[str, bytes]) -> None:
        name, content = given
        (tmp_path / name).write_bytes(content)
        try:
            readers[name](tmp_path / name)
        except UsageError as error:
            assert "\n" not in str(error)

    pairs = st.one_of(*(st.tuples(st.just(name), damaged([content])) for name, content in names.items()))
    fuzz("label-tables", pairs, check)


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "txt", "parquet"])
def test_url_tables(tmp_path: Path, kind: str) -> None:
    rows = [{"url": f"https://example.org/{number}.jpg", "label": "a|b", "md5": "0" * 32} for number in range(3)]
    if kind == "parquet":
        import pyarrow as pa

        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "whole.parquet")
        whole = (tmp_path / "whole.parquet").read_bytes()
    elif kind == "json":
        whole = json.dumps(rows).encode()
    elif kind == "jsonl":
        whole = "\n".join(map(json.dumps, rows)).encode()
    else:
        between = {"csv": ",", "tsv": "\t", "txt": ","}[kind]
        whole = "\n".join([between.join(rows[0]), *(between.join(row.values()) for row in rows)]).encode()
    path = tmp_path / f"urls.{kind}"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            for batch in UrlTables(path).batches():
                assert all(isinstance(row.url, str) for row in batch)
        except ScraperError as error:
            assert str(error)

    fuzz("url-tables", damaged([whole]), check, 60)


def test_hosts() -> None:
    numbers = st.sampled_from(
        ["127", "0", "0177", "0x7f", "1", "2130706433", "10", "169", "254", "192", "168", "08", "256"]
    )
    dotted = st.lists(numbers, min_size=1, max_size=5).map(".".join)
    ipv6 = st.builds(
        "{}{}{}".format,
        st.sampled_from(["::", "::ffff:", "64:ff9b::", "2002:7f00:1::", "fe80::"]),
        dotted,
        st.sampled_from(["", "%lo", "%25eth0"]),
    )
    plain = st.sampled_from(["example.org", "8.8.8.8", "2606:4700::1111", "xn--mgbh0fb.example", "a_b.example"])

    def check(host: str) -> None:
        try:
            Routes().check("http", host, 80)
        except ScraperError:
            return
        # what passes is a public address, or a name that the system does not read as an address
        try:
            socket.inet_aton(host)
        except (OSError, ValueError):
            return
        assert is_public(host) or any(letter.isspace() for letter in host)  # a URL has no space in its host

    fuzz("hosts", st.one_of(dotted, ipv6, plain, st.text(max_size=12)), check, 300)


def test_decisions(tmp_path: Path) -> None:
    whole = b'exclude = ["a", "b"]\nsame = [["c", "d"], ["d", "e"]]\ndifferent = [["f", "c"]]\n\n[label]\ng = "name"\n'
    path = tmp_path / "decisions.toml"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            found = decisions.read(path)
        except UsageError as error:
            assert str(path) in str(error)
            return
        path.write_text(found.to_toml(), encoding="utf-8")
        assert decisions.read(path).to_toml() == found.to_toml()

    fuzz("decisions", damaged([whole]), check)


def test_weights_files(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("timm")
    from safetensors.torch import save

    from animesion_training import create_model, load_model, save_model

    path = tmp_path / "model.safetensors"
    small: dict[str, Any] = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    save_model(create_model("vit_tiny_patch16", 3, 32, **small), path, ["a", "b", "c"])
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    card = json.loads(json.loads(whole[8 : 8 + length])["__metadata__"]["animesion"])
    weights = dict(load_model(path)[0].state_dict())

    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            model, found = load_model(path)
        except UsageError as error:
            assert str(path) in str(error)
            return
        assert all(value.isfinite().all() for value in model.state_dict().values())
        assert len(found.classes) in (0, found.num_classes)

    cards = changed(card).map(lambda changes: save(weights, {"animesion": json.dumps(changes)}))
    fuzz("weights", st.one_of(cards, damaged([whole])), check, 12)
