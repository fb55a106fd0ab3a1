"""The report in a real browser: search, clusters, hostile names, decisions and the build that applies them."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
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
def opened(chromium: Any, url: str, *, script: str = "", **options: Any) -> Iterator[Any]:
    """Open a page; fail on errors, on requests to the network and on scripts that are not its own."""
    messages: list[str] = []
    asked: list[str] = []
    view = chromium.new_page(**options)
    view.add_init_script(script)
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


#: Least contrast of text of an element with what is behind it (WCAG 2.2, 1.4.3), of all text in a page.
CONTRAST = """() => {
  const light = (c) => { c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  canvas.canvas.width = canvas.canvas.height = 1;
  const mixed = (below, colour) => {
    canvas.fillStyle = `rgb(${below})`; canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = ([r, g, b]) => 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b);
  const poor = [];
  for (const each of document.querySelectorAll('body *')) {
    const own = [...each.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || each.closest('script, style, option, :disabled')) continue;
    if (!each.checkVisibility({ opacityProperty: true })) continue;
    const above = [];
    for (let at = each; at; at = at.parentElement) above.unshift(getComputedStyle(at).backgroundColor);
    const ground = above.reduce(mixed, [255, 255, 255]);
    const [one, other] = [luminance(mixed(ground, getComputedStyle(each).color)), luminance(ground)];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (ratio < 4.5) poor.push(`${each.className} ${each.textContent.slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return poor;
}"""


def looked_at(view: Any, width: int) -> None:
    """Fail if a view scrolls sideways or has text of little contrast."""
    assert view.evaluate("document.documentElement.scrollWidth") <= width, view.url
    assert view.evaluate(CONTRAST) == [], view.url


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


@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (390, "dark"), (360, "light")])
def test_every_view_fits_and_is_legible(chromium: Any, build: Path, width: int, theme: Any) -> None:
    size = {"width": width, "height": 844}
    with opened(chromium, (build / "report.html").as_uri(), viewport=size, color_scheme=theme) as view:
        ground = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[theme]
        assert view.evaluate("getComputedStyle(document.body).backgroundColor") == ground
        for tab in ("overview", "classes", "classes/0", "clusters", "copies/copy", "alternates", "dropped"):
            view.evaluate(f"location.hash = '{tab}'")
            view.wait_for_timeout(50)
            looked_at(view, width)


def test_the_first_screen_has_pictures_and_bars_to_compare(chromium: Any, small_build: Path) -> None:
    size = {"width": 1280, "height": 800}
    with opened(chromium, (small_build / "report.html").as_uri(), viewport=size) as view:
        classes = len(animesion.open_dataset(small_build).classes)
        playwright.expect(view.locator(".covers img")).to_have_count(min(24, classes))
        seen = "(all) => all.filter((each) => each.naturalWidth && each.getBoundingClientRect().bottom < 800).length"
        assert view.locator("img").evaluate_all(seen) == min(24, classes)
        widths = "(all) => all.map((each) => each.offsetWidth / each.parentElement.offsetWidth)"
        bars = view.locator(".funnel .bar span").evaluate_all(widths)
        counts = [n for n in animesion.open_dataset(small_build).dropped.values() if n]
        assert bars == pytest.approx([n / max(counts) for n in counts], abs=0.01)
        for text in view.locator(".legend, .ticks").all_inner_texts():
            assert "--" not in text
        ticks = view.locator(".histogram:has-text('short side') .ticks span").all_inner_texts()
        assert ticks
        assert all(len(text.replace(",", "").rstrip("0")) <= 2 for text in ticks), ticks
        view.click(".tabs >> text=Dropped")
        playwright.expect(view.locator(".card img").first).to_be_visible()
        looked_at(view, 1280)


@pytest.fixture(scope="module")
def site(small_build: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`animesion browse` of the small world; its decisions are in a folder of their own."""
    file = tmp_path_factory.mktemp("decided") / "decisions.toml"
    with served(live.application(live.Browser(animesion.open_dataset(small_build), file), "secret")) as port:
        yield f"http://127.0.0.1:{port}/#token=secret"


def test_an_image_at_full_size_is_decided_by_keys(chromium: Any, small_build: Path, site: str) -> None:
    dataset = animesion.open_dataset(small_build)
    with opened(chromium, site, viewport={"width": 1280, "height": 800}) as view:
        view.evaluate("location.hash = 'images'")
        view.wait_for_selector(".gridside .card")
        keys = view.locator(".gridside .card").evaluate_all("(all) => all.map((each) => each.dataset.key)")
        row = next(each for each in dataset.curated.to_pylist() if each["key"] == keys[0])
        view.focus(".gridside .card .frame")
        view.keyboard.press("v")
        original = view.locator(".viewer .pane >> nth=0")
        sample = view.locator(".viewer .pane >> nth=1")
        playwright.expect(original).to_contain_text(f"{row['width']}×{row['height']}")
        left, top, right, bottom = row["crop"]
        playwright.expect(sample).to_contain_text(f"{right - left}×{bottom - top}")
        box, image = (view.locator(f".viewer .pane >> nth=0 >> {each}").bounding_box() for each in (".cropped", "img"))
        assert (box["x"] - image["x"]) / image["width"] == pytest.approx(left / row["width"], abs=0.02)
        assert box["height"] / image["height"] == pytest.approx((bottom - top) / row["height"], abs=0.02)
        assert view.locator(".viewer .found").count() >= 1
        link = view.locator(f".viewer a[href='{row['page_url']}']")
        assert link.get_attribute("rel") == "noopener noreferrer"
        looked_at(view, 1280)
        # zoom about the centre, and move
        before = view.locator(".viewer img").first.bounding_box()
        for _ in range(8):
            view.keyboard.press("+")
        after = view.locator(".viewer img").first.bounding_box()
        assert after["width"] == pytest.approx(before["width"] * 1.3**8, rel=0.02)
        view.keyboard.press("Shift+ArrowRight")
        moved = view.locator(".viewer img").first.bounding_box()
        assert (moved["x"] - after["x"], moved["y"] - after["y"]) == pytest.approx((-80, 0), abs=1)
        view.keyboard.press("0")
        assert view.locator(".viewer img").first.bounding_box() == pytest.approx(before, abs=1)
        # drop the first, keep the second, give the third another label, take that back
        view.keyboard.press("x")
        playwright.expect(view.locator(".viewer h2")).to_have_text(keys[1])
        playwright.expect(view.locator(".viewer [role=status]")).to_contain_text("Saved to")
        view.keyboard.press("k")
        playwright.expect(view.locator(".viewer h2")).to_have_text(keys[2])
        nothing = "Nothing to save: no decision excludes what is to be kept."
        playwright.expect(view.locator(".viewer [role=status]")).to_have_text(nothing)
        view.keyboard.press("l")
        view.keyboard.type("<b>x</b>")
        view.keyboard.press("Enter")
        playwright.expect(view.locator(".viewer h2")).to_have_text(keys[3])
        view.keyboard.press("ArrowLeft")
        playwright.expect(view.locator(".viewer .state")).to_contain_text("→ <b>x</b>")
        view.keyboard.press("z")
        playwright.expect(view.locator(".viewer .state")).not_to_contain_text("→")
        view.keyboard.press("Escape")
        assert view.locator("dialog").count() == 0
        assert view.evaluate("document.activeElement.className") == "frame"
        playwright.expect(view.locator(f"[data-key='{keys[0]}'] .badge")).to_have_text("excluded")
        view.keyboard.press("z")
        playwright.expect(view.locator(".badge")).to_have_count(0)


def test_an_area_of_the_map_is_a_filter_with_a_name(chromium: Any, site: str) -> None:
    with opened(chromium, site, viewport={"width": 1280, "height": 800}) as view:
        view.evaluate("location.hash = 'images'")
        canvas = view.locator(".map canvas")
        count = view.locator(".count strong")
        view.wait_for_selector(".gridside .card")
        total = int(count.inner_text().split()[0].replace(",", ""))
        frame = canvas.bounding_box()
        at = lambda x, y: (frame["x"] + x * frame["width"], frame["y"] + y * frame["height"])  # noqa: E731
        view.mouse.move(*at(0.01, 0.01))
        view.mouse.down()
        for corner in ((0.5, 0.01), (0.5, 0.99), (0.01, 0.99)):
            view.mouse.move(*at(*corner), steps=4)
        view.mouse.up()
        view.wait_for_url("**area=**")
        playwright.expect(count).not_to_have_text(f"{total} images")
        half = int(count.inner_text().split()[0])
        assert 0 < half < total
        view.fill(".saved input", "left <i>half</i>")
        view.keyboard.press("Enter")
        view.wait_for_selector("text=Filter saved.")
        address = view.url
        view.click("text=Clear filters")
        playwright.expect(count).to_have_text(f"{total} images")
        # with keys alone: the cross, three corners, and the area closed
        canvas.focus()
        for key in (
            "ArrowRight",
            "Space",
            *["Shift+ArrowRight"] * 5,
            "Space",
            *["Shift+ArrowDown"] * 5,
            "Space",
            "Enter",
        ):
            view.keyboard.press(key)
        view.wait_for_url("**area=0.5%2C0.5+1%2C0.5+1%2C1")
        view.reload()
        view.wait_for_selector(".saved option >> nth=1", state="attached")
        view.select_option(".saved select", "left <i>half</i>")
        view.wait_for_url(address)
        playwright.expect(count).to_have_text(f"{half} images")
        looked_at(view, 1280)


def test_a_phone_reaches_every_tab_and_an_image_at_full_size(chromium: Any, site: str) -> None:
    size = {"width": 390, "height": 844}
    with opened(chromium, site, viewport=size, color_scheme="dark") as view:
        tabs = view.locator(".tabs a")
        assert tabs.all_inner_texts()[-1] == "Decisions"
        for tab in tabs.all():
            box = tab.bounding_box()
            assert 0 <= box["x"] <= box["x"] + box["width"] <= 390
            tab.click()
            view.wait_for_timeout(100)
            looked_at(view, 390)
        view.evaluate("location.hash = 'images'")
        view.locator(".gridside .enlarge").first.click()
        view.wait_for_selector(".viewer .pane img")
        looked_at(view, 390)
        assert view.evaluate("document.querySelector('.viewer').scrollWidth") <= 390
        view.click(".viewer >> text=Close")


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
            command = view.inner_text(".command")
            view.context.grant_permissions(["clipboard-read", "clipboard-write"])
            view.click("button >> text=Copy")
            view.wait_for_selector("text=Copied")
            assert view.evaluate("navigator.clipboard.readText()") == command
        with opened(chromium, url) as view:  # without the token the page is read-only
            view.evaluate(f"location.hash = 'classes/{label}'")
            view.click(f"[data-key='{second}'] .frame")
            view.wait_for_selector("text=with its token")
    script = "from animesion.cli import main; main()"
    subprocess.run([sys.executable, "-c", script, *shlex.split(command)[1:]], check=True, capture_output=True)
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
    # texts that are drawn on canvases
    spy = "const draw = CanvasRenderingContext2D.prototype.fillText; window.drawn = []; "
    spy += "CanvasRenderingContext2D.prototype.fillText = function (text, ...at) { "
    spy += "window.drawn.push(text); return draw.call(this, text, ...at); }"
    with opened(chromium, (tmp_path / "run.html").as_uri(), script=spy, viewport={"width": 390, "height": 844}) as view:
        assert view.locator(".u-legend").count() == 0
        drawn = view.evaluate("window.drawn")
        assert {"epoch", "1", "2", "40%", "images that are right", "loss", "learning rate"} <= set(drawn)
        assert "1.5" not in drawn
        for tab in view.locator(".tabs a").all():
            box = tab.bounding_box()
            assert 0 <= box["x"] <= box["x"] + box["width"] <= 390
            tab.click()
            looked_at(view, 390)
        view.click(".tabs >> text=Overview")
        assert "50.0%" in view.inner_text(".figures")
        # losses, rate, accuracy; accuracy by class size
        playwright.expect(view.locator(".plot canvas")).to_have_count(4)
        view.click(".tabs >> text=Classes")
        playwright.expect(view.locator(".list .row").first).to_contain_text("<b>one</b>")
        view.click(".tabs >> text=Confusions")
        playwright.expect(view.locator(".matrix td.miss", has_text="3")).to_have_count(1)
        view.click(".tabs >> text=Mistakes")
        playwright.expect(view.locator("tbody tr", has_text="90.0%")).to_have_count(1)
