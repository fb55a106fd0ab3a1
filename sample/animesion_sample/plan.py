"""The plan of a world: how often each character is drawn, and which posts have which kind of trouble.

A post has at most one trouble, so the correct result of a recipe for it is unambiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from animesion_sample.characters import BY_NAME, CAST
from animesion_sample.drawing import VARIANTS, Drawing
from animesion_sample.files import ANIMATED, FOREIGN, ODD, Coding
from animesion_sample.posts import HOSTILE, SamplePost, artist, describe

FEWEST_POSTS = 200

RARE_COUNTS = (14, 6, 1, 19, 11, 8, 4, 2)
"""Numbers of images of the characters that are too rare for a class of 20."""

SINGLE = {
    # Posts per thousand, for troubles of a single post.
    "several labels": 50, "no label": 33, "rating": 50, "deleted": 16, "no face": 30, "several faces": 43,
    "unsure face": 27, "not visible": 4, "not found": 3, "checksum mismatch": 2.5, "empty file": 1.5,
    "not an image": 3, "truncated image": 5, "corrupt image": 3, "too many pixels": 1.5, "animated": 3,
    "unsupported format": 3, "too small": 3, "aspect ratio": 3, "mislabelled": 5, "hostile text": 4,
    "odd format": 17,
}  # fmt: skip

CLUSTERS = {
    # Clusters per thousand posts; a cluster is two or three posts.
    "exact duplicate": 6, "pixel duplicate": 3.5, "near duplicate": 15, "label conflict": 3.5, "variant": 10,
    "page set": 7,
}  # fmt: skip


@dataclass(frozen=True)
class _Draft:
    """A post before it has an id."""

    characters: tuple[str, ...]
    drawing: Drawing
    coding: Coding
    trouble: str = ""
    group: str = ""
    rating: str = "g"
    deleted: bool = False
    visible: bool = True
    hostile: int = -1


class _Planner:
    """Makes drafts; a counter gives each image its own seed."""

    def __init__(self, posts: int, seed: int) -> None:
        self.posts, self.seed, self.made = posts, seed, 0
        self.rng = Random(f"{seed}/{posts}/plan")
        self.regulars: tuple[str, ...] = ()
        self.weights: tuple[float, ...] = ()

    def pick_character(self, but: tuple[str, ...] = ()) -> str:
        """A random regular of the cast, by weight, that is not in `but`."""
        while True:
            name = self.rng.choices(self.regulars, self.weights)[0]
            if name not in but:
                return name

    def drawing(self, *cast: str, size: tuple[int, int] | None = None) -> Drawing:
        """A new image of the characters."""
        self.made += 1
        rng = self.rng
        if size is None:
            long, short = rng.randrange(360, 481, 8), rng.randrange(304, 353, 8)
            size = rng.choice(((short, long), (short, long), (long, short), (long - 64, long - 64)))
            if len(cast) > 1:
                size = (480, rng.randrange(304, 353, 8))
        return Drawing(f"{self.seed}/{self.made}", cast, *size)

    def coding(self) -> Coding:
        """An ordinary file: mostly JPEG, some PNG."""
        if self.rng.random() < 0.15:
            return Coding("png", 40)
        return Coding("jpg", self.rng.randrange(86, 96))

    def plain(self, name: str) -> _Draft:
        """An ordinary post of a character."""
        rating = "s" if self.rng.random() < 0.15 else "g"
        return _Draft((name,), self.drawing(name), self.coding(), rating=rating)


def _single(p: _Planner, trouble: str, turn: int) -> _Draft:
    """One post with a trouble; ``turn`` cycles through its kinds."""
    name = p.pick_character()
    draft = replace(p.plain(name), trouble=trouble)
    rng = p.rng
    if trouble == "several labels":
        names = [name, p.pick_character((name,))]
        if turn % 4 == 3:
            names.append(p.pick_character(tuple(names)))
        return replace(draft, characters=tuple(names))
    if trouble == "no label":
        return replace(draft, characters=(), drawing=p.drawing(""))
    if trouble == "rating":
        return replace(draft, rating="qe"[turn % 2])
    if trouble == "deleted":
        return replace(draft, deleted=True)
    if trouble == "no face":
        return replace(draft, drawing=p.drawing())
    if trouble == "several faces":
        cast = [name, p.pick_character((name,))] + ([p.pick_character((name,))] if turn % 3 == 2 else [])
        return replace(draft, drawing=p.drawing(*cast))
    if trouble == "unsure face":
        return replace(draft, drawing=replace(draft.drawing, view=("back", "blurred", "hidden")[turn % 3]))
    if trouble == "not visible":
        return replace(draft, visible=False)
    if trouble == "mislabelled":
        return replace(draft, characters=(p.pick_character((name,)),))
    if trouble == "hostile text":
        return replace(draft, hostile=turn % len(HOSTILE))
    if trouble == "too small":
        return replace(draft, drawing=p.drawing(name, size=(rng.randrange(40, 62), rng.randrange(40, 62))))
    if trouble == "aspect ratio":
        long, short = rng.randrange(448, 481), rng.randrange(90, 106)
        return replace(draft, drawing=p.drawing(name, size=(long, short) if turn % 2 else (short, long)))
    if trouble == "odd format":
        form = ODD[turn % len(ODD)]
        return replace(draft, trouble=f"odd format: {form}", coding=Coding(form))
    coding = _CODINGS.get(trouble)
    return draft if coding is None else replace(draft, coding=coding(turn))


_CODINGS: dict[str, Callable[[int], Coding]] = {
    "empty file": lambda turn: Coding(damage="empty"),
    "not an image": lambda turn: Coding(damage=("html", "noise")[turn % 2]),
    "truncated image": lambda turn: Coding(("jpg", "png")[turn % 3 // 2], damage="truncated"),
    "corrupt image": lambda turn: Coding("png", damage=("bad_data", "bad_crc")[turn % 2]),
    "too many pixels": lambda turn: Coding(("png", "jpg")[turn % 2], damage=("huge_png", "huge_jpg")[turn % 2]),
    "animated": lambda turn: Coding(ANIMATED[turn % 3]),
    "unsupported format": lambda turn: Coding(FOREIGN[turn % 3]),
}  # fmt: skip


def _cluster(p: _Planner, trouble: str, turn: int) -> list[_Draft]:
    """Two or three related posts."""
    rng, group = p.rng, f"{trouble}-{turn}"
    first = replace(p.plain(p.pick_character()), trouble=trouble, group=group)
    size = 3 if turn % 3 == 2 else 2
    if trouble == "exact duplicate":
        return [first] * size
    if trouble == "pixel duplicate":
        notes = ("", "re-saved", "optimised")
        again = [Coding("png", level, note=note) for level, note in zip((60, 10, 90), notes, strict=True)]
        return [replace(first, coding=coding) for coding in again[:size]]
    if trouble == "near duplicate":
        first = replace(first, coding=Coding("png", 40) if turn % 4 == 3 else Coding("jpg", rng.randrange(93, 96)))
        return [first, *(replace(first, coding=_repost_coding(rng, turn + k)) for k in range(size - 1))]
    if trouble == "label conflict":
        other = replace(first, characters=(p.pick_character(first.characters),))
        return [first, other if turn % 2 else replace(other, coding=_repost_coding(rng, turn))]
    if trouble == "variant":
        changes = rng.sample(VARIANTS, size - 1)
        versions = [replace(first.drawing, variant=change) for change in changes]
        return [first, *(replace(first, drawing=version, coding=p.coding()) for version in versions)]
    pages = [replace(p.plain(first.characters[0]), trouble=trouble, group=group) for _ in range(size)]
    return [first, *pages]


def _repost_coding(rng: Random, turn: int) -> Coding:
    """Another encoding of the same image, as in reposts."""
    if turn % 3 == 0:
        return Coding("jpg", rng.randrange(76, 88))
    return Coding("jpg", 92 if turn % 3 == 1 else rng.randrange(84, 90), scale=rng.choice((0.625, 0.75, 0.875)))


def _long_tail(total: int, classes: int) -> list[int]:
    """Split a total over classes by Zipf's law, above a floor of 20."""
    floor = min(20, total // classes)
    raw = [1 / (k + 4) for k in range(classes)]
    raw = [value - raw[-1] for value in raw]
    spare = total - floor * classes
    counts = [floor + int(spare * value / (sum(raw) or 1.0)) for value in raw]
    counts[0] += total - sum(counts)
    return counts


def plan(posts: int, seed: int) -> list[SamplePost]:
    """All posts of a world, by ascending id.

    Raises:
        ValueError: There are too few posts to have every trouble once.
    """
    if posts < FEWEST_POSTS:
        raise ValueError(f"a sample world has at least {FEWEST_POSTS} posts, not {posts}")
    p = _Planner(posts, seed)
    times = {trouble: max(1, round(share * posts / 1000)) for trouble, share in {**SINGLE, **CLUSTERS}.items()}
    times["odd format"] = max(times["odd format"], len(ODD))
    times["hostile text"] = max(times["hostile text"], 3)
    rare = dict(zip((d.name for d in CAST[-8:]), RARE_COUNTS[: max(3, round(8 * posts / 3000))], strict=False))
    # fewer posts have fewer characters: each regular gets about 30 images
    estimate = posts - sum(rare.values()) - sum(times[t] for t in SINGLE) - sum(3 * times[t] for t in CLUSTERS)
    p.regulars = tuple(d.name for d in CAST[: max(3, min(len(CAST) - 8, estimate // 30))])
    p.weights = tuple(1 / (k + 4) for k in range(len(p.regulars)))

    # a unit is a post, or the posts of a cluster
    units: list[list[_Draft]] = []
    for trouble in SINGLE:
        units += ([_single(p, trouble, turn)] for turn in range(times[trouble]))
    for trouble in CLUSTERS:
        units += (_cluster(p, trouble, turn) for turn in range(times[trouble]))
    for name, count in rare.items():
        units += ([p.plain(name)] for _ in range(count))
    left = posts - sum(map(len, units))
    for name, count in zip(p.regulars, _long_tail(left, len(p.regulars)), strict=True):
        units += ([p.plain(name)] for _ in range(count))
    return _assign_ids(p, units)


def _assign_ids(p: _Planner, units: list[list[_Draft]]) -> list[SamplePost]:
    """Assign ids: those of a group are scattered, and the parent of a family has the lowest."""
    rng = p.rng
    ids: list[int] = []
    number = 1000
    for _ in range(p.posts):
        number += rng.randint(1, 9)
        ids.append(number)
    rng.shuffle(ids)
    posts: list[SamplePost] = []
    for unit in units:
        mine = [ids.pop() for _ in unit]
        family = unit[0].trouble == "variant"
        if family:
            mine.sort()
        work = 100_000_000 + rng.randrange(10_000_000)
        for k, (draft, number) in enumerate(zip(unit, mine, strict=True)):
            parent = mine[0] if family and k else None
            shared = work if draft.trouble == "page set" else None
            posts.append(_post(draft, number, shared, parent, family and k == 0, p.seed))
    return sorted(posts, key=lambda post: post.id)


def _post(
    draft: _Draft, number: int, work: int | None, parent: int | None, has_children: bool, seed: int
) -> SamplePost:
    rng = Random(f"{seed}/{number}/words")
    pixiv = work
    source = f"https://www.pixiv.net/artworks/{work}"
    if work is None:
        pixiv = 50_000_000 + number if rng.random() < 0.4 else None
        source = (
            f"https://www.pixiv.net/artworks/{pixiv}"
            if pixiv
            else rng.choice(
                ("", f"https://gallery.invalid/{rng.randrange(10**9)}-{number}", f"sketchbook, page {number}")
            )
        )
    general, artists = describe(draft.drawing, draft.characters, rng), (artist(rng),)
    if draft.hostile >= 0:
        text = HOSTILE[draft.hostile]
        pixiv, source, artists, general = None, f"{text} {number}", (text,), (*general, text)
    works = tuple(dict.fromkeys(BY_NAME[name].work for name in draft.characters)) or ("original",)
    return SamplePost(
        number, draft.characters, general, artists, works, draft.rating, source, pixiv, parent, has_children,
        draft.deleted, draft.visible, draft.drawing, draft.coding, draft.trouble, draft.group,
    )  # fmt: skip
