"""Names that say which methods a network carries, so that a study is a list of strings: `evit50_clca_vit_base_patch16`.

In front of a model's name stand words joined by underscores: a reduction, with its keep rate in percent if there is
one (`evit`, `tome25`), `clca` (`clc` and `cla`), `clc`, `cla`, an adapter (`ila`, `ilap` for ILA+, `ilapp` for ILA++,
`lora`, `vptdeep`, ...) and a selector (`glsim`, `cal`, ...). Usual combinations on the baselines are registered with
timm.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import timm

from animesion.errors import UsageError
from animesion_training.models.assemble import SELECTORS
from animesion_training.models.baselines import BASELINES
from animesion_training.models.methods import Methods
from animesion_training.tokens.adapters.factory import ADAPTERS
from animesion_training.tokens.reductions.factory import REDUCTIONS

#: Word -> adapter; no hyphen and no plus, as timm's names have none.
ADAPTER_WORDS = {name.replace("+", "p").replace("-", ""): name for name in ADAPTERS}

_REDUCTION = re.compile(rf"({'|'.join(REDUCTIONS)})(\d{{1,3}})?")


def split_name(name: str) -> tuple[str, Methods, str]:
    """A name without its words, the methods that they stand for, and the head, empty for none.

    A name that is not made this way comes back as it is.

    Raises:
        UsageError: two words that say different things of one method, or a keep rate that is no percentage.
    """
    words: list[str] = []
    rest = name
    while not _is_model(rest):
        word, underscore, after = rest.partition("_")
        if not underscore or not _is_word(word):
            return name, Methods(), ""
        words.append(word)
        rest = after
    return (rest, *_meaning(words, name)) if words else (name, Methods(), "")


def merge_methods(named: Methods, given: Methods, name: str) -> Methods:
    """Methods of a name and of arguments; arguments may add to a name and set keep rates, layers and options.

    Raises:
        UsageError: both name a method, and not the same.
    """
    if not named:
        return given
    parts = {}
    for part in ("reduction", "cache", "adapter", "selector"):
        one, other = getattr(named, part), getattr(given, part)
        if one and other and one != other:
            raise UsageError(f"{name} says {part} {one}, and {other} is asked for: say it once")
        parts[part] = one or other
    rate = given.keep_rate if given.keep_rate != 1.0 else named.keep_rate
    return Methods(**parts, keep_rate=rate, reduction_layers=given.reduction_layers, options=given.options)


def _is_model(name: str) -> bool:
    architecture = name.partition(".")[0]
    return architecture in BASELINES or (timm.is_model(architecture) and architecture not in _REGISTERED)


def _is_word(word: str) -> bool:
    return bool(_REDUCTION.fullmatch(word)) or word in {"clca", "clc", "cla", *ADAPTER_WORDS, *SELECTORS}


def _meaning(words: list[str], name: str) -> tuple[Methods, str]:
    methods, head, rate = Methods(), "", 1.0
    for word in words:
        values: dict[str, Any] = {}
        if match := _REDUCTION.fullmatch(word):
            values["reduction"] = match[1]
            rate = int(match[2]) / 100 if match[2] else 1.0
            if not 0 < rate <= 1:
                raise UsageError(f"{name}: {match[2]} percent of the tokens cannot be kept; write 1 to 100")
            values["keep_rate"] = rate
        if word in ("clca", "clc"):
            values["cache"] = "clc"
        if word in ("clca", "cla"):
            head = "cla"
        if word in ADAPTER_WORDS:
            values["adapter"] = ADAPTER_WORDS[word]
        if word in SELECTORS:
            values["selector"] = word
        for part in values.keys() - {"keep_rate"}:
            if getattr(methods, part):
                raise UsageError(
                    f"{name} names two methods of the kind {part}: {getattr(methods, part)}, {values[part]}"
                )
        methods = replace(methods, **values)
    return methods, head


def combinations() -> Iterator[tuple[str, str, str]]:
    """The usual combinations on the baselines, in order: name, words for the methods, name of the baseline."""
    baselines = [name for name in BASELINES if name.startswith("vit_")]
    alone = [*REDUCTIONS, *ADAPTER_WORDS, *SELECTORS, "clca"]
    with_clca = [f"{name}_clca" for name in REDUCTIONS]
    for words, baseline in itertools.product([*alone, *with_clca], baselines):
        yield f"{words}_{baseline}", words, baseline


#: Names that are registered with timm, in order; `registration` registers them.
NAMES = tuple(name for name, _, _ in combinations())
_REGISTERED = frozenset(NAMES)
