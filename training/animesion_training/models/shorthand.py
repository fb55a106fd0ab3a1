"""Names of networks that include their methods, such as `evit50_clca_vit_base_patch16`.

Words before the name of a model are joined by underscores: a reduction, optionally with its keep rate in percent
(`evit`, `tome25`), `clca` (`clc` and `cla`), `clc`, `cla`, an adapter (`ila`, `ilap` for ILA+, `ilapp` for ILA++,
`lora`, `vptdeep`, ...), a selector (`glsim`, `cal`, ...), and `vilt` for a network that reads tags. With such names a
study is a list of strings. The usual combinations are registered with timm in `registration`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import timm

from animesion.errors import UsageError
from animesion_training.models.assemble import SELECTORS, TEXTS
from animesion_training.models.baselines import BASELINES
from animesion_training.models.methods import PARTS, Methods
from animesion_training.tokens.adapters.factory import ADAPTERS
from animesion_training.tokens.reductions.factory import REDUCTIONS

#: Word -> adapter; without hyphen and plus, which names in timm do not have.
ADAPTER_WORDS = {name.replace("+", "p").replace("-", ""): name for name in ADAPTERS}

_REDUCTION = re.compile(rf"({'|'.join(REDUCTIONS)})(\d{{1,3}})?")


def split_name(name: str) -> tuple[str, Methods, str]:
    """Split a name into the name of a model, the methods of its words, and its head, empty if it has none.

    A name without such words is returned unchanged.

    Raises:
        UsageError: two words for one kind of method, or a keep rate that is not a percentage.
    """
    words: list[str] = []
    rest = name
    while not _is_model(rest):
        word, underscore, after = rest.partition("_")
        if not underscore or not _is_word(word):  # not a name of ours: the caller reports it
            return name, Methods(), ""
        words.append(word)
        rest = after
    return (rest, *_parse_words(words, name)) if words else (name, Methods(), "")


def merge_methods(named: Methods, given: Methods, name: str) -> Methods:
    """Merge the methods of a name with those of arguments, which may add methods, keep rates, layers and options.

    Raises:
        UsageError: name and arguments have different methods of one kind.
    """
    if not named:
        return given
    merged = {}
    for part in PARTS:
        one, other = getattr(named, part), getattr(given, part)
        if one and other and one != other:
            raise UsageError(f"{name} has {part} {one}, and {other} is requested as well: leave one out")
        merged[part] = one or other
    rate = given.keep_rate if given.keep_rate != 1.0 else named.keep_rate
    return Methods(**merged, keep_rate=rate, reduction_layers=given.reduction_layers, options=given.options)


def _is_model(name: str) -> bool:
    """Whether a name is a baseline or a model of timm, and none of the combinations registered here."""
    architecture = name.partition(".")[0]
    return architecture in BASELINES or (timm.is_model(architecture) and architecture not in _REGISTERED)


def _is_word(word: str) -> bool:
    return bool(_REDUCTION.fullmatch(word)) or word in {"clca", "clc", "cla", *ADAPTER_WORDS, *SELECTORS, *TEXTS}


def _parse_words(words: list[str], name: str) -> tuple[Methods, str]:
    methods, head, rate = Methods(), "", 1.0
    for word in words:
        values: dict[str, Any] = {}
        if match := _REDUCTION.fullmatch(word):
            values["reduction"] = match[1]
            rate = int(match[2]) / 100 if match[2] else 1.0
            if not 0 < rate <= 1:
                raise UsageError(f"{name}: {match[2]} is not a percentage of tokens to keep: write 1 to 100")
            values["keep_rate"] = rate
        if word in ("clca", "clc"):
            values["cache"] = "clc"
        if word in ("clca", "cla"):
            head = "cla"
        if word in ADAPTER_WORDS:
            values["adapter"] = ADAPTER_WORDS[word]
        if word in SELECTORS:
            values["selector"] = word
        if word in TEXTS:
            values["text"] = word
        for part in values.keys() - {"keep_rate"}:
            if getattr(methods, part):
                raise UsageError(
                    f"{name} has two methods of the kind {part}, {getattr(methods, part)} and {values[part]}: "
                    "leave one out"
                )
        methods = replace(methods, **values)
    return methods, head


def combinations() -> Iterator[tuple[str, str, str]]:
    """The usual combinations on the baselines, in order: name, words of the methods, name of the baseline."""
    baselines = [name for name in BASELINES if name.startswith("vit_")]
    alone = [*REDUCTIONS, *ADAPTER_WORDS, *SELECTORS, *TEXTS, "clca"]
    with_clca = [f"{name}_clca" for name in REDUCTIONS]
    for words, baseline in itertools.product([*alone, *with_clca], baselines):
        yield f"{words}_{baseline}", words, baseline


#: Names that are registered with timm, in order; `registration` registers them.
NAMES = tuple(name for name, _, _ in combinations())
_REGISTERED = frozenset(NAMES)
