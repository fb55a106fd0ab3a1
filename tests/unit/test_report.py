"""Reports: facts, thumbnails within a budget, escaped text, training runs."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st
from PIL import Image

import animesion
from animesion.cli import main
from animesion.dataset.places import Places
from animesion.errors import UsageError
from animesion.report import facts, page, runs
from animesion.report.images import COLUMNS, Album, Images, Rows
from animesion.schemas import CURATED
from tests.conftest import draw_folders


def embedded(text: str) -> dict[str, Any]:
    """The data of a page, as a browser reads them."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


# -- the page --------------------------------------------------------------------------------------------------------


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.text() | st.sampled_from(["</script>", "<!--<script>", "]]>", "\u2028", "\u202e", "🦊" * 3000]))
def test_any_text_comes_back_and_cannot_end_its_place(name: str) -> None:
    text = page.render({"kind": "run", "name": name, "title": name})
    data = embedded(text)
    assert data["name"] == name.encode("utf-8", "replace").decode()
    body = text[text.index('id="data">') : text.index("</script>", text.index('id="data">'))]
    assert not set("<&\u2028\u2029") & set(body)
    assert text.count("<script") == 1 + len(re.findall(r"<script>", text))
    title = re.search(r"<title>(.*?): report</title>", text, re.DOTALL)
    assert title is not None
    assert "<" not in title[1]


def test_the_policy_allows_these_scripts_and_nothing_else() -> None:
    text = page.render({"kind": "run", "name": "x"})
    meta = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert meta is not None
    policy = dict(part.strip().partition(" ")[::2] for part in html.unescape(meta[1]).split(";"))
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in scripts]
    assert policy["script-src"].split() == [f"'sha256-{digest}'" for digest in digests]
    assert (policy["default-src"], policy["img-src"], policy["base-uri"]) == ("'none'", "data:", "'none'")
    assert "connect-src" not in policy
    outside = re.findall(r"""(?:src|href)=["'](?!data:|#)([^"'$]+)["']""", text)
    assert outside == []


# -- facts -----------------------------------------------------------------------------------------------------------


def test_facts_agree_with_the_dataset(small_dataset: Path) -> None:
    dataset = animesion.open_dataset(small_dataset)
    found = facts.of_dataset(dataset)
    assert found["kept"] == len(dataset)
    assert found["seen"] == found["kept"] + sum(each["count"] for each in found["drops"])
    assert found["classes"]["names"] == [info.name for info in dataset.classes]
    for split in dataset.splits.values():
        assert sum(found["classes"]["counts"][split.name]) == split.samples
    counted = {histogram["title"]: sum(histogram["kept"]) for histogram in found["histograms"]}
    jpegs = sum(row["extension"] == "jpg" for row in pq.read_table(small_dataset / "curated.parquet").to_pylist())
    measured = [title for title in counted if "JPEG" not in title]
    assert len(measured) >= 10
    assert all(counted[title] == found["kept"] for title in measured)
    assert 0 < counted["JPEG quality, 1 to 100"] <= jpegs < found["kept"]
    assert all(len(each["edges"]) == len(each["kept"]) + 1 for each in found["histograms"])
    shown = [item["key"] for samples in found["classes"]["samples"] for item in samples]
    assert len(shown) == len(set(shown))
    assert {len(samples) for samples in found["classes"]["samples"]} == {
        min(info.total, facts.CLASS_SAMPLES) for info in dataset.classes
    }
    for image in found["images"]:
        assert base64.b64decode(image)[8:12] == b"WEBP"


def test_the_report_of_a_build_is_listed_and_the_same_again(small_dataset: Path, tmp_path: Path) -> None:
    listed = dict(line.split("  ")[::-1] for line in (small_dataset / "SHA256SUMS").read_text().splitlines())
    whole = (small_dataset / "report.html").read_bytes()
    assert listed["report.html"] == hashlib.sha256(whole).hexdigest()
    with pytest.raises(SystemExit) as ended:
        main(["report", str(small_dataset), "--out", str(tmp_path / "again.html")])
    assert ended.value.code == 0
    assert (tmp_path / "again.html").read_bytes() == whole


def test_two_builds_with_other_workers_have_the_same_report(tmp_path: Path) -> None:
    source = draw_folders(tmp_path / "world")
    shutil.copy(next(source.rglob("*.jpg")), source / "plain (blue) & co" / "copy.jpg")
    for workers in (1, 2):
        recipe = animesion.load_recipe("folder", [f'source.path="{source}"'])
        animesion.build(recipe, tmp_path / str(workers), workers=workers)
    one, two = ((tmp_path / str(workers) / "report.html").read_bytes() for workers in (1, 2))
    assert one == two
    data = embedded(one.decode())
    [cluster] = data["clusters"]["items"]
    kept = [member["kept"] for member in cluster["members"]]
    assert kept == sorted(kept, reverse=True)
    assert all(member["image"] >= 0 for member in cluster["members"])  # the dropped one is shown from raw/


@pytest.mark.parametrize("budget", [20_000, 9_000, 300, 10])
def test_every_class_has_an_image_however_small_the_budget(
    small_dataset: Path, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "SAMPLE_BYTES", budget)
    found = facts.of_dataset(animesion.open_dataset(small_dataset))
    images, samples = found["images"], found["classes"]["samples"]
    shown = [[base64.b64decode(images[item["image"]]) for item in each] for each in samples]
    assert all(shown)
    used = sum(len(image) for each in shown for image in each)
    least = len(shown) * 200  # an image of 16 px, which a class has in any case
    assert used <= max(budget, least)
    sides = {max(Image.open(io.BytesIO(image)).size) for each in shown for image in each}
    assert max(sides) == 16 if budget <= 300 else max(sides) > 24


def test_rows_are_found_by_their_key_in_any_order(small_dataset: Path) -> None:
    images = Images(animesion.open_dataset(small_dataset))
    keys = [row["key"] for row in images.rows]
    assert [images.places.get(key) for key in keys] == list(range(len(keys)))
    shuffled = Places(pa.array(keys[::-1]))
    assert [shuffled[key] for key in keys] == list(range(len(keys)))[::-1]
    for absent in ("", "a", keys[0] + "0", "zzz", "\U0010ffff"):
        assert images.places.get(absent) is None
        assert shuffled.get(absent) is None


def test_nulls_of_a_table_are_empty_values() -> None:
    columns = {name: pa.nulls(2, CURATED.field(name).type) for name in COLUMNS}
    rows = Rows(pa.table(columns))
    assert len(rows) == 2
    assert rows[1] == {
        name: [0, 0, 0, 0] if name == "crop" else False if name == "kept" else "" if kind == pa.string() else 0
        for name, kind in ((name, CURATED.field(name).type) for name in COLUMNS)
    }
    assert not rows.equal("reason", "near duplicate").any()
    assert rows.equal("reason", "").all()


def test_a_dataset_without_its_originals_still_has_a_report(small_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "published"
    shutil.copytree(small_dataset, out, ignore=shutil.ignore_patterns("raw", "features", "pack", ".receipts"))
    found = facts.of_dataset(animesion.open_dataset(out))
    assert found["images"]
    (out / "curated.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UsageError, match=r"curated\.parquet"):
        facts.of_dataset(animesion.open_dataset(out))


def test_originals_of_another_build_are_not_shown(small_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "swapped"
    shutil.copytree(small_dataset, out)
    images = Images(animesion.open_dataset(out))
    row = {**images.rows[0], "kept": False, "reason": "near duplicate"}
    assert images.thumbnail(row) is not None
    tar = out / "raw" / "part-00000.tar"
    content = bytearray(tar.read_bytes())
    content[row["offset"] + 40] ^= 255
    tar.write_bytes(content)
    assert images.thumbnail(row) is None
    assert images.thumbnail({**row, "part": -1}) is None
    assert images.thumbnail({**row, "bytes": 2**62}) is None


@hypothesis.given(st.lists(st.binary(max_size=40), max_size=30), st.integers(0, 300))
def test_an_album_stays_under_its_budget(contents: list[bytes], until: int) -> None:
    album = Album()
    places = [album.add(content, until) for content in contents]
    assert album.used == sum(len(base64.b64decode(image)) for image in album.images) <= until
    for content, place in zip(contents, places, strict=True):
        assert place == -2 or base64.b64decode(album.images[place]) == content


def test_findings_of_an_audit_are_shown(small_dataset: Path, tmp_path: Path) -> None:
    finding = {"key": "k", "split": "train", "label": "<b>", "kind": "outlier", "suggested": "", "nearest": "n"}
    (tmp_path / "audit.json").write_text(json.dumps({"model": "m", "findings": [{**finding, "score": 0.5}]}))
    found = facts.of_dataset(animesion.open_dataset(small_dataset), tmp_path / "audit.json")
    assert found["audit"]["items"] == [{**finding, "score": 0.5}]
    for text in ("{}", "[]", "no", '{"findings": [1]}', '{"findings": [{}]}'):
        (tmp_path / "audit.json").write_text(text)
        with pytest.raises(UsageError, match=r"audit\.json"):
            facts.of_dataset(animesion.open_dataset(small_dataset), tmp_path / "audit.json")


# -- runs ------------------------------------------------------------------------------------------------------------


def make_run(folder: Path) -> Path:
    (folder / "report").mkdir(parents=True)
    lines = [{"kind": "step", "step": i, "epoch": 1, "loss": 1 / i} for i in range(1, 6001)]
    lines.append({"kind": "epoch", "step": 6000, "epoch": 1, "val_top_1": 0.5})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"kind": "step", "st')
    (folder / "recipe.toml").write_text('name = "x"\n')
    evaluation = {"samples": 9, "k": 5, "top_1": 0.5, "top_1_interval": {"low": 0.4, "high": 0.6}, "bands": None}
    (folder / "report" / "evaluation.json").write_text(json.dumps({**evaluation, "top_5": float("nan")}))
    header = "class_id,name,train_images,test_images,accuracy,f1,confused_with,confused_with_name,confusions\n"
    rows = '0,"=cmd,</script>",5,3,0.333333,0.4,1,b,2\n1,b,,0,,,,,0\nx,y\n'
    (folder / "report" / "per_class.csv").write_text(header + rows)
    pair = "0,</script><b>,1,b,3,0.5,0.1\n"
    names = "true_id,true_name,predicted_id,predicted_name,images,share_of_class,share_of_errors\n"
    (folder / "report" / "confusions.csv").write_text(names + pair)
    mistake = 'key,true_id,true_name,predicted_id,predicted_name,confidence\n"\u202ek",0,<i>,1,b,0.9\n'
    (folder / "report" / "mistakes.csv").write_text(mistake, encoding="utf-8")
    return folder


def test_a_run_is_read_as_it_was_left(tmp_path: Path) -> None:
    found = runs.of_run(make_run(tmp_path / "run"))
    assert len(found["steps"]) == runs.MOST_STEPS
    assert [line["step"] for line in found["epochs"]] == [6000]
    assert (found["evaluation"]["top_1"], found["evaluation"]["top_5"]) == (0.5, None)
    assert [(each["name"], each["accuracy"], each["train_images"]) for each in found["classes"]] == [
        ("=cmd,</script>", 0.333333, 5),
        ("b", None, None),
    ]
    assert [each["images"] for each in found["confusions"]] == [3]
    assert [each["key"] for each in found["mistakes"]] == ["\u202ek"]
    assert embedded(page.render(found))["classes"] == found["classes"]


@hypothesis.settings(
    max_examples=40, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(
    name=st.sampled_from(["metrics.jsonl", "report/evaluation.json", "report/per_class.csv", "report/mistakes.csv"]),
    content=st.binary(),
)
def test_a_damaged_run_is_shown_as_far_as_it_goes(name: str, content: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    make_run(folder)
    (folder / name).write_bytes(content)
    page.render(runs.of_run(folder))


@pytest.mark.parametrize(
    "text", ["[]", "null", "[" * 100_000, '{"bands": 3, "calibration": [], "top_1_interval": 1}', '{"top_1": 1e999}']
)
def test_a_strange_evaluation_is_no_crash(text: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "report" / "evaluation.json").write_text(text)
    page.render(runs.of_run(folder))


def test_what_is_neither_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for arguments in (["report", str(tmp_path / "empty")], ["browse", str(tmp_path / "empty")]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith("error: ")
