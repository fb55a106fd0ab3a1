"""What a dataset is: the recipe model, the built-in recipes and how overrides and mistakes are handled.

A recipe never says where the output goes or how fast it is made; that is the command line's. The options of a source
belong to the source (`[source]` besides `kind` is checked by its own model), everything else is here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

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
from animesion.config.decisions import Decisions
from animesion.config.settings import Section, params_digest
from animesion.errors import UsageError
from animesion.storage import checksums

Percent = Annotated[int, Field(ge=0, le=100)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class SourceSection(BaseModel):
    """Where the images come from; keys besides `kind` belong to the source and are checked by it."""

    model_config = ConfigDict(frozen=True, extra="allow")

    kind: str = Field(description="name of the source; `animesion sources` lists them")

    @property
    def options(self) -> dict[str, Any]:
        """The keys besides `kind`."""
        return dict(self.__pydantic_extra__ or {})


class LabelSection(Section):
    """Which of an image's candidate labels counts."""

    rename: dict[str, str] = Field({}, description="label to use instead of a candidate, such as a tag's alias")
    exclude: list[str] = Field([], description="labels whose images are left out")
    ignore: list[str] = Field([], description="candidates that are passed over as if they were not there")


class FilterSection(Section):
    """Limits on single images; 0 or an empty list switches a limit off."""

    ratings: list[str] = Field([], description="ratings allowed, such as g and s; empty allows all")
    licences: list[str] = Field(
        [], description="licences allowed, such as CC0-1.0 and CC-BY (any version of it); empty allows all"
    )
    deleted: bool = Field(False, description="keep posts that the source marks as deleted, banned or pending")
    min_side: int = Field(0, ge=0, description="least side of the image in pixels")
    max_aspect: float = Field(0.0, ge=0, strict=False, description="most long side over short side")
    max_side: int = Field(32_768, ge=1, le=65_500, description="longest side the decoder is allowed")
    max_pixels: int = Field(100_000_000, ge=1, description="most pixels the decoder is allowed")


class EmbeddingSection(Section):
    """Duplicates by a model's view of them, besides those by hash."""

    model: str = Field("", description="any timm model, such as `resnet18`; empty looks for none")
    weights: str = Field(
        "pretrained", description="`pretrained`: as timm loads them; `random`; or a .safetensors or .pth file"
    )
    threshold: float = Field(
        0.98, gt=0, le=1, strict=False, description="least cosine of two embeddings of the same image"
    )


class DuplicatesSection(Section):
    """What is the same image, and what happens to it."""

    action: Literal["drop", "report"] = Field(
        "drop", description="drop all but the keeper of a cluster, or keep all and only write clusters down"
    )
    near: bool = Field(True, description="look for near duplicates besides equal bytes and equal pixels")
    radius: int = Field(4, ge=0, le=16, description="most differing bits of two 64-bit pHashes")
    flip: bool = Field(False, description="an image and its mirror image are duplicates")
    diameter: int = Field(
        0,
        ge=0,
        le=64,
        description="most differing bits between the best of a cluster and its members, a chain is cut there; "
        "0 for twice the radius",
    )
    mean_difference: float = Field(
        6.0, ge=0, strict=False, description="fine check: most mean difference of two 16x16 RGB thumbnails, of 255"
    )
    max_difference: int = Field(48, ge=0, le=255, description="fine check: most difference of any thumbnail value")
    tone: float = Field(
        0.3,
        ge=0,
        le=1,
        strict=False,
        description="fine check: change of the whole image's brightness and contrast that is evened out, as a share",
    )
    against: list[str] = Field(
        [], description="folders of published datasets; what they hold already is dropped as `published duplicate`"
    )
    conflicts: Literal["drop", "keep"] = Field(
        "drop", description="drop every member of a cluster that stands under several labels, or keep the best"
    )
    embedding: EmbeddingSection = Field(
        EmbeddingSection(),
        description="keys `model`, `weights`, `threshold`: duplicates by a timm model, off by default",
    )

    def against_digests(self) -> list[str]:
        """SHA-256 of the SHA256SUMS of each dataset in `against`, as hex.

        Raises:
            UsageError: one of them is no finished dataset.
        """
        return [checksums.digest(Path(folder), "duplicates.against") for folder in self.against]


class CropSection(Section):
    """What part of an image is the sample."""

    detector: str = Field("none", description="`none`: the whole image; `boxes`: the table that the source gives")
    detector_options: dict[str, Any] = Field({}, description="options of the detector, such as `score` of `onnx`")
    min_score: float = Field(0.85, ge=0, le=1, strict=False, description="least score of the box")
    margin: float = Field(0.0, ge=0, le=4, strict=False, description="added on each side, as a share of the box's side")
    square: bool = Field(False, description="widen the shorter side so that the crop is square where the image allows")
    min_side: int = Field(0, ge=0, description="least side of the crop in pixels")
    min_share: float = Field(
        0.0, ge=0, le=1, strict=False, description="least share of the image's area that the crop takes"
    )
    faces: Literal["one-only", "best", "each"] = Field(
        "one-only", description="images with several boxes are dropped, give their surest box, or a sample a box"
    )
    outside: Literal["shift", "pad", "drop"] = Field(
        "shift",
        description="a crop that reaches out of the image is moved and clipped, filled with black, or dropped",
    )


class QualitySection(Section):
    """Limits on what is measured of the sample; 0 switches a limit off."""

    min_light: int = Field(0, ge=0, le=255, description="least grey level of the lightest 1%; 50 finds dark images")
    max_dark: int = Field(0, ge=0, le=255, description="most grey level of the darkest 5%; 235 finds faded ones")
    min_contrast: float = Field(
        0.0, ge=0, le=127, strict=False, description="least deviation of grey levels; 2 finds blank images"
    )
    min_sharpness: float = Field(
        0.0, ge=0, strict=False, description="least variance of the Laplacian; 20 finds blurred images"
    )
    min_chroma: float = Field(
        0.0, ge=0, strict=False, description="least deviation of colours; 3 finds grey and one-tint images"
    )
    min_jpeg_quality: int = Field(0, ge=0, le=100, description="least quality that a JPEG was written with")
    max_border: float = Field(
        0.0, ge=0, le=1, strict=False, description="most share of the sample that plain bars along its edges take"
    )
    max_panels: int = Field(0, ge=0, description="most parts that plain gutters cut it into; comic pages have several")
    max_lines: int = Field(0, ge=0, description="most lines of text over its whole width; pages have many")
    trim: bool = Field(False, description="cut plain bars off whole images; `crop.detector` must be `none`")


class CurateSection(Section):
    """What a person decided about single images."""

    decisions: Decisions = Field(
        Decisions(), description="file that `animesion browse` wrote; the resolved recipe holds what is in it"
    )


class ClassesSection(Section):
    """How many images a class needs and may have."""

    minimum: int = Field(1, ge=1, description="classes with fewer kept images are dropped")
    cap: int = Field(0, ge=0, description="most images of a class, chosen by hash; 0 for no cap")


class SplitSection(Section):
    """How kept images are divided."""

    strategy: Literal["auto", "grouped", "published", "legacy-dafre", "single"] = Field(
        "grouped", description="`auto` is `published` where the source publishes splits, else `grouped`"
    )
    train: Percent = 80
    val: Percent = 10
    test: Percent = 10
    seed: int = 0
    keep: str = Field("", description="folder of a published dataset: its images stay in the splits that they are in")

    def keep_digest(self) -> str:
        """SHA-256 of the SHA256SUMS of the dataset in `keep`, as hex; empty without one.

        Raises:
            UsageError: it is no finished dataset.
        """
        return checksums.digest(Path(self.keep), "split.keep") if self.keep else ""

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.train + self.val + self.test != 100:
            raise ValueError(f"train, val and test add up to {self.train + self.val + self.test}, not to 100")
        if self.train == 0:
            raise ValueError("train needs a share above 0")
        if self.keep and self.strategy not in ("grouped", "auto"):
            raise ValueError(f"keep goes with strategy 'grouped', not with '{self.strategy}'")
        return self


class PackSection(Section):
    """How samples are encoded and sharded."""

    size: int = Field(0, ge=0, le=8192, description="side of the packed image in pixels; 0 keeps its size")
    fit: Literal["stretch", "short-side", "inside"] = Field(
        "short-side", description="`stretch` to size x size, scale the short side to size, or the long side"
    )
    format: Literal["jpg", "png", "webp"] = "jpg"
    quality: int = Field(95, ge=1, le=100, description="of JPEG and WebP; 100 makes WebP lossless")
    keep_original: Literal["auto", "never"] = Field(
        "auto",
        description="`auto` copies a file that already is what is asked for, byte for byte and with its metadata; "
        "`never` encodes every image anew, which leaves metadata such as EXIF out",
    )
    shard_samples: int = Field(10_000, ge=1)
    shard_bytes: int = Field(256_000_000, ge=10_000)
    caption: str = Field("{name}", description="text member for caption readers; empty writes none")
    seed: int = Field(0, description="of the order of samples over shards")

    @field_validator("caption")
    @classmethod
    def _known_names(cls, value: str) -> str:
        if "{" in value.replace("{name}", ""):
            raise ValueError("the one name that a caption can hold is {name}")
        return value


class CardSection(Section):
    """What the dataset card cannot know by itself."""

    title: str = ""
    summary: str = ""
    licence: str = Field("other", description="licence identifier as the Hugging Face hub spells it")
    homepage: str = ""
    contact: str = ""
    citation: str = ""
    tags: list[str] = Field([], description="more tags for the hub")
    purpose: str = Field("", description="what the dataset was made for and what it should not be used for")
    terms: str = Field("", description="under which terms the sources allow their images to be used")
    privacy: str = Field("", description="who can be seen or named in it, and whether they agreed")
    biases: str = Field("", description="what is over- and under-represented")
    limits: str = Field("", description="what it cannot be used for, beyond what the card counts")
    takedown: str = Field("", description="where to ask for an image to be removed, when it is not the contact")


class Recipe(Section):
    """A dataset, resolved: every default filled in."""

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
    split: SplitSection = SplitSection()
    pack: PackSection = PackSection()
    card: CardSection = CardSection()

    @model_validator(mode="after")
    def _trims_whole_images(self) -> Self:
        if self.quality.trim and self.crop.detector != "none":
            raise ValueError("quality.trim works on whole images: set crop.detector to 'none', or leave it out")
        return self

    @model_validator(mode="before")
    @classmethod
    def _legacy_keeps_duplicates(cls, data: Any) -> Any:
        """The published DAF:re split removed no duplicates: reporting them is filled in, dropping them refused."""
        if isinstance(data, dict) and _get(data, "split", "strategy") == "legacy-dafre":
            action = _get(data, "duplicates", "action")
            if action == "drop":
                raise ValueError(
                    "split.strategy 'legacy-dafre' reproduces a split that dropped no duplicates: "
                    "leave duplicates.action out or set it to 'report'"
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
        """The resolved recipe, as it is written into the output."""
        return tomli_w.dumps(self.model_dump(mode="json"))

    def digest(self) -> str:
        """SHA-256 over every value; equal digests mean equal recipes.

        Of the datasets in `duplicates.against` and `split.keep` the content counts (their SHA256SUMS), not where they
        lie.

        Raises:
            UsageError: one of them is no finished dataset.
        """
        values = self.model_dump(mode="json")
        values["duplicates"]["against"] = self.duplicates.against_digests()
        values["split"]["keep"] = self.split.keep_digest()
        return params_digest(values)


def builtin_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return settings.builtin_names("animesion")


def builtin_text(name: str) -> str:
    """The TOML text of a built-in recipe.

    Raises:
        UsageError: there is none of that name; the message offers the nearest.
    """
    return settings.builtin_text("animesion", name)


def load(name_or_path: str, overrides: Iterable[str] = (), *, sample: bool = False) -> Recipe:
    """Read a built-in recipe or a TOML file and apply `key.path=value` overrides.

    Args:
        name_or_path: built-in name, or a path that ends in `.toml` or holds a separator.
        overrides: values are TOML; what is not valid TOML is taken as text.
        sample: replace the source by the embedded sample world.

    Raises:
        UsageError: one sentence that names the file, the key and what to do.
    """
    data, where = settings.read("animesion", name_or_path)
    if sample:
        title = _get(data, "card", "title") or data["name"]
        data["source"] = _sample_source(data)
        (data.get("filter") or {}).pop("licences", None)  # drawn images state none
        data["name"] = f"{data['name']}-sample"
        # drawn images must never pass for the dataset whose recipe they try out
        data["card"] = {
            "title": f"{title}: drawn sample, not real data",
            "summary": "Every image was drawn by a program to try out a recipe; nothing here is real data.",
            "licence": "apache-2.0",
            "tags": ["synthetic"],
        }
    for override in overrides:
        settings.apply(data, override)
    named = _get(data, "curate", "decisions")
    if isinstance(named, str):  # what was decided counts, not the name of the file
        data["curate"]["decisions"] = decisions.read(Path(named)).model_dump()
    return settings.check(Recipe, data, where)


def read_back(path: Path) -> Recipe:
    """The recipe that a build wrote into its output; keys that this version does not know are passed over.

    Raises:
        UsageError: unreadable, or a value that this version cannot take.
    """
    data, where = settings.read("animesion", str(path))
    while True:
        try:
            return Recipe.model_validate(data)
        except ValidationError as error:
            unknown = [each["loc"] for each in error.errors() if each["type"] == "extra_forbidden"]
            if not unknown:
                raise UsageError(f"{where}: {settings.explain(error, Recipe)}") from None
            for location in unknown:
                section: Any = data
                for part in location[:-1]:
                    section = section[part]
                del section[location[-1]]


def _sample_source(data: dict[str, Any]) -> dict[str, Any]:
    """What stands in for a recipe's source: drawn files where it reads a published set, else the drawn booru."""
    kind = _get(data, "source", "kind")
    if kind == "ultra-fgvc":
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
