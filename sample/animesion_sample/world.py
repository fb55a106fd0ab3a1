"""The sample world: its posts, its files, and the tables of head boxes and tag ids.

Files are drawn on demand. The checksum that the site states for a file may be wrong.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from random import Random

from animesion_sample.characters import CAST, Design
from animesion_sample.drawing import heads
from animesion_sample.files import encode
from animesion_sample.plan import plan
from animesion_sample.posts import SamplePost

__all__ = ["Claim", "Face", "SamplePost", "World"]


@dataclass(frozen=True)
class Face:
    """A detected head: left, top, right, bottom relative to the upright image, and the detector's confidence."""

    box: tuple[float, float, float, float]
    confidence: float


@dataclass(frozen=True)
class Claim:
    """The MD5 and size that the site states for a file."""

    md5: str
    size: int


class World:
    """All posts of the drawn booru.

    Args:
        posts: Number of posts; from 200 posts on, every trouble occurs.
        seed: Seed of the world.

    Raises:
        ValueError: ``posts`` is too small.
    """

    def __init__(self, posts: int = 500, seed: int = 0) -> None:
        self.seed = seed
        self.posts: list[SamplePost] = plan(posts, seed)
        self.by_id = {post.id: post for post in self.posts}

    @property
    def characters(self) -> tuple[Design, ...]:
        """The characters with at least one post, in the order of their tag ids."""
        seen = {name for post in self.posts for name in post.characters}
        return tuple(design for design in CAST if design.name in seen)

    def file(self, post: SamplePost) -> bytes:
        """The bytes served for a post, possibly damaged; drawn on each call, always the same."""
        return encode(post.drawing, post.coding)

    def claim(self, post: SamplePost, data: bytes) -> Claim:
        """The md5 and size that the site states for a post whose file is ``data``."""
        if post.trouble == "checksum mismatch":
            return Claim(hashlib.md5(data + b"?", usedforsecurity=False).hexdigest(), len(data))
        return Claim(hashlib.md5(data, usedforsecurity=False).hexdigest(), len(data))

    def faces(self, post: SamplePost) -> tuple[Face, ...]:
        """Head boxes of a post, as from a detector."""
        rng = Random(f"{self.seed}/{post.id}/detector")
        found = []
        for head in heads(post.drawing):
            # One in fifty has exactly the usual threshold as its confidence, which must count as found.
            sure = 0.85 if rng.random() < 0.02 else round(rng.uniform(0.86, 0.999), 6)
            unsure = round(rng.uniform(0.3, 0.845), 6)
            found.append(Face(head.box, unsure if post.trouble == "unsure face" else sure))
        return tuple(found)

    def faces_tsv(self) -> bytes:
        """The head boxes in grapeot's format; images without a character tag have tag 0, ``original``."""
        numbers = {design.name: number for number, design in enumerate(self.characters, start=1)}
        lines = []
        for post in sorted(self.posts, key=lambda post: (post.id % 1000, post.id)):
            # As in the published table, some rows have Windows paths.
            slash = "\\" if post.id % 97 == 0 else "/"
            tag = numbers[post.characters[0]] if post.characters else 0
            for face in self.faces(post):
                box = ", ".join(f"{value:.6f}" for value in face.box)
                path = f"{post.id % 1000:04d}{slash}{post.id}.jpg"
                lines.append(f"{path}\t{tag}\t{box} {face.confidence:.6f}\n")
        return "".join(lines).encode()

    def tag_ids_tsv(self) -> bytes:
        """The names of the tag ids in ``faces_tsv``."""
        names = ["original", *(design.name for design in self.characters)]
        return "".join(f"{name}\t{number}\n" for number, name in enumerate(names)).encode()
