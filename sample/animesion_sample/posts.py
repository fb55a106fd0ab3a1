"""Posts of the sample booru: the record, and the text around an image such as tags, artists and hostile strings."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from random import Random

from animesion_sample.characters import BY_NAME, Design
from animesion_sample.drawing import Drawing, scene
from animesion_sample.files import Coding, image_size

HOSTILE: tuple[str, ...] = (
    "<script>alert('tag')</script>",
    "\u202egnp.elif_live\u202c",
    "🌸✨_художник_画家_👩‍🎨",
    "very_long_" + "x" * 10_000,
    "line\nbreak\r\nand\ttab",
    "'; DROP TABLE posts; --",
    "{{7*7}}${7*7}%(id)s",
    "../../../etc/passwd",
    "=HYPERLINK(\"http://sample-booru.invalid\")",
    "&lt;b&gt;<img src=x onerror=alert(1)>",
)  # fmt: skip

_ARTISTS = ("inkwell", "paper_lantern", "mochi_mochi", "nib_and_wash", "tako_studio", "yonaka", "pastel_fox", "hakumei",
            "ame_no_oto", "kiln", "sora_to_ki", "bluebird_(sketch)")  # fmt: skip


@dataclass(frozen=True)
class SamplePost:
    """One post: its metadata and the specification of its image, which is not drawn yet.

    Attributes:
        id: Ascending, with gaps.
        characters: Character tags.
        general: General tags.
        artists: Artist tags.
        copyrights: Copyright tags.
        rating: ``g``, ``s``, ``q`` or ``e``.
        source: The stated source of the image.
        pixiv_id: Number of the work on Pixiv, if the source is one.
        parent_id: The post of which this one is a version.
        has_children: Whether another post has this one as its parent.
        deleted: Whether the post was deleted.
        visible: Whether the API returns the file's URL.
        drawing: Specification of the image.
        coding: Encoding of the image.
        trouble: Fault or peculiarity of the post; empty for an ordinary one.
        group: Name shared by the posts of a duplicate cluster, a family or a page set; empty otherwise.
    """

    id: int
    characters: tuple[str, ...]
    general: tuple[str, ...]
    artists: tuple[str, ...]
    copyrights: tuple[str, ...]
    rating: str
    source: str
    pixiv_id: int | None
    parent_id: int | None
    has_children: bool
    deleted: bool
    visible: bool
    drawing: Drawing
    coding: Coding
    trouble: str
    group: str

    @property
    def ext(self) -> str:
        """The file's extension, which may be wrong."""
        return self.coding.extension

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image, upright, in pixels."""
        return image_size(self.drawing, self.coding)

    @property
    def created_at(self) -> str:
        """Time of the post, derived from the id."""
        zone = timezone(timedelta(hours=-4))
        moment = datetime(2024, 1, 1, tzinfo=zone) + timedelta(minutes=37 * self.id, milliseconds=self.id * 7919 % 1000)
        return moment.isoformat(timespec="milliseconds")

    @property
    def tags(self) -> tuple[str, ...]:
        """All tags, characters first."""
        return (*self.characters, *self.copyrights, *self.artists, *self.general)


def describe(drawing: Drawing, characters: tuple[str, ...], rng: Random) -> tuple[str, ...]:
    """General tags of the visible content of an image."""
    tags = [scene(drawing)]
    for name in drawing.cast:
        design = BY_NAME.get(name)
        if design is not None:
            tags += _look(design)
    if len(drawing.cast) == 1:
        tags.append("solo")
    elif not drawing.cast:
        tags += ["no_humans", "still_life"]
    else:
        tags.append(f"{len(drawing.cast)}people")
    if drawing.view == "back":
        tags.append("from_behind")
    tags += rng.sample(("looking_at_viewer", "upper_body", "simple_shading", "portrait", "outdoors", "flat_color"), 2)
    return tuple(dict.fromkeys(tags))


def _look(design: Design) -> list[str]:
    tags = ["1boy" if design.boy else "1girl", f"{design.back}_hair", f"{design.fringe}_bangs", design.outfit]
    if design.eyes[0] != design.eyes[1]:
        tags.append("heterochromia")
    return [*tags, *design.gear]


def artist(rng: Random) -> str:
    """One of the artists of the sample booru."""
    return rng.choice(_ARTISTS)
