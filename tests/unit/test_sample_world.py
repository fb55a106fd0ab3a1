from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import sys
from collections import Counter
from functools import lru_cache

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageChops, ImageOps

from animesion_sample import face, hair, headgear
from animesion_sample.drawing import heads
from animesion_sample.files import ANIMATED, ODD
from animesion_sample.plan import CLUSTERS, SINGLE
from animesion_sample.posts import SamplePost
from animesion_sample.shapes import Pen
from animesion_sample.world import World
from tests.sample_truth import DUPLICATES, Truth, truth

TROUBLES = ({*SINGLE, *CLUSTERS} - {"odd format"}) | {f"odd format: {form}" for form in ODD}

FINGERPRINT = """
import hashlib
from animesion_sample.world import World
world = World(200, 5)
digest = hashlib.sha256(world.faces_tsv() + world.tag_ids_tsv() + repr(world.posts).encode())
for post in reversed(world.posts[::4]):
    digest.update(hashlib.sha256(world.file(post)).digest())
print(digest.hexdigest())
"""


@lru_cache
def world(posts: int) -> World:
    return World(posts)


@lru_cache
def truth_of(posts: int, minimum: int = 20) -> dict[int, Truth]:
    return truth(world(posts), minimum)


def of(posts: int, trouble: str) -> list[SamplePost]:
    return [post for post in world(posts).posts if post.trouble == trouble]


def upright(data: bytes) -> Image.Image:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def test_a_world_is_the_same_in_any_process_and_order() -> None:
    prints = set()
    for hashseed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hashseed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", FINGERPRINT], env=environment, capture_output=True, check=True)
        prints.add(done.stdout)
    assert len(prints) == 1


def test_another_seed_is_another_world() -> None:
    one, other = World(200, 0), World(200, 1)
    assert one.file(one.posts[0]) != other.file(other.posts[0])


def test_ids_ascend_with_gaps() -> None:
    ids = [post.id for post in world(300).posts]
    assert ids == sorted(set(ids))
    assert ids[-1] - ids[0] > len(ids)


def test_too_few_posts_are_refused() -> None:
    with pytest.raises(ValueError, match="at least"):
        World(50)


@pytest.mark.parametrize("posts", [200, 300, 3000])
def test_every_trouble_occurs_and_every_post_has_its_truth(posts: int) -> None:
    truths = truth_of(posts)
    assert list(truths) == [post.id for post in world(posts).posts]
    seen = Counter(item.trouble for item in truths.values())
    assert set(seen).issuperset(TROUBLES)
    if posts == 3000:
        assert min(seen[trouble] for trouble in TROUBLES) >= 3
    assert all(bool(item.reason) == (item.outcome == "dropped") for item in truths.values())
    assert {item.reason for item in truths.values()} - {""} <= TROUBLES | {"rare class"}


def test_the_long_tail() -> None:
    counts = Counter(item.label for item in truth_of(3000).values() if item.outcome == "kept")
    assert min(counts.values()) >= 20
    assert 25 <= len(counts) <= 30
    assert 200 <= max(counts.values()) <= 350
    rare = Counter(item.label for item in truth_of(3000).values() if item.reason == "rare class")
    assert len(rare) == 8
    assert max(rare.values()) < 20
    assert not [item for item in truth_of(3000, 1).values() if item.reason == "rare class"]


def test_of_a_cluster_one_is_kept_and_a_conflict_keeps_none() -> None:
    truths = truth_of(3000, 1)
    for trouble in DUPLICATES:
        clusters: dict[str, list[SamplePost]] = {}
        for post in of(3000, trouble):
            clusters.setdefault(post.group, []).append(post)
        for members in clusters.values():
            kept = [post.id for post in members if truths[post.id].outcome == "kept"]
            assert len(kept) == 1
            assert {truths[post.id].keeper for post in members} == set(kept)
    assert {truths[post.id].outcome for post in of(3000, "label conflict")} == {"dropped"}


def test_families_and_page_sets_stay_together() -> None:
    truths = truth_of(300, 1)
    for post in of(300, "variant"):
        relatives = [world(300).by_id[number] for number in truths[post.id].with_posts]
        root = post.parent_id or post.id
        assert relatives
        assert all((other.parent_id or other.id) == root for other in relatives)
    for post in of(300, "page set"):
        others = [world(300).by_id[number] for number in truths[post.id].with_posts]
        assert {other.source for other in others} == {post.source}
    sources = Counter(
        post.source for post in world(3000).posts if "pixiv" in post.source and post.trouble not in CLUSTERS
    )
    assert max(sources.values()) == 1


def test_the_face_table_follows_the_published_format() -> None:
    lines = world(3000).faces_tsv().decode().splitlines()
    row = re.compile(r"(\d{4})[/\\](\d+)\.jpg\t(\d+)\t(?:0|1)\.\d{6}(?:, (?:0|1)\.\d{6}){3} (?:0|1)\.\d{6}")
    found = [row.fullmatch(line) for line in lines]
    assert all(found)
    assert all(int(match[2]) % 1000 == int(match[1]) for match in found if match)
    assert any("\\" in line for line in lines)
    boxes = Counter(int(match[2]) for match in found if match)
    for post in world(3000).posts:
        wanted = {"no face": {0}, "several faces": {2, 3}}.get(post.trouble, {1})
        assert boxes[post.id] in wanted
    for post in world(3000).posts:
        assert all((head.confidence < 0.85) == (post.trouble == "unsure face") for head in world(3000).faces(post))
    names = dict(line.split("\t") for line in world(3000).tag_ids_tsv().decode().splitlines())
    assert sorted(map(int, names.values())) == list(range(len(names)))


def test_boxes_are_tight_around_the_drawn_head() -> None:
    for post in of(300, "")[:120]:
        drawing = post.drawing
        (head,) = heads(drawing)
        blank = Image.new("RGB", (drawing.width, drawing.height), (1, 2, 3))
        drawn = blank.copy()
        pen = Pen(drawn, (head.x, head.y), head.scale, head.tilt, head.flip)
        headgear.draw_behind(pen, head.design)
        hair.draw_crown(pen, head.design)
        face.draw_skin(pen, head.design, 0.0)
        headgear.draw_before(pen, head.design)
        inked = ImageChops.difference(blank, drawn).getbbox()
        assert inked is not None
        left, top, right, bottom = head.box
        box = (left * drawing.width, top * drawing.height, right * drawing.width, bottom * drawing.height)
        # The detector's error, the grid, and the outline's width.
        slack = 0.1 * max(inked[2] - inked[0], inked[3] - inked[1]) + 6
        assert max(abs(a - b) for a, b in zip(box, inked, strict=True)) < slack, post.id


@pytest.mark.parametrize("trouble", ["truncated image", "corrupt image", "not an image", "too many pixels"])
def test_broken_files_do_not_decode(trouble: str) -> None:
    for post in of(3000, trouble):
        data = world(3000).file(post)
        with pytest.raises((OSError, SyntaxError, Image.DecompressionBombError)):
            Image.open(io.BytesIO(data)).load()


def test_the_other_bad_files_are_what_they_are_called() -> None:
    assert {world(3000).file(post) for post in of(3000, "empty file")} == {b""}
    forms = set()
    for post in of(3000, "animated"):
        forms.add(post.coding.form)
        assert getattr(Image.open(io.BytesIO(world(3000).file(post))), "n_frames", 1) > 1
    assert forms == set(ANIMATED)
    for post in of(3000, "unsupported format"):
        with pytest.raises(OSError, match="cannot identify"):
            Image.open(io.BytesIO(world(3000).file(post)))
    for post in of(3000, "too small"):
        assert max(post.size) < 64
    for post in of(3000, "aspect ratio"):
        assert max(post.size) > 4 * min(post.size)
    for post in of(3000, "checksum mismatch"):
        data = world(3000).file(post)
        Image.open(io.BytesIO(data)).load()
        assert world(3000).claim(post, data).md5 != hashlib.md5(data).hexdigest()


def test_odd_files_decode_to_the_image_that_was_drawn() -> None:
    modes = {"cmyk": "CMYK", "palette": "P", "rgba": "RGBA", "la": "LA", "grey": "L"}
    for form in ODD:
        (post, *_) = of(300, f"odd format: {form}")
        data = world(300).file(post)
        image = Image.open(io.BytesIO(data))
        assert image.mode == modes.get(form, "RGB")
        assert upright(data).size == post.size
        if form in ("rgba", "la", "palette"):
            assert upright(data).getpixel((0, 0)) == (255, 255, 255)
        if form == "disguised":
            assert (image.format, post.ext) == ("PNG", "jpg")
        if form == "exif":
            assert image.size == (post.size[1], post.size[0])
        if form == "png16":
            assert data[24] == 16
        if form == "progressive":
            assert image.info.get("progressive")


def test_only_intended_pairs_look_alike() -> None:
    """Duplicates are clearly inside the usual thresholds on the head crop, all other pairs clearly outside."""
    here = world(300)
    truths = truth_of(300, 1)
    posts = [post for post in here.posts if truths[post.id].outcome == "kept" or truths[post.id].keeper or post.group]
    hashes, thumbs = [], []
    for post in posts:
        image = upright(here.file(post))
        left, top, right, bottom = here.faces(post)[0].box
        width, height = image.size
        crop = image.crop((round(left * width), round(top * height), round(right * width), round(bottom * height)))
        hashes.append(imagehash.phash(crop).hash.ravel())
        thumbs.append(np.asarray(crop.resize((16, 16), Image.Resampling.BOX), np.int16).ravel())
    bits, pixels = np.array(hashes), np.array(thumbs)
    intended = 0
    for a, post in enumerate(posts):
        distances = (bits[a] ^ bits[a + 1 :]).sum(axis=1)
        apart = np.abs(pixels[a] - pixels[a + 1 :])
        for k, other in enumerate(posts[a + 1 :]):
            same = post.group == other.group and post.trouble in DUPLICATES | {"label conflict"}
            if same:
                intended += 1
                assert distances[k] <= 2
                assert apart[k].mean() <= 3
                assert apart[k].max() <= 24
            else:
                assert distances[k] > 6 or apart[k].mean() > 12, (post.id, other.id)
    assert intended >= 6
