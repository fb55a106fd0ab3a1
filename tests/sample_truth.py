"""The correct results of the ``daf-re`` recipe for all posts of a sample world.

They follow from the plan of the world and from the rule for duplicates, not from a run of the pipeline. The rule: one
image of a cluster of duplicates is kept, that with the most pixels, then a PNG before a JPEG, then the largest file,
then the lowest id; if the labels of a cluster disagree, none is kept.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from animesion_sample.posts import SamplePost
from animesion_sample.world import World

DUPLICATES = frozenset({"exact duplicate", "pixel duplicate", "near duplicate"})
"""Troubles of clusters with one kept image."""

KEPT = frozenset({"", "variant", "page set", "mislabelled", "hostile text"})
"""Troubles of posts that are kept, as are those with a trouble that starts with ``odd format``."""

RARE = "rare class"
"""The drop reason of a good post of a character with too few."""


@dataclass(frozen=True)
class Truth:
    """The correct result for one post.

    Attributes:
        outcome: ``kept`` or ``dropped``.
        reason: Drop reason: the name of its trouble, or ``rare class``; empty when kept.
        label: The character tag if there is exactly one, else empty.
        trouble: The planned trouble; empty for an ordinary post.
        keeper: Id of the kept post of its cluster of duplicates, possibly its own; None outside of clusters.
        with_posts: Other kept posts that must be in the same split.
    """

    outcome: str
    reason: str
    label: str
    trouble: str
    keeper: int | None = None
    with_posts: tuple[int, ...] = ()


def truth(world: World, minimum: int = 20) -> dict[int, Truth]:
    """The correct results by post id.

    Args:
        world: The sample world. Files are drawn only to break ties among duplicates.
        minimum: Fewest images of a class.
    """
    groups: dict[str, list[SamplePost]] = defaultdict(list)
    for post in world.posts:
        if post.group:
            groups[post.group].append(post)
    found: dict[int, Truth] = {}
    for post in world.posts:
        label = post.characters[0] if len(post.characters) == 1 else ""
        good = post.trouble in KEPT or post.trouble.startswith("odd format")
        if post.trouble in DUPLICATES:
            continue
        found[post.id] = Truth("kept" if good else "dropped", "" if good else post.trouble, label, post.trouble)
    for members in groups.values():
        trouble, label = members[0].trouble, members[0].characters[0]
        if trouble in DUPLICATES:
            best = keeper(world, members)
            for post in members:
                kept = post.id == best
                outcome, reason = ("kept", "") if kept else ("dropped", trouble)
                found[post.id] = Truth(outcome, reason, label, trouble, best)
        elif trouble in KEPT:
            for post in members:
                others = tuple(other.id for other in members if other.id != post.id)
                found[post.id] = replace(found[post.id], with_posts=others)
    counts = Counter(item.label for item in found.values() if item.outcome == "kept")
    for number, item in found.items():
        if item.outcome == "kept" and counts[item.label] < minimum:
            found[number] = replace(item, outcome="dropped", reason=RARE, with_posts=())
    return dict(sorted(found.items()))


def keeper(world: World, members: Sequence[SamplePost]) -> int:
    """The id of the best image among duplicates."""

    def rank(post: SamplePost) -> tuple[int, bool, int, int]:
        width, height = post.size
        return (width * height, post.ext == "png", len(world.file(post)), -post.id)

    return max(members, key=rank).id
