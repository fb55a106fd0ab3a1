"""The recipe of a dataset: its model, the built-in recipes, and loading with overrides.

A recipe does not contain the output folder or the number of workers; those are options of a command. The options of a
source (`[source]` except `kind`) are checked by the source's own model.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from animesion.config import decisions, settings
from animesion.config.card import CardSection
from animesion.config.decisions import Decisions
from animesion.config.settings import Section, params_digest
from animesion.errors import UsageError
from animesion.storage import checksums, removed

Percent = Annotated[int, Field(ge=0, le=100)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class SourceSection(BaseModel):
    """Where the images come from; keys other than `kind` belong to the source, which checks them."""

    model_config = ConfigDict(frozen=True, extra="allow")

    kind: str = Field(description="name of the source; `animesion sources` lists them")

    @property
    def options(self) -> dict[str, Any]:
        """The keys other than `kind`."""
        return dict(self.__pydantic_extra__ or {})


class LabelSection(Section):
    """Which of an image's candidate labels is its label."""

    rename: dict[str, str] = Field({}, description="new label by candidate, such as a tag by its alias")
    exclude: list[str] = Field([], description="labels whose images are dropped")
    ignore: list[str] = Field([], description="candidates that are ignored")


class FilterSection(Section):
    """Limits on single images; 0 or an empty list switches a limit off."""

    ratings: list[str] = Field([], description="allowed ratings, such as g and s; empty allows all")
    licences: list[str] = Field(
        [], description="allowed licences, such as CC0-1.0 and CC-BY (any version of it); empty allows all"
    )
    deleted: bool = Field(False, description="keep posts that the source marks as deleted, banned or pending")
    opt_outs: bool = Field(
        True, description="drop images whose host, page or file reserves data mining or AI training, see crawling"
    )
    min_side: int = Field(0, ge=0, description="minimum of the shorter side in pixels")
    max_aspect: float = Field(0.0, ge=0, strict=False, description="maximum ratio of long side to short side")
    max_side: int = Field(32_768, ge=1, le=65_500, description="maximum of the longer side that is decoded, in pixels")
    max_pixels: int = Field(100_000_000, ge=1, description="maximum number of pixels that is decoded")


class EmbeddingSection(Section):
    """Duplicates by the embeddings of a model, in addition to those by hash."""

    model: str = Field("", description="any timm model, such as `resnet18`, or `sscd`; empty switches embeddings off")
    weights: str = Field(
        "pretrained",
        description="`pretrained` for timm's weights or the installed SSCD, `random`, or a weight file",
    )
    threshold: float = Field(
        0.98, gt=0, le=1, strict=False, description="minimum cosine similarity; by default 0.5 for `sscd`"
    )
    verify: bool = Field(
        False,
        description="similar images are candidates, which their pixels make duplicates or not, instead of duplicates; "
        "by default true for `sscd`",
    )

    @property
    def decides(self) -> bool:
        """Whether similar images are duplicates, whatever their pixels say."""
        return bool(self.model) and not self.verify

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_model(cls, data: Any) -> Any:
        """SSCD tells copies from other images, but not from alternates: it finds, and pixels decide."""
        if isinstance(data, dict) and data.get("model") == "sscd":
            return {"threshold": 0.5, "verify": True, **data}
        return data

    @model_validator(mode="after")
    def _has_weights(self) -> Self:
        if self.model == "sscd" and self.weights == "random":
            raise ValueError("weights 'random' are for timm models: leave weights out, or give the file of SSCD")
        return self


class HashKind(NamedTuple):
    """Limits of a perceptual hash, in bits.

    Attributes:
        bits: bits of a hash.
        radius: default of `duplicates.radius`.
        wider: bits beyond the radius within which images are compared, or share a split.
        most: largest radius.
        images: most images that are searched by it; 0 for any number.
    """

    bits: int
    radius: int
    wider: int
    most: int
    images: int = 0

    def check(self, count: int) -> None:
        """Refuse a search that would find a share of all pairs.

        Raises:
            UsageError: there are too many images.
        """
        if self.images and count > self.images:
            raise UsageError(
                f"duplicates.hash: this hash tells few images apart, so it is for {self.images:,} images at most, "
                f"not for {count:,}: choose another hash"
            )


#: The values of `duplicates.hash`.
HASHES = {
    "phash": HashKind(64, 4, 4, 16),
    "dhash": HashKind(64, 4, 4, 16),
    "whash": HashKind(64, 4, 4, 16),
    "colorhash": HashKind(42, 1, 1, 8, images=10_000),  # of 3,000 faces, 9 % of all pairs are within two bits
    "crop-resistant": HashKind(64, 4, 4, 16),
    "pdq": HashKind(256, 31, 16, 64),
}

#: Images up to which `duplicates.copies = "auto"` means local features, whose search grows with the square.
LOCAL_LIMIT = 200_000


class DuplicatesSection(Section):
    """Which images are duplicates, and what happens to them."""

    action: Literal["drop", "report"] = Field(
        "drop", description="drop all but the best image of a cluster, or keep all and only record clusters"
    )
    near: bool = Field(True, description="search for near duplicates, in addition to equal bytes and equal pixels")
    copies: Literal["auto", "off", "hash", "local"] = Field(
        "auto",
        description="how candidates for copies are found: by local features (`local`), by hashes of windows (`hash`), "
        "or by the hash of the whole image, without a comparison of pixels (`off`); `auto` is `local` up to "
        f"{LOCAL_LIMIT:,} images and `hash` beyond",
    )
    hash: Literal["phash", "dhash", "whash", "colorhash", "crop-resistant", "pdq"] = Field(
        "phash", description="the perceptual hash of the whole image; `pdq` needs pdqhash"
    )
    radius: int = Field(
        4,
        ge=0,
        le=64,
        description="maximum number of differing bits of two hashes; by default "
        + ", ".join(f"{kind.radius} of {kind.bits} for `{name}`" for name, kind in HASHES.items()),
    )
    flip: bool = Field(False, description="treat an image and its mirror image as duplicates")
    diameter: int = Field(
        0,
        ge=0,
        le=256,
        description="maximum number of bits between the best image of a cluster and its other members, longer chains "
        "are cut; 0 for twice the radius",
    )
    mean_difference: float = Field(
        6.0, ge=0, strict=False, description="fine check: maximum mean difference of two 16x16 RGB thumbnails, of 255"
    )
    max_difference: int = Field(48, ge=0, le=255, description="fine check: maximum difference of any thumbnail value")
    tone: float = Field(
        0.3,
        ge=0,
        le=1,
        strict=False,
        description="fine check: change of brightness and contrast of the whole image that is compensated, as a share",
    )
    against: list[str] = Field(
        [], description="folders of published datasets; images that they contain are dropped as `published duplicate`"
    )
    conflicts: Literal["drop", "keep"] = Field(
        "drop", description="drop every image of a cluster with several labels, or keep the best"
    )
    embedding: EmbeddingSection = Field(
        EmbeddingSection(),
        description="keys `model`, `weights`, `threshold`, `verify`: duplicates by embeddings; off by default",
    )

    @model_validator(mode="before")
    @classmethod
    def _radius_of_the_hash(cls, data: Any) -> Any:
        """A radius counts the bits of one hash: each has its own default, which a resolved recipe states."""
        if isinstance(data, dict) and "radius" not in data and str(data.get("hash")) in HASHES:
            return {**data, "radius": HASHES[str(data["hash"])].radius}
        return data

    @model_validator(mode="after")
    def _hash_fits(self) -> Self:
        if self.radius > HASHES[self.hash].most:
            raise ValueError(f"radius is at most {HASHES[self.hash].most} bits for hash '{self.hash}'")
        if self.hash == "crop-resistant" and self.near and self.copies == "off":
            raise ValueError(
                "hash 'crop-resistant' finds images with one part in common, which only a comparison of their pixels "
                "confirms: set copies to 'local' or 'hash', or choose another hash"
            )
        return self

    @model_validator(mode="after")
    def _embeddings_can_be_verified(self) -> Self:
        if self.embedding.model and self.embedding.verify and (self.copies == "off" or not self.near):
            raise ValueError(
                "embedding.verify needs a comparison of pixels: set copies to 'local' or 'hash', or set "
                "embedding.verify to false and embedding.threshold to 0.75 or more"
            )
        return self

    @property
    def other_hash(self) -> str:
        """The hash that is computed in addition to pHash; empty if there is none."""
        return "" if self.hash == "phash" else self.hash

    @property
    def wide_radius(self) -> int:
        """Bits within which images are compared, or share a split."""
        return self.radius + HASHES[self.hash].wider

    def for_images(self, count: int) -> Self:
        """The section with `copies` decided for a number of images.

        Raises:
            UsageError: they are too many for the hash.
        """
        HASHES[self.hash].check(count)
        if not self.near:
            return self.model_copy(update={"copies": "off"})
        if self.copies != "auto":
            return self
        return self.model_copy(update={"copies": "local" if count <= LOCAL_LIMIT else "hash"})

    def against_digests(self) -> list[str]:
        """SHA-256 of the SHA256SUMS of each dataset in `against`, as hex.

        Raises:
            UsageError: one of the folders is no finished dataset.
        """
        return [checksums.digest(Path(folder), "duplicates.against") for folder in self.against]


class CropSection(Section):
    """Which part of an image is the sample."""

    detector: str | list[str] = Field(
        "none",
        description="`none` for the whole image, `boxes` for the source's table, `auto` for that or else `anime`, or a "
        "detector; a list of detectors for boxes that they agree on",
    )
    detector_options: dict[str, Any] = Field(
        {}, description="options of the detector, such as `score` of `onnx`; of a list, tables by name"
    )
    agreement: float = Field(
        0.3,
        gt=0,
        le=1,
        strict=False,
        description="minimum intersection over union of boxes on which detectors of a list agree",
    )
    min_score: float = Field(0.85, ge=0, le=1, strict=False, description="minimum score of the box")
    unsure_score: float = Field(
        0.0,
        ge=0,
        le=1,
        strict=False,
        description="boxes from this score to `min_score` are perhaps faces; boxes below it do not count",
    )
    unsure: Literal["drop", "report"] = Field(
        "drop",
        description="for `one-only`, images with one face and further ones perhaps: drop them, or keep them and say so",
    )
    margin: float = Field(
        0.0, ge=0, le=4, strict=False, description="margin on each side, as a share of the box's side"
    )
    square: bool = Field(False, description="extend the shorter side to a square where the image allows")
    min_side: int = Field(0, ge=0, description="minimum of the crop's shorter side in pixels")
    min_share: float = Field(
        0.0, ge=0, le=1, strict=False, description="minimum share of the image's area that the crop covers"
    )
    faces: Literal["one-only", "best", "each"] = Field(
        "one-only",
        description="for images with several boxes: drop them, use the box with the best score, or one sample per box",
    )
    outside: Literal["shift", "pad", "drop"] = Field(
        "shift",
        description="for crops that extend beyond the image: shift and clip, pad with black, or drop the image",
    )

    @property
    def detectors(self) -> list[str]:
        """The detectors, one or several."""
        return [self.detector] if isinstance(self.detector, str) else self.detector

    @property
    def table_decides(self) -> bool:
        """Whether the boxes of the source's table, where there is one, decide before an image is fetched."""
        return self.detector in ("boxes", "auto")

    @property
    def described(self) -> str:
        """The detectors for a sentence, without the paths of their files."""
        names = [f"`{each.partition(':')[0]}`" for each in self.detectors]
        return f"the detector {names[0]}" if len(names) == 1 else f"the detectors {' and '.join(names)}, which agree"

    @model_validator(mode="after")
    def _limits_in_order(self) -> Self:
        if self.unsure_score > self.min_score:
            raise ValueError(f"unsure_score ({self.unsure_score:g}) is above min_score ({self.min_score:g})")
        if isinstance(self.detector, list) and (len(set(self.detector)) < 2 or "none" in self.detector):
            raise ValueError("a list of detectors needs two or more different ones, and 'none' is not one of them")
        return self


class QualitySection(Section):
    """Limits on measurements of the sample; 0 switches a limit off."""

    min_light: int = Field(0, ge=0, le=255, description="minimum grey level of the lightest 1%; 50 finds dark images")
    max_dark: int = Field(0, ge=0, le=255, description="maximum grey level of the darkest 5%; 235 finds faded images")
    min_contrast: float = Field(
        0.0, ge=0, le=127, strict=False, description="minimum standard deviation of grey levels; 2 finds blank images"
    )
    min_sharpness: float = Field(
        0.0, ge=0, strict=False, description="minimum variance of the Laplacian; 20 finds blurred images"
    )
    min_chroma: float = Field(
        0.0, ge=0, strict=False, description="minimum deviation of colours; 3 finds grey and single-tint images"
    )
    min_jpeg_quality: int = Field(0, ge=0, le=100, description="minimum quality setting of a JPEG")
    max_border: float = Field(
        0.0, ge=0, le=1, strict=False, description="maximum share of the sample that plain bars along its edges cover"
    )
    max_panels: int = Field(
        0, ge=0, description="maximum number of panels between plain gutters; comic pages have several"
    )
    max_lines: int = Field(
        0, ge=0, description="maximum number of text lines over the whole width; text pages have many"
    )
    trim: bool = Field(False, description="trim plain bars off whole images; requires `crop.detector` `none`")


class CurateSection(Section):
    """A curator's decisions on images and on pairs of them."""

    decisions: Decisions = Field(
        Decisions(), description="file from `animesion browse`; the resolved recipe contains its decisions"
    )
    removed: list[str] = Field(
        [],
        description="`removed.csv` files or folders of datasets; images that were removed from them are dropped as "
        "`removed`, like those of the output folder and of `duplicates.against`",
    )


class ClassesSection(Section):
    """Minimum and maximum number of images of a class."""

    minimum: int = Field(1, ge=1, description="classes with fewer kept images are dropped")
    cap: int = Field(0, ge=0, description="maximum number of images of a class, chosen by hash; 0 for no cap")


class SplitSection(Section):
    """How kept images are divided into train, val and test."""

    strategy: Literal["auto", "grouped", "by-class", "published", "legacy-dafre", "single"] = Field(
        "grouped",
        description="`auto` is `published` where the source publishes splits, else `grouped`; `by-class` tests on "
        "classes that are not in train, and its shares are of classes",
    )
    train: Percent = 80
    val: Percent = 10
    test: Percent = 10
    seed: int = 0
    keep: str = Field("", description="folder of a published dataset whose images keep their split")

    def keep_digest(self) -> str:
        """SHA-256 of the SHA256SUMS of the dataset in `keep`, as hex; empty without one.

        Raises:
            UsageError: the folder is no finished dataset.
        """
        return checksums.digest(Path(self.keep), "split.keep") if self.keep else ""

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.train + self.val + self.test != 100:
            raise ValueError(f"train, val and test add up to {self.train + self.val + self.test} instead of 100")
        if self.train == 0:
            raise ValueError("train needs a share above 0")
        if self.keep and self.strategy not in ("grouped", "by-class", "auto"):
            raise ValueError(f"keep requires strategy 'grouped', 'by-class' or 'auto', not '{self.strategy}'")
        return self


class PackSection(Section):
    """How samples are encoded and sharded."""

    size: int = Field(0, ge=0, le=8192, description="side of the packed image in pixels; 0 keeps the original size")
    fit: Literal["stretch", "short-side", "inside"] = Field(
        "short-side",
        description="stretch to size x size, or scale the short side or the long side (`inside`) to size",
    )
    format: Literal["jpg", "png", "webp"] = "jpg"
    quality: int = Field(95, ge=1, le=100, description="quality of JPEG and WebP; 100 makes WebP lossless")
    keep_original: Literal["auto", "never"] = Field(
        "auto",
        description="`auto` copies images that already have the requested format and size, including their metadata; "
        "`never` encodes every image, which removes metadata such as EXIF",
    )
    shard_samples: int = Field(10_000, ge=1)
    shard_bytes: int = Field(256_000_000, ge=10_000)
    caption: str = Field("{name}", description="text of the `txt` member for caption readers; empty writes no member")
    seed: int = Field(0, description="seed of the order of samples over shards")

    @field_validator("caption")
    @classmethod
    def _known_names(cls, value: str) -> str:
        if "{" in value.replace("{name}", ""):
            raise ValueError("the only placeholder of a caption is {name}")
        return value


class TagsSection(Section):
    """Which tags of the source travel with the samples."""

    categories: list[Literal["general", "character", "copyright", "artist", "meta"]] = Field(
        [], description="categories of tags that samples carry; empty for no tags"
    )
    min_images: int = Field(20, ge=1, description="tags of fewer samples are dropped")
    most: int = Field(0, ge=0, description="number of tags to keep, the most frequent; 0 for all")
    exclude: list[str] = Field([], description="tags that are dropped; * stands for any characters")


class Recipe(Section):
    """A resolved recipe: every default is filled in."""

    name: Name
    summary: str = ""
    source: SourceSection
    label: LabelSection = LabelSection()
    filter: FilterSection = FilterSection()
    duplicates: DuplicatesSection = DuplicatesSection()
    crop: CropSection = CropSection()
    quality: QualitySection = QualitySection()
    curate: CurateSection = CurateSection()
    classes: ClassesSection = ClassesSection()
    tags: TagsSection = TagsSection()
    split: SplitSection = SplitSection()
    pack: PackSection = PackSection()
    card: CardSection = CardSection()

    @model_validator(mode="after")
    def _trims_whole_images(self) -> Self:
        if self.quality.trim and self.crop.detector != "none":
            raise ValueError("quality.trim works on whole images: set crop.detector to 'none', or remove quality.trim")
        return self

    @model_validator(mode="before")
    @classmethod
    def _legacy_keeps_duplicates(cls, data: Any) -> Any:
        """The published DAF:re split kept duplicates: `report` becomes the default, and `drop` is an error."""
        if isinstance(data, dict) and _get(data, "split", "strategy") == "legacy-dafre":
            action = _get(data, "duplicates", "action")
            if action == "drop":
                raise ValueError(
                    "split.strategy 'legacy-dafre' reproduces a split that dropped no duplicates: "
                    "remove duplicates.action, or set it to 'report'"
                )
            data = {**data, "duplicates": {**(data.get("duplicates") or {}), "action": "report"}}
        return data

    @model_validator(mode="after")
    def _one_embedding_an_image(self) -> Self:
        if self.duplicates.embedding.model and self.crop.faces == "each":
            raise ValueError(
                "duplicates.embedding compares images, not their faces: set crop.faces to 'best' or 'one-only'"
            )
        return self

    def to_toml(self) -> str:
        """The resolved recipe as TOML, as in the output folder."""
        return tomli_w.dumps(self.model_dump(mode="json"))

    def digest(self) -> str:
        """SHA-256 over every value, as hex; equal digests mean equal recipes.

        The datasets in `duplicates.against` and `split.keep` enter with their content (their SHA256SUMS) and not with
        their paths; so do the lists in `curate.removed`.

        Raises:
            UsageError: one of these folders is no finished dataset, or a list cannot be read.
        """
        values = self.model_dump(mode="json")
        values["duplicates"]["against"] = self.duplicates.against_digests()
        values["split"]["keep"] = self.split.keep_digest()
        values["curate"]["removed"] = removed.combined(map(Path, self.curate.removed)).digest()
        return params_digest(values)


#: Answers of the card of a drawn sample.
_SAMPLE_CARD: dict[str, Any] = {
    "summary": "Every image was drawn by a program to try out a recipe; nothing here is real data.",
    "licence": "apache-2.0",
    "tags": ["synthetic"],
    **dict.fromkeys(("version", "published", "homepage", "citation", "publisher"), "none"),
    "purpose": "To try out a recipe and its commands; not to train or to compare recognisers.",
    "terms": "Drawn by a program of Animesion, under its licence.",
    "privacy": "No people: every image is drawn.",
    "biases": "None known: a random generator draws classes and styles.",
    "limits": "Drawn shapes; results on them say nothing about real images.",
    "impact": "None known.",
    "synthetic": 1.0,
    "annotations_creators": ["machine-generated"],
    "source_datasets": ["original"],
}


def builtin_names() -> list[str]:
    """Names of the built-in recipes."""
    return settings.builtin_names("animesion")


def builtin_text(name: str) -> str:
    """The TOML text of a built-in recipe.

    Raises:
        UsageError: unknown name; the message suggests the most similar one.
    """
    return settings.builtin_text("animesion", name)


def load(name_or_path: str, overrides: Iterable[str] = (), *, sample: bool = False) -> Recipe:
    """Read a built-in recipe or a TOML file and apply `key.path=value` overrides.

    Args:
        name_or_path: built-in name, or a path that ends in `.toml` or has a slash.
        overrides: `key.path=value` each; a value that is not valid TOML is text.
        sample: replace the source by the embedded sample world.

    Raises:
        UsageError: one sentence with the file, the key and what to do.
    """
    data, where = settings.read("animesion", name_or_path)
    if sample:
        title = _get(data, "card", "title") or data["name"]
        data["source"] = _sample_source(data)
        (data.get("filter") or {}).pop("licences", None)  # drawn images have no licence
        data["name"] = f"{data['name']}-sample"
        # Drawn images must not be mistaken for the dataset whose recipe they test.
        data["card"] = {"title": f"{title}: drawn sample, not real data", **_SAMPLE_CARD}
    for override in overrides:
        settings.apply(data, override)
    decisions_path = _get(data, "curate", "decisions")
    if isinstance(decisions_path, str):  # the digest of the recipe depends on the decisions, not on the file's name
        data["curate"]["decisions"] = decisions.read(Path(decisions_path)).model_dump()
    return settings.check(Recipe, data, where)


def read_back(path: Path) -> Recipe:
    """The recipe that a build wrote into its output; keys that this version does not know are ignored.

    Raises:
        UsageError: the file is unreadable, or this version does not accept a value.
    """
    data, where = settings.read("animesion", str(path))
    while True:
        try:
            return Recipe.model_validate(data)
        except ValidationError as error:
            unknown = [each["loc"] for each in error.errors() if each["type"] == "extra_forbidden"]
            if not unknown:
                raise UsageError(f"{where}: {settings.explain(error, Recipe)}") from None
            # Checked again afterwards: removing a key may uncover another mistake.
            for location in unknown:
                section: Any = data
                for part in location[:-1]:
                    section = section[part]
                del section[location[-1]]


def _sample_source(data: dict[str, Any]) -> dict[str, Any]:
    """The source that replaces a recipe's: drawn files for recipes that read a published set, else the drawn booru."""
    kind = _get(data, "source", "kind")
    if kind in ("ultra-fgvc", "benchmark"):
        return {"kind": "sample-files", "layout": _get(data, "source", "set")}
    if kind == "moeimouto":
        return {"kind": "sample-files", "layout": "moeimouto"}
    if kind in ("commons", "folder"):
        return {"kind": "sample-files", "layout": "folder"}
    if kind == "urls":
        return {"kind": "sample-urls"}
    if kind == "labels" and _get(data, "split", "strategy") == "published":  # a booru publishes no split
        return {"kind": "sample-files", "layout": "labels"}
    return {"kind": "sample"}


def _get(data: dict[str, Any], section: str, key: str) -> Any:
    inner = data.get(section)
    return inner.get(key) if isinstance(inner, dict) else None
