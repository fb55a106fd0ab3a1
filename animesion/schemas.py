"""The tables that a build passes from stage to stage, field by field, and the vocabulary of drop reasons.

`Item` is one image as a source lists it; `RAW`, `FEATURES`, `CURATED` and `INDEX` are the Arrow schemas of
`raw/part-*.parquet`, `features/part-*.parquet`, `curated.parquet` and `index.parquet`. Nothing here reads or writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Self

import pyarrow as pa


class Box(NamedTuple):
    """A head or face box, relative to the upright image: 0 is left/top, 1 is right/bottom."""

    left: float
    top: float
    right: float
    bottom: float
    score: float


@dataclass(frozen=True, slots=True)
class Item:
    """One image as its source lists it, before a byte of it was read. Unknown text is empty, never None.

    Attributes:
        key: unique in the build, `[a-z0-9_-]+`, such as `danbooru-1796291`.
        source: the kind of source, such as `danbooru` or `folder`.
        source_id: what the source calls the image (post id, relative path).
        locator: how the source finds the bytes again (path, offset, URL as JSON); private to the source.
        order: position in the source's own order.
        labels: candidate labels (character tags, class folder); the recipe decides which count.
        families: tokens such as `post:12`, `pixiv:7`, `url:...`; images that share one stay in one split.
        boxes: head boxes known from a table; None when no table was given.
        split: the published split, if the source has one.
        class_order: published class id, or -1; orders the class map.
        flags: what the source says of the post's state, such as `deleted`.
        failure: drop reason when the source already knows that there are no bytes to read.
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


@dataclass(frozen=True, slots=True)
class Payload:
    """What a source answers when asked for the bytes of an item: bytes, or the reason why there are none.

    A digest of the bytes that is known already comes with its kind, such as `md5:0123...`.
    """

    content: bytes = b""
    reason: str = ""
    detail: str = ""
    digest: str = ""


class DropReason(StrEnum):
    """Every reason an image can be dropped for, in the order in which they are checked: the first that applies counts.

    A member equals its text, so tables and JSON hold plain strings.

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
    # what the source's own metadata says; decided before a byte is fetched
    DELETED = "deleted", "the source marks the post as deleted, banned or pending"
    NO_LABEL = "no label", "no candidate label"
    SEVERAL_LABELS = "several labels", "more than one candidate label"
    EXCLUDED_LABEL = "excluded label", "the recipe leaves this label out"
    RATING = "rating", "rating outside the recipe's list"
    LICENCE = "licence", "licence outside the recipe's list, or none stated"
    NO_FACE = "no face", "no face box in the image"
    SEVERAL_FACES = "several faces", "more than one face box"
    UNSURE_FACE = "unsure face", "the face box's score is below the recipe's minimum"
    # fetch
    UNSAFE_PATH = "unsafe path", "absolute path or `..` in the source's file name"
    NOT_A_REGULAR_FILE = "not a regular file", "a link, device or directory where a file was due"
    MISSING_FILE = "missing file", "the file is not where the source says"
    NOT_FOUND = "not found", "the server has no such file (404, 410, 451)"
    REFUSED = "refused", "the server refuses the file (401, 403)"
    CHECKSUM_MISMATCH = "checksum mismatch", "the bytes are not those that the source announced"
    TOO_MANY_BYTES = "too many bytes", "larger than the byte limit"
    TIMED_OUT = "timed out", "the file did not arrive in time"
    UNSAFE_ADDRESS = "unsafe address", "the URL leads to a private address or a scheme other than http(s)"
    FETCH_FAILED = "fetch failed", "the file could not be read; the detail says why"
    # inspect
    EMPTY_FILE = "empty file", "zero bytes"
    NOT_AN_IMAGE = "not an image", "the bytes are of no known image format"
    UNSUPPORTED_FORMAT = "unsupported format", "a video, archive or image format that is not read"
    TOO_MANY_PIXELS = "too many pixels", "more pixels, or a longer side, than the decoder is allowed"
    TRUNCATED_IMAGE = "truncated image", "the file ends before the image does"
    CORRUPT_IMAGE = "corrupt image", "the decoder refuses the file"
    ANIMATED = "animated", "more than one frame"
    CRASHED_DECODER = "crashed decoder", "decoding it killed the worker process"
    # filter
    TOO_LARGE = "too large", "packed as the recipe says, it would exceed what the encoder or the decoder's limits allow"
    TOO_SMALL = "too small", "a side is below the recipe's minimum"
    ASPECT_RATIO = "aspect ratio", "long side over short side above the recipe's maximum"
    SMALL_FACE = "small face", "the face crop is below the recipe's minimum side or share of the image"
    CUT_FACE = "cut face", "the crop reaches out of the image"
    # quality
    TOO_DARK = "too dark", "even the lightest pixels are darker than the recipe allows"
    TOO_BRIGHT = "too bright", "even the darkest pixels are lighter than the recipe allows"
    BLANK = "blank", "less contrast than the recipe's minimum"
    BLURRED = "blurred", "less sharp than the recipe's minimum"
    GREYSCALE = "greyscale", "fewer colours than the recipe's minimum: grey, or of one tint"
    HEAVY_COMPRESSION = "heavy compression", "a JPEG of a quality below the recipe's minimum"
    BORDERS = "borders", "plain bars take more of the image than the recipe's maximum"
    COMIC_PAGE = "comic page", "plain gutters cut it into more parts than the recipe's maximum"
    TEXT_PAGE = "text page", "more lines of text than the recipe's maximum"
    # what a person decided
    EXCLUDED_BY_DECISION = "excluded by decision", "a person took it out (`curate.decisions`)"
    # duplicates
    PUBLISHED_DUPLICATE = "published duplicate", "the same image is in a published dataset that the recipe names"
    LABEL_CONFLICT = "label conflict", "the same image stands under two labels"
    EXACT_DUPLICATE = "exact duplicate", "the same bytes as another image"
    PIXEL_DUPLICATE = "pixel duplicate", "other bytes, the same decoded pixels"
    NEAR_DUPLICATE = "near duplicate", "perceptual hash and fine check both say it is the same image"
    DUPLICATE_BY_DECISION = "duplicate by decision", "a person said that it is the same image (`curate.decisions`)"
    # classes and splits
    NO_PUBLISHED_SPLIT = "no published split", "the source publishes splits but none for this image"
    RARE_CLASS = "rare class", "the class has fewer images than the recipe's minimum"
    OVER_CLASS_CAP = "over class cap", "the class has more images than the recipe's cap"


#: Reason -> what it means, for reasons read from tables.
MEANINGS: dict[str, str] = {reason.value: reason.meaning for reason in DropReason}


_BOX = pa.struct([(name, pa.float32()) for name in Box._fields])

_LISTED = [
    ("key", pa.string()),
    ("source", pa.string()),
    ("source_id", pa.string()),
    ("order", pa.int64()),
    ("labels", pa.list_(pa.string())),
    ("families", pa.list_(pa.string())),
    ("boxes", pa.list_(_BOX)),  # null when no table of boxes was given
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

#: What a source lists: one row an `Item`, field by field.
PLAN = pa.schema([*_LISTED, ("locator", pa.string()), ("failure", pa.string()), ("detail", pa.string())])

#: What a source lists, plus what fetching it gave: md5 and bytes are now those of the file that came.
RAW = pa.schema(
    [
        *_LISTED,
        ("sha256", pa.string()),
        ("extension", pa.string()),  # sniffed from the bytes, never taken from the file name
        ("offset", pa.int64()),  # of the bytes inside the part's tar
        ("reason", pa.string()),  # empty when the bytes are in the part's tar
        ("detail", pa.string()),
    ]
)

#: Side of the colour thumbnail that the fine duplicate check compares.
THUMBNAIL_SIDE = 16

#: What one decode tells, one row an image that has bytes.
FEATURES = pa.schema(
    [
        ("key", pa.string()),
        ("reason", pa.string()),  # empty when the image decodes
        ("detail", pa.string()),
        ("format", pa.string()),
        ("mode", pa.string()),  # of the file, before conversion to RGB
        ("width", pa.int32()),  # of the upright image
        ("height", pa.int32()),
        ("plain", pa.bool_()),  # the bytes decode to the same RGB in any reader: no rotation, palette, alpha, CMYK
        ("pixels_blake3", pa.string()),  # of size and RGB bytes
        ("boxes", pa.list_(_BOX)),  # what the detector gave, on the image's first row; null when it was not asked
        ("faces", pa.int32()),  # boxes the detector gave; -1 when it was not asked
        ("face", pa.int32()),  # 0 for the image's sample; from 1 on where each face is a sample, the surest first
        ("face_score", pa.float32()),  # of the sample's box, the best one where there is a choice
        ("crop", pa.list_(pa.int32(), 4)),  # left, top, right, bottom in pixels of the upright image; null: whole
        ("phash", pa.uint64()),  # of what will be packed: the crop, or the whole image
        ("phash_flip", pa.uint64()),  # of its mirror image
        ("thumbnail", pa.binary(THUMBNAIL_SIDE * THUMBNAIL_SIDE * 3)),
        ("jpeg_quality", pa.int32()),  # 1 to 100 from the quantisation table of the file; -1 when it is no JPEG
        ("sharpness", pa.float32()),  # of the sample, like all below: variance of the Laplacian of the reduced copy
        ("light", pa.int32()),  # grey level that 99% of the pixels do not exceed
        ("dark", pa.int32()),  # grey level that 95% of the pixels reach
        ("contrast", pa.float32()),  # standard deviation of the grey levels
        ("chroma", pa.float32()),  # deviation of the colours; 0 for grey and for one tint
        ("border", pa.float32()),  # share that plain bars along the edges take
        ("panels", pa.int32()),  # parts that plain gutters cut it into
        ("lines", pa.int32()),  # rows that look like a line of text
    ]
)


def sample_key(key: str, face: int | None) -> str:
    """The key of a sample: the image's, with `-face` and the number where each of its faces is one."""
    return f"{key}-face{face}" if face else key


#: What a model says of an image, one row an image that decodes; only where the recipe asks for it.
EMBEDDINGS = pa.schema(
    [
        ("key", pa.string()),
        ("embedding", pa.list_(pa.float32())),  # of unit length, of the crop or the whole image
    ]
)

#: Every image ever seen: kept, with class, split and crop; or dropped, with the reason.
CURATED = pa.schema(
    [
        ("key", pa.string()),
        ("kept", pa.bool_()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("keeper", pa.string()),  # key of the image kept instead, for duplicates; `dataset:key` if published
        ("label", pa.string()),
        ("class_id", pa.int64()),  # -1 when dropped
        ("split", pa.string()),
        ("group", pa.string()),  # images of a group never straddle splits
        ("cluster", pa.string()),  # confirmed duplicates of one another
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

#: Where each sample's image lies, for random access: `size` bytes at `offset` of `shard`.
INDEX = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("label", pa.int64()),
        ("sample_offset", pa.int64()),  # of the sample's first tar header
        ("sample_size", pa.int64()),  # headers and padding of all its members included
        ("sha256", pa.string()),  # of the packed image's bytes
    ]
)
