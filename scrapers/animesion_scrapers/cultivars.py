"""Cultivar names in titles and scientific names: `Rosa 'Peace'` is the cultivar Peace of Rosa.

The form is that of the International Code of Nomenclature for Cultivated Plants, art. 14: a taxon, then the epithet in
single quotes. Titles vary in their quotation marks, hybrid signs, groups and trade designations; other forms are not
parsed.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

_OPENING = "'‘’‛`´′‹\"“”„″«"
_CLOSING = "'’‘`´′›\"”“″»"
_EPITHET = re.compile(rf"(?:^|(?<=[\s(]))[{_OPENING}](?P<name>[^\s{_OPENING}].*?)[{_CLOSING}](?=$|[\s),.;:/])")
_CV = re.compile(r"(?:^|\s)cv\.?\s+(?P<name>[A-Z][\w'’.-]*(?:\s+[A-Z0-9][\w'’.-]*)*)$")
_GENUS = re.compile(r"[A-Z][a-z]+(?:-[a-z]+)?")
_WORD = re.compile(r"[a-z]{2,}(?:-[a-z]+)*")
_RANKS = frozenset({"subsp.", "ssp.", "var.", "f.", "forma", "sect.", "subg.", "convar.", "nothosubsp.", "nothovar."})
_GROUPS = frozenset({"Group", "Grex", "Gruppe"})
_LONGEST = 100
_ARTICLES = frozenset({"The", "An", "Der", "Die", "Das", "Le", "La", "Les", "El", "Los", "Las", "Il", "De", "Het"})
_NO_TAXA = frozenset(
    {"of", "in", "at", "from", "by", "with", "on", "and", "the", "named", "called", "cultivar", "cultivars", "rose"}
)


@dataclass(frozen=True, slots=True)
class Cultivar:
    """A cultivar.

    Attributes:
        taxon: Its genus, species or hybrid, such as `Rosa`, `Malus domestica` or `Rosa × damascena`.
        epithet: Name of the cultivar, without quotes.
    """

    taxon: str
    epithet: str

    def __str__(self) -> str:
        return f"{self.taxon} '{self.epithet}'"


def parse(text: str) -> Cultivar | None:
    """Parse the cultivar in a title or scientific name.

    Args:
        text: A name such as `Rosa 'Peace'`, `Rosa ‘Peace’ (flowers)`, `Malus × domestica "Gala"`, `Rosa cv. Peace`,
            `Hosta (Tardiana Group) 'Halcyon'` or `Rosa PEACE ('Madame A. Meilland')`, without a namespace such as
            `Category:`.

    Returns:
        The cultivar, or None if the text has no taxon followed by an epithet.
    """
    line = " ".join(unicodedata.normalize("NFC", text[: 10 * _LONGEST]).replace("_", " ").split())
    found = _EPITHET.search(line) or _CV.search(line)
    if not found:
        return None
    epithet = found["name"].strip()
    taxon = taxon_name(line[: found.start()].rstrip(" ("))
    if not taxon or not 0 < len(epithet) <= _LONGEST or not any(letter.isalnum() for letter in epithet):
        return None
    return Cultivar(taxon, epithet)


def taxon_name(text: str) -> str:
    """The taxon at the start of a name: genus, hybrid sign, epithets and their ranks; empty if there is none.

    A following group, in brackets or in words, and a trade designation in capitals are left out.
    """
    words = re.sub(r"\([^)]*\)?", " ", text).split()
    if words and words[0] in {"×", "x", "X"}:
        words = words[1:]
    if not words or words[0] in _ARTICLES or not _GENUS.fullmatch(words[0].lstrip("×")):
        return ""
    taken = [words[0].lstrip("×")]
    rest = iter(words[1:])
    for word in rest:
        sign = word in {"×", "x", "X"}
        if sign or word in _RANKS:
            taken.append("×" if sign else word)
        elif word.startswith("×") and _WORD.fullmatch(word[1:]):
            taken += ["×", word[1:]]
        elif word in _NO_TAXA:
            return ""
        elif _WORD.fullmatch(word):
            taken.append(word)
        # a trade designation in capitals, or a group: `Hosta Tardiana Group`
        elif word.isupper() or word in _GROUPS or next(rest, "") in _GROUPS:
            break
        else:
            return ""
    while len(taken) > 1 and (taken[-1] in _RANKS or taken[-1] == "×"):
        taken.pop()
    return " ".join(taken) if len(taken) <= 6 else ""
