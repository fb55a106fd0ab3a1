"""The search language of the sample booru: tags, excluded tags and free metatags.

As on Danbooru, a search may have two tags; metatags such as ``rating:`` and ``id:`` do not count.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

from animesion_sample.world import SamplePost

TAG_LIMIT = 2

_Test = Callable[[SamplePost], bool]


class TagLimitError(ValueError):
    """A search has more tags than allowed for anonymous callers."""


class BadQueryError(ValueError):
    """A metatag has an invalid value."""


def compile_query(tags: str) -> _Test:
    """Compile a search such as ``some_tag -other rating:g,s id:<5000`` to a test for posts.

    Raises:
        TagLimitError: More than two tags count.
        BadQueryError: The value of a metatag is invalid.
    """
    tests: list[_Test] = []
    costly = 0
    for word in tags.split():
        negated = word.startswith("-") and len(word) > 1
        term = word[1:] if negated else word
        name, colon, value = term.partition(":")
        make = _METATAGS.get(name.lower()) if colon else None
        if make is None:
            costly += 1
            test = _has_tag(term.lower())
        else:
            test = make(value)
        tests.append(_negation(test) if negated else test)
    if costly > TAG_LIMIT:
        raise TagLimitError(f"You cannot search for more than {TAG_LIMIT} tags at a time.")
    return lambda post: all(test(post) for test in tests)


def _negation(test: _Test) -> _Test:
    return lambda post: not test(post)


def _has_tag(tag: str) -> _Test:
    return lambda post: tag in post.tags


def _rating(value: str) -> _Test:
    allowed = {part[:1].lower() for part in value.split(",")}
    return lambda post: post.rating in allowed


def _status(value: str) -> _Test:
    if value in ("active", "deleted"):
        return lambda post: post.deleted == (value == "deleted")
    return lambda post: value in ("any", "all")


def _parent(value: str) -> _Test:
    if value == "none":
        return lambda post: post.parent_id is None
    if value == "any":
        return lambda post: post.parent_id is not None
    number = _number(value)
    return lambda post: number in (post.parent_id, post.id)


def _order(value: str) -> _Test:
    if value not in ("id", "id_desc"):
        raise BadQueryError(f"order:{value} is not known here; posts come newest first")
    return lambda post: True


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise BadQueryError(f"{text!r} is not a number") from None


def _compare(key: Callable[[SamplePost], int], compare: Callable[[int, int], bool], edge: int) -> _Test:
    return lambda post: compare(key(post), edge)


def _range(key: Callable[[SamplePost], int]) -> Callable[[str], _Test]:
    def make(value: str) -> _Test:
        for sign, compare in ((">=", operator.ge), ("<=", operator.le), (">", operator.gt), ("<", operator.lt)):
            if value.startswith(sign):
                return _compare(key, compare, _number(value[len(sign) :]))
        if ".." in value:
            low, _, high = value.partition("..")
            first, last = _number(low) if low else None, _number(high) if high else None
            return lambda post: (first is None or key(post) >= first) and (last is None or key(post) <= last)
        allowed = {_number(part) for part in value.split(",")}
        return lambda post: key(post) in allowed

    return make


_METATAGS: dict[str, Callable[[str], _Test]] = {
    "rating": _rating,
    "status": _status,
    "id": _range(lambda post: post.id),
    "width": _range(lambda post: post.size[0]),
    "height": _range(lambda post: post.size[1]),
    "pixiv_id": _range(lambda post: post.pixiv_id or 0),
    "filetype": lambda value: lambda post: post.ext in value.split(","),
    "parent": _parent,
    "order": _order,
}
