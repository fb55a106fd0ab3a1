"""Schemas of the tables that the stages of a build exchange, and the drop reasons.

`Item` is one image as a source lists it; `RAW`, `FEATURES`, `CURATED` and `INDEX` are the Arrow schemas of
`raw/part-*.parquet`, `features/part-*.parquet`, `curated.parquet` and `index.parquet`. `animesion.storage.parquet`
reads and writes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Self

import pyarrow as pa


class Box(NamedTuple):
    """A head or face box with its score, relative to the upright image: 0 is left or top, 1 is right or bottom."""

    left: float
    top: float
    right: float
    bottom: float
    score: float


#: Categories of tags, in the order in which vocabularies list them.
TAG_CATEGORIES = ("general", "character", "copyright", "artist", "meta")


@dataclass(frozen=True, slots=True)
class Item:
    """One image as its source lists it, before its bytes are read. Unknown text is empty, never None.

    Attributes:
        key: key, unique in the build, `[a-z0-9_-]+`, such as `danbooru-1796291`.
        source: kind of the source, such as `danbooru` or `folder`.
        source_id: the source's own id of the image (post id, relative path).
        locator: how the source finds the bytes (path, offset, URL as JSON); private to the source.
        order: position in the source's own order.
        labels: candidate labels (character tags, class folder); the recipe chooses among them.
        families: tokens such as `post:12`, `pixiv:7`, `url:...`; images that share a token stay in one split.
        boxes: head boxes from a table; None if no table was given.
        split: the published split, if the source has one.
        class_order: published class id, or -1; determines the order of class ids.
        flags: state of the post at the source, such as `deleted`.
        failure: drop reason if the source already knows that there are no bytes to read.
        tags: tags by category, one of `TAG_CATEGORIES` each; None if the recipe asks for no tags.
    """

    key: str
    source: str
    source_id: str
    locator: str
    order: int
    labels: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    boxes: tuple[Box, ...] | None = None
    split: str = ""
    class_order: int = -1
    rating: str = ""
    flags: tuple[str, ...] = ()
    md5: str = ""
    bytes: int = 0
    page_url: str = ""
    file_url: str = ""
    licence: str = ""
    author: str = ""
    failure: str = ""
    detail: str = ""
    tags: Mapping[str, Sequence[str]] | None = None


@dataclass(frozen=True, slots=True)
class Payload:
    """A source's answer to a request for the bytes of an item: the bytes, or a drop reason.

    Attributes:
        content: the bytes; empty if there is a reason.
        reason: drop reason; empty if there are bytes.
        detail: detail of the reason.
        digest: digest of the bytes if it is already known, with its kind, such as `md5:0123...`.
    """

    content: bytes = b""
    reason: str = ""
    detail: str = ""
    digest: str = ""


class DropReason(StrEnum):
    """Every drop reason, in the order in which reasons are checked: an image gets the first that applies.

    A member equals its text, so tables and JSON contain plain strings.

    Attributes:
        meaning: one line for the funnel, the card and the documentation.
    """

    meaning: str

    def __new__(cls, text: str, meaning: str) -> Self:
        """Make a member that is the string `text`."""
        member = str.__new__(cls, text)
        member._value_ = text
        member.meaning = meaning
        return member

    BAD_RECORD = "bad record", "the source's record of the image cannot be read"
    NOT_VISIBLE = "not visible", "the source shows the post but not its file"
    REMOVED = "removed", "the image was removed from a dataset on request (`removed.csv`)"
    # metadata of the source, checked before an image is fetched
    DELETED = "deleted", "the source marks the post as deleted, banned or pending"
    NO_LABEL = "no label", "no candidate label"
    SEVERAL_LABELS = "several labels", "more than one candidate label"
    EXCLUDED_LABEL = "excluded label", "the recipe excludes this label"
    RATING = "rating", "rating not in the recipe's list"
    LICENCE = "licence", "licence not in the recipe's list, or not stated"
    NO_FACE = "no face", "no face box in the image"
    SEVERAL_FACES = "several faces", "more than one face box"
    UNSURE_FACE = "unsure face", "the face box's score is below the recipe's minimum"
    # fetch
    UNSAFE_PATH = "unsafe path", "absolute path or `..` in the source's file name"
    NOT_A_REGULAR_FILE = "not a regular file", "a link, device or directory instead of a file"
    MISSING_FILE = "missing file", "the file that the source lists does not exist"
    NOT_FOUND = "not found", "the server has no such file (404, 410, 451)"
    REFUSED = "refused", "the server refuses access to the file (401, 403)"
    ROBOTS_OPT_OUT = "robots opt-out", "robots.txt disallows the file, or X-Robots-Tag or a page's robots meta opts out"
    USAGE_OPT_OUT = "usage opt-out", "Content-Usage (AIPREF), in a header or in robots.txt, reserves AI training"
    TDM_OPT_OUT = "tdm opt-out", "the TDM Reservation Protocol reserves text and data mining"
    METADATA_OPT_OUT = (
        "metadata opt-out",
        "XMP or IPTC-IIM in the file, such as plus:DataMining, reserves data mining",
    )
    C2PA_OPT_OUT = "c2pa opt-out", "a C2PA training-mining assertion inside the file does not allow it"
    CHECKSUM_MISMATCH = "checksum mismatch", "the bytes do not match the source's checksum"
    TOO_MANY_BYTES = "too many bytes", "larger than the byte limit"
    TIMED_OUT = "timed out", "the download took too long"
    UNSAFE_ADDRESS = "unsafe address", "the URL leads to a private address or a scheme other than http(s)"
    FETCH_FAILED = "fetch failed", "the file could not be read; the detail has the cause"
    # inspect
    EMPTY_FILE = "empty file", "zero bytes"
    NOT_AN_IMAGE = "not an image", "the bytes have no known image format"
    UNSUPPORTED_FORMAT = "unsupported format", "a video, an archive or an image format that is not supported"
    TOO_MANY_PIXELS = "too many pixels", "more pixels or a longer side than the limits of the decoder"
    TRUNCATED_IMAGE = "truncated image", "the file ends before the image does"
    CORRUPT_IMAGE = "corrupt image", "the decoder reports an error"
    ANIMATED = "animated", "more than one frame"
    CRASHED_DECODER = "crashed decoder", "decoding or encoding the image killed the worker process"
    # filter
    TOO_LARGE = "too large", "the packed image would exceed the limits of the encoder or the decoder"
    TOO_SMALL = "too small", "the shorter side is below the recipe's minimum"
    ASPECT_RATIO = "aspect ratio", "the ratio of long to short side is above the recipe's maximum"
    SMALL_FACE = "small face", "the face crop is below the recipe's minimum side or share of the image"
    CUT_FACE = "cut face", "the crop extends beyond the image"
    # quality
    TOO_DARK = "too dark", "even the lightest pixels are darker than the recipe allows"
    TOO_BRIGHT = "too bright", "even the darkest pixels are lighter than the recipe allows"
    BLANK = "blank", "one colour once composited, or contrast below the recipe's minimum"
    BLURRED = "blurred", "sharpness below the recipe's minimum"
    GREYSCALE = "greyscale", "colour deviation below the recipe's minimum: grey or single-tint"
    HEAVY_COMPRESSION = "heavy compression", "JPEG quality below the recipe's minimum"
    BORDERS = "borders", "plain bars cover more of the image than the recipe's maximum"
    COMIC_PAGE = "comic page", "more panels between plain gutters than the recipe's maximum"
    TEXT_PAGE = "text page", "more lines of text than the recipe's maximum"
    # decisions of a curator
    EXCLUDED_BY_DECISION = "excluded by decision", "a curator excluded the image (`curate.decisions`)"
    # duplicates
    PUBLISHED_DUPLICATE = "published duplicate", "the same image is in a published dataset that the recipe lists"
    LABEL_CONFLICT = "label conflict", "the same image has two labels"
    EXACT_DUPLICATE = "exact duplicate", "the same bytes as another image"
    PIXEL_DUPLICATE = "pixel duplicate", "the same decoded pixels as another image, from other bytes"
    NEAR_DUPLICATE = "near duplicate", "a copy of another image, such as one of another size, quality or crop"
    DUPLICATE_BY_DECISION = "duplicate by decision", "a curator decided that it is the same image (`curate.decisions`)"
    # classes and splits
    NO_PUBLISHED_SPLIT = "no published split", "the source publishes splits, but none for this image"
    RARE_CLASS = "rare class", "the class has fewer images than the recipe's minimum"
    OVER_CLASS_CAP = "over class cap", "the class has more images than the recipe's cap"
    CLASS_APART = "class apart", "most of its group, such as the images of one post, is of classes in another split"


#: Meaning by reason, for reasons that are read from tables.
MEANINGS: dict[str, str] = {reason.value: reason.meaning for reason in DropReason}


#: Why tags are dropped: meaning by reason, in the order in which reasons are checked.
TAG_MEANINGS = {
    "new": "not in the vocabulary of the version before, which an update keeps",
    "category": "the category is not in tags.categories",
    "excluded": "tags.exclude lists the tag",
    "rare": "fewer samples than tags.min_images",
    "over the limit": "beyond the tags.most most frequent ones",
}


#: Drop reasons that follow from the boxes of an image.
FACE_REASONS = frozenset(
    {
        DropReason.NO_FACE,
        DropReason.SEVERAL_FACES,
        DropReason.UNSURE_FACE,
        DropReason.SMALL_FACE,
        DropReason.CUT_FACE,
    }
)

_BOX = pa.struct([(name, pa.float32()) for name in Box._fields])

_LISTED = [
    ("key", pa.string()),
    ("source", pa.string()),
    ("source_id", pa.string()),
    ("order", pa.int64()),
    ("labels", pa.list_(pa.string())),
    ("families", pa.list_(pa.string())),
    ("boxes", pa.list_(_BOX)),  # null if no table of boxes was given
    ("split", pa.string()),
    ("class_order", pa.int64()),
    ("rating", pa.string()),
    ("flags", pa.list_(pa.string())),
    ("page_url", pa.string()),
    ("file_url", pa.string()),
    ("licence", pa.string()),
    ("author", pa.string()),
    ("md5", pa.string()),
    ("bytes", pa.int64()),
]

#: The listing of a source: one row per `Item`, field by field.
PLAN = pa.schema([*_LISTED, ("locator", pa.string()), ("failure", pa.string()), ("detail", pa.string())])

#: The listing with the results of fetching; `md5` and `bytes` are those of the fetched file.
RAW = pa.schema(
    [
        *_LISTED,
        ("sha256", pa.string()),
        ("extension", pa.string()),  # detected from the bytes, never taken from the file name
        ("offset", pa.int64()),  # of the bytes inside the part's tar
        ("reason", pa.string()),  # empty if the bytes are in the part's tar
        ("detail", pa.string()),
    ]
)

#: Tags of the listed images by category, as the source gives them; only if the recipe asks for tags.
TAGS = pa.schema([("key", pa.string()), *((name, pa.list_(pa.string())) for name in TAG_CATEGORIES)])

#: Tags of each sample as positions in the vocabulary `tags.csv`, ascending.
SAMPLE_TAGS = pa.schema([("key", pa.string()), ("tags", pa.list_(pa.int32()))])

#: Side of the colour thumbnail that the fine duplicate check compares.
THUMBNAIL_SIDE = 16

#: Features of one decode, one row per image that has bytes (per face, where each face is a sample).
FEATURES = pa.schema(
    [
        ("key", pa.string()),
        ("reason", pa.string()),  # empty if the image decodes
        ("detail", pa.string()),
        ("format", pa.string()),
        ("mode", pa.string()),  # of the file, before conversion to RGB
        ("width", pa.int32()),  # of the upright image
        ("height", pa.int32()),
        ("plain", pa.bool_()),  # any reader decodes the same RGB: no rotation, palette, alpha, CMYK, profile but sRGB
        ("pixels_blake3", pa.string()),  # of size and RGB bytes
        ("boxes", pa.list_(_BOX)),  # boxes of the detector, on the image's first row; null if none ran
        ("faces", pa.int32()),  # number of boxes of the detector; -1 if none ran
        ("face", pa.int32()),  # 0 for the image's sample; from 1 where each face is a sample, by score
        ("face_score", pa.float32()),  # of the sample's box, which is the best one unless each face is a sample
        ("crop", pa.list_(pa.int32(), 4)),  # left, top, right, bottom in pixels of the upright image; null: whole
        ("phash", pa.uint64()),  # of what will be packed: the crop, or the whole image
        ("phash_flip", pa.uint64()),  # of its mirror image
        ("thumbnail", pa.binary(THUMBNAIL_SIDE * THUMBNAIL_SIDE * 3)),
        ("points", pa.binary()),  # of the sample, see `animesion.images.local_features`; null unless copies need them
        ("windows", pa.binary()),  # pHashes of 91 windows of the sample; null unless copies need them
        ("hash_kind", pa.string()),  # `duplicates.hash` if it is not pHash; else null
        ("hash", pa.binary()),  # by it, of the sample, see `animesion.images.other_hashes`
        ("hash_flip", pa.binary()),  # of its mirror image
        ("whole_phash", pa.uint64()),  # of the whole image, where the sample is a crop, like the next two; else null
        ("whole_phash_flip", pa.uint64()),  # of its mirror image
        ("whole_thumbnail", pa.binary(THUMBNAIL_SIDE * THUMBNAIL_SIDE * 3)),  # of the whole image
        ("whole_hash", pa.binary()),  # as `hash`, of the whole image
        ("whole_hash_flip", pa.binary()),  # of its mirror image
        ("jpeg_quality", pa.int32()),  # 1 to 100 from the quantisation table of the file; -1 if it is no JPEG
        ("sharpness", pa.float32()),  # of the sample, like all below: variance of the Laplacian of the reduced copy
        ("light", pa.int32()),  # grey level that 99% of the pixels do not exceed
        ("dark", pa.int32()),  # grey level that 95% of the pixels reach
        ("contrast", pa.float32()),  # standard deviation of the grey levels
        ("chroma", pa.float32()),  # deviation of the colours; 0 for grey and for one tint
        ("border", pa.float32()),  # share that plain bars along the edges cover
        ("panels", pa.int32()),  # number of parts between plain gutters
        ("lines", pa.int32()),  # number of lines of text
    ]
)


def sample_key(key: str, face: int | None) -> str:
    """The key of a sample: the image's key, with `-face` and the number where each face is a sample."""
    return f"{key}-face{face}" if face else key


#: Embeddings of a model, one row per image that decodes; only if the recipe requests them.
EMBEDDINGS = pa.schema(
    [
        ("key", pa.string()),
        ("embedding", pa.list_(pa.float32())),  # of unit length, of the crop or the whole image
    ]
)

#: Verdicts on pairs of images, see `animesion.dedup.compare.Found`; pairs of different images have no row.
PAIRS = pa.schema(
    [
        ("first", pa.string()),  # key of a sample
        ("second", pa.string()),  # key of a sample, or `dataset:key` of a published one
        ("verdict", pa.string()),  # `copy`, `copy with overlay`, `part` or `alternate`
        ("whole", pa.bool_()),  # whether whole images were compared, not the samples
        ("mirrored", pa.bool_()),  # whether the second one is a mirror image
        ("inliers", pa.int32()),  # local features that agree; 0 if the pair was aligned as a whole
        ("residual", pa.float32()),  # largest difference beyond the noise, in levels
        ("how", pa.string()),  # what was done to the second one
        (
            "transform",
            pa.list_(pa.float32(), 6),
        ),  # a to f: shares (x, y) of the second to ax + by + c, dx + ey + f of the first
    ]
)

#: All samples that were searched for candidates, in the order of the search.
SEARCHED = pa.schema(
    [
        ("digest", pa.binary(16)),  # see `animesion.pipeline.verdicts`
    ]
)

#: All pairs that were compared, ascending; those in a relation are the rows of `PAIRS`, in order.
COMPARED = pa.schema(
    [
        ("first", pa.uint32()),  # row of the sample in `features/searched.parquet`
        ("second", pa.uint32()),  # likewise
        ("hashes", pa.uint8()),  # which hashes were close: 1 plain, 2 mirrored, 4 of the whole images
        ("points", pa.uint8()),  # whether local features agreed: 1 plain, 2 mirrored
        ("related", pa.bool_()),  # whether the pair has a row in `features/pairs.parquet`
    ]
)

#: Every listed image: kept, with class, split and crop, or dropped, with the reason.
CURATED = pa.schema(
    [
        ("key", pa.string()),
        ("kept", pa.bool_()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("keeper", pa.string()),  # key of the image kept instead, for duplicates; `dataset:key` if published
        ("label", pa.string()),
        ("class_id", pa.int64()),  # -1 if dropped
        ("split", pa.string()),
        ("group", pa.string()),  # images of a group are in one split
        ("cluster", pa.string()),  # confirmed duplicates of one another
        ("resembles", pa.string()),  # key of what the next four are about: the keeper, or the closest relative
        ("verdict", pa.string()),  # `copy`, `copy with overlay`, `part`, `alternate`; empty if nothing was compared
        ("how", pa.string()),  # turn, mirror, crop and overlay, see `animesion.dedup.residual.Comparison`
        ("inliers", pa.int32()),  # local features that agree
        ("residual", pa.float32()),  # largest difference beyond the noise, in levels
        ("crop", pa.list_(pa.int32(), 4)),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("plain", pa.bool_()),
        ("source", pa.string()),
        ("source_id", pa.string()),
        ("page_url", pa.string()),
        ("file_url", pa.string()),
        ("licence", pa.string()),
        ("author", pa.string()),
        ("rating", pa.string()),
        ("md5", pa.string()),
        ("sha256", pa.string()),
        ("pixels_blake3", pa.string()),
        ("phash", pa.uint64()),
        ("part", pa.int32()),
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
        ("extension", pa.string()),
    ]
)

#: Location of each sample's image, for random access: `size` bytes at `offset` of `shard`.
INDEX = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("label", pa.int64()),
        ("sample_offset", pa.int64()),  # of the sample's first tar header
        ("sample_size", pa.int64()),  # including headers and padding of all members
        ("sha256", pa.string()),  # of the packed image's bytes
    ]
)
