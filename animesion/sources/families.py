"""Which files come from one image or one post, by their names: copies, crops, pages of a work.

Sources that list files pass tokens on with their items; `animesion.pipeline.curate` reads all names once more, and
`animesion.verification` does to find leaks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, NamedTuple
from urllib.parse import unquote

from pydantic import AfterValidator, Field

from animesion.config.recipe import Recipe
from animesion.errors import UsageError
from animesion.sources import source_class

#: What a stem begins or ends with when it is made from another image of the same class.
_AFFIXES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?P<base>.+?)(?:[._](?:jpe?g|png|webp|bmp))?\.rf\.[0-9a-z]{16,}",  # Roboflow
        r"aug(?:mented)?[-_ ]?\d*[-_ ](?P<base>.+)",
        r"(?P<base>.+?)[-_ ]aug(?:mented)?[-_ ]?\d*",
        r"(?P<base>.+?)[-_ ](?:face|crop|head|person|part|patch|tile|box)[-_ ]?\d+",
        r"(?P<base>.+?)[-_ ]?\(\d+\)",
        r"(?P<base>.+?)[-_ ]+(?:copy|kopie|copie|copia)(?:[-_ ]?\(?\d+\)?)?",
        r"(?P<base>.+?) - コピー(?: \(\d+\))?",
        r"(?P<base>.+?)[-_ ](?:rot(?:ated?|ation)?|turn(?:ed)?)[-_ ]?-?\d*",
        r"(?P<base>.+?)[-_ ](?:[hv]?flip(?:ped)?|mirror(?:ed)?|fliplr|flipud)",
        r"(?P<base>.+?)[-_ ](?:resized?|scaled|blur(?:red)?|noisy?|bright(?:er|ness)?|dark(?:er)?|contrast)[-_ ]?\d*",
        r"(?P<base>.+?)[-_ ](?:master|square|custom)\d{3,4}",  # pixiv's sizes
    )
)

#: What every name with an affix contains; most names contain none of it, which saves trying the patterns.
_HINT = re.compile(
    r"\.rf\.|aug|face|crop|head|person|part|patch|tile|box|\(|copy|kopie|copie|copia|コピー|rot|turn|flip|mirror|resize"
    r"|scaled|blur|nois|bright|dark|contrast|master|square|custom"
)  # on lower case: with IGNORECASE it takes ten times as long

#: A digest of 32, 40 or 64 digits, wherever the stem has it: the post's file.
_DIGEST = re.compile(r"(?:.*[-_])?((?:[0-9a-f]{64}|[0-9a-f]{40}|[0-9a-f]{32})(?![0-9a-f]))(?:[-_.].*)?")

#: Page of a work on pixiv: at least six digits, so that `12_p1` of anything else is none.
_PIXIV = re.compile(r"(?:.*[-_ ])?(\d{6,12})_p\d{1,3}")

#: A post by its site and number.
_POST = re.compile(
    r"(?:.*[-_ ])?(danbooru|gelbooru|safebooru|yandere|yande\.re|konachan|zerochan|sankaku|rule34|pixiv)[-_ ](\d+)"
    r"(?:[-_ .].*)?",
    re.IGNORECASE,
)

_SEPARATOR = re.compile("[-_ ]")

#: Host and path of a URL.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://([^/?#]*)([^?#]*)")


def _checked(value: str) -> str:
    if value in {"", "auto"}:
        return value
    try:
        groups = re.compile(value).groups
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    if groups < 1:
        raise ValueError("the regular expression needs a group, such as '(.+)-[0-9]+'")
    return value


#: Option of a source whose images have names.
Family = Annotated[
    str,
    AfterValidator(_checked),
    Field(
        description="images of one family stay in one split. `auto` knows digests (<md5>-<k>.jpg), posts "
        "(danbooru_<id>_face0), works (<work>_p0) and copies (aug_3_<name>, <name>_rot90, <name> (1)); or a regular "
        "expression for a file's stem, whose equal first groups are a family; empty for none"
    ),
]


class Name(NamedTuple):
    """What a file's name says about its family.

    Attributes:
        token: of the digest, post or work in the name; empty if there is none.
        base: token of the name without affixes, within its scope.
        affixed: whether the name has affixes.
    """

    token: str
    base: str
    affixed: bool


def named(source_id: str, label: str) -> tuple[str, str]:
    """Stem and scope of an image by its source's id: names with affixes are compared within a scope.

    The scope of a path is its class. That of a URL is a folder of its host within the class, as unlike hosts have
    `image (1).jpg`.
    """
    match = _URL.match(source_id)
    if match is None:
        return _stem(source_id.replace("\\", "/").rpartition("/")[2]), label
    path = unquote(match[2]) if "%" in match[2] else match[2]
    folder, _, name = path.rpartition("/")
    return _stem(name), f"{label}/{match[1].lower()}{folder}"


def read(stem: str, scope: str) -> Name:
    """Read one name, as `auto` does.

    Args:
        stem: file name without its suffix.
        scope: as `named` returns it.
    """
    base = _base(stem)
    token = _post(base) or (_post(stem) if base != stem else "")
    return Name(token, f"name:{scope}/{base}", base != stem)


def tokens(stems: Sequence[str], scopes: Sequence[str], family: str = "auto") -> list[tuple[str, ...]]:
    """The families of files by their stems; files that share a token come from one image or post.

    Digests and numbers of posts count across classes. An affix such as `_rot90` counts within a class, and only where
    some file has one: `1.jpg` in two folders are two images.

    Args:
        stems: file names without their suffix.
        scopes: class of each file, or scope as `named` returns it; empty for none.
        family: `auto`, a regular expression, or empty, as in the option.
    """
    if family != "auto":
        return [matched(stem, family) for stem in stems]
    may_be = (read(stem, scope) for stem, scope in zip(stems, scopes, strict=True) if _HINT.search(stem.casefold()))
    affixed = {name.base for name in may_be if name.affixed and not name.token}
    names = map(read, stems, scopes)
    return [(name.token,) if name.token else (name.base,) if name.base in affixed else () for name in names]


def of_images(family: str, source_ids: Sequence[str], labels: Sequence[str]) -> list[tuple[str, ...]]:
    """The families of a data set's images by the ids of their source; none unless the option is `auto`.

    A regular expression has been applied when the images were listed.

    Args:
        family: the option.
        source_ids: paths or URLs, or other ids, which name no family.
        labels: class of each image.
    """
    if family != "auto":
        return [()] * len(source_ids)
    [found] = in_batches(lambda: iter([(source_ids, labels)]))
    return found


def in_batches(
    batches: Callable[[], Iterator[tuple[Sequence[str], Sequence[str]]]],
) -> Iterator[list[tuple[str, ...]]]:
    """The families of a data set's images as `of_images` finds them with `auto`, some of the images at a time.

    Args:
        batches: starts to return the ids and labels of some images at a time; called twice.
    """
    affixed = set()
    for source_ids, labels in batches():
        for source_id, label in zip(source_ids, labels, strict=True):
            if _is_number(source_id):
                continue
            stem, scope = named(source_id, label)
            if _HINT.search(stem.casefold()):
                name = read(stem, scope)
                if name.affixed and not name.token:
                    affixed.add(name.base)
    for source_ids, labels in batches():
        found: list[tuple[str, ...]] = []
        for source_id, label in zip(source_ids, labels, strict=True):
            if not affixed and _is_number(source_id):
                found.append(())
                continue
            name = read(*named(source_id, label))
            found.append((name.token,) if name.token else (name.base,) if name.base in affixed else ())
        yield found


def _is_number(source_id: str) -> bool:
    """Whether an id is a number, which has no affix, and too short to be a digest."""
    return len(source_id) < 32 and source_id.isascii() and source_id.isdigit()


def matched(stem: str, family: str) -> tuple[str, ...]:
    """The family of a file by a regular expression for its stem; none if it does not match, or is empty."""
    match = re.fullmatch(family, stem) if family else None
    return (f"file:{match[1]}",) if match and match[1] else ()


def option_of(recipe: Recipe) -> str:
    """The recipe's `source.family`; `auto` by default, and empty for a source whose images have no names."""
    option = recipe.source.options.get("family")
    if option is None:
        try:
            field = source_class(recipe.source.kind).Options.model_fields.get("family")
        except UsageError:  # a source of another package
            return ""
        option = field.default if field else ""
    return str(option)


def _stem(name: str) -> str:
    """A file name without its suffix."""
    stem, _, suffix = name.rpartition(".")
    return stem if stem and suffix else name


def _post(stem: str) -> str:
    """Token of a digest or of a post's number; empty where the stem has neither."""
    if len(stem) >= 32 and (match := _DIGEST.fullmatch(stem)):
        return f"file:{match[1]}"
    if "_p" in stem and (match := _PIXIV.fullmatch(stem)):
        return f"pixiv:{int(match[1])}"
    if _SEPARATOR.search(stem) and (match := _POST.fullmatch(stem)):
        return f"post:{match[1].lower()}-{int(match[2])}"
    return ""


def _base(stem: str) -> str:
    """The stem without what copies add to it."""
    if not _HINT.search(stem.casefold()):
        return stem
    for _ in range(8):  # `x_face0 (1)_rot90`
        match = next((match for affix in _AFFIXES if (match := affix.fullmatch(stem))), None)
        if match is None:
            return stem
        stem = match["base"]
    return stem
