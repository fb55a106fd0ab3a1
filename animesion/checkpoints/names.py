"""Prefixes of parameter names: trainers wrap a network, so its names begin with `module.`, `model.` and others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from animesion.errors import UsageError

#: Prefixes of wrappers, cut from names of which none is known, if all of them have it.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "net.")
#: Prefixes that are taken before others which fit as well.
_USUAL = ("model.", "net.", "network.", "module.", "backbone.", "encoder.")
_AVERAGED = re.compile(r"(?:^|[._])(?:ema|averaged|swa|momentum)(?:[._]|$)")
#: Share of the best prefix's matches with which another one fits as well.
_AS_GOOD = 0.9
#: Least share of the names that must be known; fewer are accidents of names in another dialect, which timm converts.
_LEAST = 0.25


def cut_prefix(
    tensors: Mapping[str, Tensor], known: Collection[str], path: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """Cut the prefix under which most names are known, from the names that have it.

    Names without the prefix are kept if they are known, such as a head outside of the wrapped network, and left out
    otherwise, such as the weights of a loss.

    Args:
        tensors: weights by name.
        known: names of the network.
        path: the file, for messages.

    Returns:
        The weights, and notes on what was cut and left out.

    Raises:
        UsageError: several prefixes fit, or a name exists with and without the prefix.
    """
    prefix, note = _choose(tensors, known, path)
    notes = [note] if note else []
    if not prefix:
        return dict(tensors), notes
    cut = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    outside = {key: value for key, value in tensors.items() if not key.startswith(prefix)}
    kept = {key: value for key, value in outside.items() if key in known}
    if twice := sorted(kept.keys() & cut.keys()):
        raise UsageError(f"{path} has {twice[0]} twice, with and without the prefix {prefix!r}: leave one out")
    notes.append(f"prefix {prefix!r} cut")
    if left := sorted(outside.keys() - kept.keys()):
        shown = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        notes.append(f"{len(left)} tensor{'' if len(left) == 1 else 's'} outside of it left out ({shown})")
    return cut | kept, notes


def _choose(tensors: Mapping[str, Tensor], known: Collection[str], path: Path) -> tuple[str, str]:
    matches: Counter[str] = Counter()
    for key in tensors:
        parts = key.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in known:
                matches["".join(f"{part}." for part in parts[:i])] += 1
    best = max(matches.values(), default=0)
    if best < _LEAST * min(len(tensors), len(known)):
        return _wrappers(tensors), ""
    if matches[""] >= _AS_GOOD * best:
        return "", ""
    rivals = [prefix for prefix, count in matches.items() if count >= _AS_GOOD * best]
    if len(rivals) == 1:
        return rivals[0], ""
    others = ", ".join(map(repr, sorted(rivals)))
    for kind in ([each for each in rivals if _AVERAGED.search(each)], [each for each in _USUAL if each in rivals]):
        if kind:
            return kind[0], f"of the networks under {others} that under {kind[0]!r} was taken"
    raise UsageError(f"{path} contains networks under {others}, which all fit: save one of them alone")


def _wrappers(tensors: Mapping[str, Tensor]) -> str:
    """The prefixes of wrappers that all names have, nested in any order."""
    found = ""
    for _ in range(2 * len(_WRAPPERS)):
        for wrapper in _WRAPPERS:
            if all(key.startswith(found + wrapper) for key in tensors):
                found += wrapper
    return found
