"""Names of cultivars and spellings of licences, as sites write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from animesion_scrapers.cultivars import Cultivar, parse, taxon_name
from animesion_scrapers.licences import licence_id


@pytest.mark.parametrize(
    ("text", "taxon", "epithet"),
    [
        ("Rosa 'Peace'", "Rosa", "Peace"),
        ("Rosa_'Peace'", "Rosa", "Peace"),
        ("Rosa ‘Peace’ (flowers)", "Rosa", "Peace"),
        ("Rosa `Peace´", "Rosa", "Peace"),
        ("Rosa “Peace”", "Rosa", "Peace"),
        ('Malus × domestica "Gala"', "Malus × domestica", "Gala"),
        ("Malus ×domestica 'Gala'", "Malus × domestica", "Gala"),
        ("Rosa x damascena 'Trigintipetala'", "Rosa × damascena", "Trigintipetala"),
        ("× Heucherella 'Stoplight'", "Heucherella", "Stoplight"),
        ("Brassica oleracea var. capitata 'January King'", "Brassica oleracea var. capitata", "January King"),
        ("Brassica oleracea Capitata Group 'Red Jewel'", "Brassica oleracea", "Red Jewel"),
        ("Hosta (Tardiana Group) 'Halcyon'", "Hosta", "Halcyon"),
        ("Rosa PEACE ('Madame A. Meilland')", "Rosa", "Madame A. Meilland"),
        ("Rosa 'Souvenir d'Anne'", "Rosa", "Souvenir d'Anne"),
        ("Rosa 'L.D. Braithwaite'", "Rosa", "L.D. Braithwaite"),
        ("Glycine max 'Williams 82'", "Glycine max", "Williams 82"),
        ("Acer palmatum 'Ō-kagami' in autumn", "Acer palmatum", "Ō-kagami"),
        ("Rosa cv. Peace", "Rosa", "Peace"),
    ],
)
def test_cultivars(text: str, taxon: str, epithet: str) -> None:
    assert parse(text) == Cultivar(taxon, epithet)


@pytest.mark.parametrize(
    "text",
    [
        *("", "Rosa", "Rosa ''", "Rosa '  '", "Rosa '...'", "'Peace'", "Gardens in 'Berlin'", "Cultivars of Rosa 'X'"),
        *("The 'Peace' rose", "Hydrangea macrophylla Teller Group", "rosa 'Peace'", "Rosa 'Peace", "Rosa d'Anne"),
        *(f"Rosa '{'x' * 101}'", "2019 'Best rose'"),
    ],
)
def test_names_that_are_not_cultivars(text: str) -> None:
    assert parse(text) is None


@given(st.text(max_size=400))
def test_any_title_gives_a_cultivar_in_its_form_or_none(text: str) -> None:
    found = parse(text)
    if found:
        assert taxon_name(found.taxon) == found.taxon
        assert found.epithet.strip() == found.epithet
        assert "\n" not in str(found)


@given(
    st.sampled_from(["Rosa", "Malus domestica", "Rosa × damascena", "Brassica oleracea var. capitata"]),
    st.from_regex(r"[A-Z][a-z]{2,9}( [A-Z][a-z]{2,9}){0,2}", fullmatch=True),
)
def test_a_name_that_is_written_is_read_back(taxon: str, epithet: str) -> None:
    assert parse(str(Cultivar(taxon, epithet))) == Cultivar(taxon, epithet)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ("cc0", "CC0-1.0"), ("CC0", "CC0-1.0"), ("CC0 1.0", "CC0-1.0"), ("CC0_1_0", "CC0-1.0"),
        ("cc-by", "CC-BY"), ("CC BY 4.0", "CC-BY-4.0"), ("CC_BY_NC_4_0", "CC-BY-NC-4.0"),
        ("cc-by-nc-nd", "CC-BY-NC-ND"),
        ("CC BY-SA 3.0 de", "CC-BY-SA-3.0-DE"), ("CC-BY-SA-2.5", "CC-BY-SA-2.5"),
        ("http://creativecommons.org/licenses/by/4.0/legalcode", "CC-BY-4.0"),
        ("https://creativecommons.org/licenses/by-nc-sa/3.0/de/", "CC-BY-NC-SA-3.0-DE"),
        ("https://creativecommons.org/publicdomain/zero/1.0/", "CC0-1.0"),
        ("http://creativecommons.org/publicdomain/mark/1.0/", "public domain"),
        ("Public domain", "public domain"), ("PD", "public domain"),
        ("GFDL", "GFDL"), ("Free  Art\nLicense", "Free Art License"), ("", ""), ("CC BY-XX 4.0", "CC BY-XX 4.0"),
        ("https://creativecommons.org.evil.example/licenses/by/4.0/", "https://creativecommons.org.evil.example/licenses/by/4.0/"),
        ("© the garden, some rights like CC BY 4.0", "© the garden, some rights like CC BY 4.0"),
    ],
)  # fmt: skip
def test_licences(stated: str, expected: str) -> None:
    assert licence_id(stated) == expected
    assert licence_id(licence_id(stated)) == expected
