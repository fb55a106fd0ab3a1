"""The report in a real browser: search, clusters, hostile names, decisions and the build that applies them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import animesion
from animesion.report import facts, live, page, runs
from tests.conftest import draw
from tests.serving import served

playwright = pytest.importorskip("playwright.sync_api", reason="needs the playwright package")

EVIL = {
    "<script>window.ran=1</script>": 8,
    "</script><img src=x onerror=window.ran=2>": 8,
    "\u202egnp.drow\u202c &lt;b&gt; 🦊": 8,
    "long " + "n" * 200: 8,
    "初音ミク": 20,
}


@pytest.fixture(scope="module")  # no longer: it runs an event loop, and other tests start their own
def chromium() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as engine:
        try:
            browser = engine.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium to start: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Names that attack the page, a pair of near duplicates, one under two labels, one broken image."""
    root = tmp_path_factory.mktemp("evil") / "images"
    seed = 100
    for place, count in enumerate(EVIL.values()):
        folder = root / f"class{place}"
        folder.mkdir(parents=True)
        for i in range(count):
            draw(seed).save(folder / f"{i}.png")
            seed += 1
    folder = root / "class4"
    shutil.copy(folder / "0.png", folder / "same.png")
    draw(seed - 1).save(folder / "near.jpg", quality=80)
    draw(seed - 2).save(root / "class3" / "conflict.png")
    (folder / "broken.png").write_bytes((folder / "1.png").read_bytes()[:200])
    out = tmp_path_factory.mktemp("built") / "evil"
    recipe = animesion.load_recipe("folder", [f'source.path="{root}"'])
    label = recipe.label.model_copy(update={"rename": {f"class{i}": name for i, name in enumerate(EVIL)}})
    animesion.build(recipe.model_copy(update={"label": label}), out, workers=1)
    return out


@contextmanager
def opened(chromium: Any, url: str, **options: Any) -> Iterator[Any]:
    """Open a page; fail on errors, on requests to the network and on scripts that are not its own."""
    messages: list[str] = []
    asked: list[str] = []
    view = chromium.new_page(**options)
    view.on("pageerror", lambda error: messages.append(str(error)))
    view.on("console", lambda message: messages.append(message.text) if message.type in ("error", "warning") else None)
    view.on("request", lambda request: asked.append(request.url))
    try:
        view.goto(url)
        view.wait_for_selector("h1")
        yield view
        assert view.evaluate("window.ran") is None
        assert messages == []
        origin = url.partition("#")[0]
        foreign = [each for each in asked if not each.startswith((origin, "data:"))]
        assert foreign == []
    finally:
        view.close()


def test_hostile_names_stay_text(chromium: Any, build: Path) -> None:
    with opened(chromium, (build / "report.html").as_uri()) as view:
        view.click("text=Classes")
        view.wait_for_selector(".list .row")
        shown = view.locator(".list .row .name").all_inner_texts()
        assert "<script>window.ran=1</script>" in shown
        assert "[U+202E]gnp.drow[U+202C] &lt;b&gt; 🦊" in shown
        assert view.locator("img[src='x']").count() == 0
        for tab in ("Clusters", "Copies", "Alternates", "Dropped", "Overview"):
            view.click(f".tabs >> text={tab}")
            assert view.locator("[role=alert]").count() == 0


def test_search_sort_and_keys(chromium: Any, build: Path) -> None:
    with opened(chromium, (build / "report.html").as_uri() + "#classes") as view:
        view.keyboard.press("/")
        view.keyboard.type("ミク")
        assert view.locator(".list .row").count() == 1
        view.fill("input[type=search]", "")
        view.click(".head >> text=class")
        names = view.locator(".list .row .name").all_inner_texts()
        escaped = {"\u202e": "[U+202E]", "\u202c": "[U+202C]"}
        assert names == ["".join(escaped.get(c, c) for c in name) for name in sorted(EVIL)]
        view.focus(".list")
        view.keyboard.press("End")
        view.keyboard.press("Enter")
        assert view.locator(".detail h2").inner_text() == names[-1]
        playwright.expect(view.locator(".cards img")).to_have_count(facts.CLASS_SAMPLES)
        for image in view.locator(".cards img").all():
            image.scroll_into_view_if_needed()
            assert image.evaluate("(each) => each.decode().then(() => each.naturalWidth)") > 0


def test_clusters_show_keeper_and_reason(chromium: Any, build: Path) -> None:
    with opened(chromium, (build / "report.html").as_uri() + "#clusters") as view:
        view.wait_for_selector("[data-cluster]")
        text = view.inner_text("main")
        for words in ("exact duplicate", "label conflict", "several labels", "kept: "):
            assert words in text
        view.check("text=only clusters with several labels")
        playwright.expect(view.locator("[data-cluster]")).to_have_count(1)


def test_pairs_show_both_images_and_both_labels(chromium: Any, build: Path) -> None:
    with opened(chromium, (build / "report.html").as_uri() + "#copies") as view:
        playwright.expect(view.locator(".pair")).to_have_count(1)  # the first kind that has pairs: label conflicts
        text = view.inner_text(".pair")
        assert "two labels" in text
        assert "equal bytes" in text
        assert view.locator(".pair .side strong").count() == 2
        strip = view.locator(".pair .strip")
        assert strip.evaluate("(each) => each.decode().then(() => each.naturalWidth > 2.5 * each.naturalHeight)")
        view.evaluate("location.hash = 'copies/copy'")
        view.wait_for_selector(".pair .verdict:has-text('copy')")


def test_pages_of_clusters(chromium: Any, build: Path, tmp_path: Path) -> None:
    data = facts.of_dataset(animesion.open_dataset(build))
    model = data["clusters"]["items"][0]
    data["clusters"] = {"total": 45, "conflicts": 0, "items": [model | {"name": f"cluster-{i:02d}"} for i in range(45)]}
    (tmp_path / "pages.html").write_text(page.render(data), encoding="utf-8")
    with opened(chromium, (tmp_path / "pages.html").as_uri() + "#clusters") as view:
        seen = []
        for shown in (20, 20, 5):
            playwright.expect(view.locator("[data-cluster]")).to_have_count(shown)
            seen += view.locator("[data-cluster]").evaluate_all("(all) => all.map((each) => each.dataset.cluster)")
            following = view.locator(".pager >> text=Next")
            if following.is_enabled():
                following.click()
                view.wait_for_selector(f"[data-cluster='cluster-{len(seen):02d}']")
        assert seen == [f"cluster-{i:02d}" for i in range(45)]
        assert not view.locator(".pager >> text=Next").is_enabled()
        view.locator(".pager >> text=Previous").click()
        view.wait_for_selector("[data-cluster='cluster-20']")


def test_a_phone_has_no_sideways_scroll(chromium: Any, build: Path) -> None:
    size = {"width": 360, "height": 740}
    with opened(chromium, (build / "report.html").as_uri(), viewport=size, color_scheme="dark") as view:
        assert view.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
        for tab in ("overview", "classes", "classes/0", "clusters", "copies/copy", "alternates", "dropped"):
            view.evaluate(f"location.hash = '{tab}'")
            view.wait_for_timeout(50)
            assert view.evaluate("document.documentElement.scrollWidth") <= 360, tab


def test_a_class_map_of_thousands_draws_only_what_is_seen(chromium: Any, build: Path, tmp_path: Path) -> None:
    data = facts.of_dataset(animesion.open_dataset(build))
    names = [f"class {i:04d}" for i in range(3263)]
    data["classes"] = {"names": names, "counts": {s["name"]: [3] * 3263 for s in data["splits"]}, "samples": []}
    (tmp_path / "many.html").write_text(page.render(data), encoding="utf-8")
    with opened(chromium, (tmp_path / "many.html").as_uri() + "#classes") as view:
        assert 0 < view.locator(".list .row").count() < 100
        view.focus(".list")
        view.keyboard.press("Home")
        view.keyboard.press("End")
        view.wait_for_selector("text=class 3262")


def test_what_is_decided_in_the_browser_is_what_the_next_build_does(chromium: Any, build: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(build, out)
    dataset = animesion.open_dataset(out)
    rows = {row["key"]: row for row in dataset.curated.to_pylist()}
    label = next(info.id for info in dataset.classes if info.name == "初音ミク")
    first, second = sorted(key for key, row in rows.items() if row["class_id"] == label)[:2]
    near = next(row for row in rows.values() if row["reason"] == "near duplicate")
    one, other = sorted(key for key, row in rows.items() if row["class_id"] not in (-1, label))[:2]
    with served(live.application(live.Browser(dataset, out / "decisions.toml"), "secret-token")) as port:
        url = f"http://127.0.0.1:{port}/"
        with opened(chromium, url + "#token=secret-token") as view:
            assert view.url.endswith("#overview")  # the token leaves the address bar
            view.evaluate(f"location.hash = 'classes/{label}'")
            view.click(f"[data-key='{first}'] .frame")
            view.wait_for_selector("text=1 selected")
            view.keyboard.press("x")
            view.wait_for_selector(f"[data-key='{first}'] .badge:has-text('excluded')")
            view.click(f"[data-key='{second}'] .frame")
            view.fill(".actions input", "rin & <len>")
            view.click(".actions >> text=Label")
            view.wait_for_selector(f"[data-key='{second}'] .badge:has-text('rin & <len>')")
            view.evaluate("location.hash = 'clusters'")
            view.click(f"[data-cluster='{near['cluster']}'] >> text=All different")
            view.wait_for_selector(f"[data-key='{near['key']}'] .badge:has-text('different')")
            view.evaluate("location.hash = 'copies/copy'")
            view.click(".pair .decide >> text=alternate")
            view.wait_for_selector(".pair .tag.decided:has-text('by decision: alternate')")
            for key in (one, other):  # a choice stays from class to class
                view.evaluate(f"location.hash = 'classes/{rows[key]['class_id']}'")
                view.click(f"[data-key='{key}'] .frame")
            view.wait_for_selector("text=2 selected")
            view.keyboard.press("s")
            view.wait_for_selector(f"[data-key='{other}'] .badge:has-text('same')")
            view.evaluate("location.hash = 'decisions'")
            playwright.expect(view.locator("tbody tr")).to_have_count(5)
        with opened(chromium, url) as view:  # without the token the page is read-only
            view.evaluate(f"location.hash = 'classes/{label}'")
            view.click(f"[data-key='{second}'] .frame")
            view.wait_for_selector("text=with its token")
    recipe = animesion.load_recipe(str(out / "recipe.toml"), [f'curate.decisions="{out / "decisions.toml"}"'])
    animesion.build(recipe, out, workers=1, replace=True)
    again = {row["key"]: row for row in animesion.open_dataset(out).curated.to_pylist()}
    assert again[first]["reason"] == "excluded by decision"
    assert (again[second]["label"], again[second]["kept"]) == ("rin & <len>", True)
    assert again[near["key"]]["verdict"] == "alternate"
    assert (again[near["key"]]["reason"], again[near["key"]]["group"]) == ("", again[near["keeper"]]["group"])
    assert sorted([again[one]["reason"], again[other]["reason"]]) == (
        ["", "duplicate by decision"] if rows[one]["label"] == rows[other]["label"] else ["label conflict"] * 2
    )


def test_a_run_is_drawn(chromium: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "report").mkdir(parents=True)
    lines = [{"kind": "step", "step": i, "epoch": 1, "loss": 1 / i, "lr": 0.1} for i in range(1, 200)]
    lines += [{"kind": "epoch", "step": 100 * i, "epoch": i, "val_top_1": 0.4 * i} for i in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "report" / "evaluation.json").write_text(json.dumps({"samples": 9, "k": 2, "top_1": 0.5}))
    header = "class_id,name,train_images,test_images,accuracy,f1,confused_with,confused_with_name,confusions\n"
    rows = "0,<b>one</b>,200,5,0.4,0.4,1,two,3\n1,two,10,4,0.75,0.6,0,<b>one</b>,1\n"
    (folder / "report" / "per_class.csv").write_text(header + rows)
    names = "true_id,true_name,predicted_id,predicted_name,images,share_of_class,share_of_errors\n"
    (folder / "report" / "confusions.csv").write_text(names + "0,<b>one</b>,1,two,3,0.6,0.75\n")
    mistake = "key,true_id,true_name,predicted_id,predicted_name,confidence\nk1,0,<b>one</b>,1,two,0.9\n"
    (folder / "report" / "mistakes.csv").write_text(mistake)
    (tmp_path / "run.html").write_text(page.render(runs.of_run(folder)), encoding="utf-8")
    with opened(chromium, (tmp_path / "run.html").as_uri()) as view:
        assert "50.0%" in view.inner_text(".figures")
        assert view.locator(".plot canvas").count() == 4  # losses, rate, accuracy; accuracy by class size
        view.click(".tabs >> text=Classes")
        playwright.expect(view.locator(".list .row").first).to_contain_text("<b>one</b>")
        view.click(".tabs >> text=Confusions")
        playwright.expect(view.locator(".matrix td.miss", has_text="3")).to_have_count(1)
        view.click(".tabs >> text=Mistakes")
        playwright.expect(view.locator("tbody tr", has_text="90.0%")).to_have_count(1)
