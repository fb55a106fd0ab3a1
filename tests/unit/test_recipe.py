"""Recipes: overrides, the sentence for each mistake, digests."""

from __future__ import annotations

from pathlib import Path

import pytest

from animesion import sources
from animesion.config import recipe
from animesion.errors import UsageError


def load(*overrides: str) -> recipe.Recipe:
    return recipe.load("folder", ["source.path=x", *overrides])


def test_overrides_are_toml_values_or_text() -> None:
    assert load('label.rename."a.b"="c d"').label.rename == {"a.b": "c d"}
    found = load("pack.size=128", "crop.margin=0.25", 'filter.ratings=["g"]', "split.strategy=single", "card.title=a b")
    assert (found.pack.size, found.crop.margin, found.filter.ratings) == (128, 0.25, ["g"])
    assert (found.split.strategy, found.card.title) == ("single", "a b")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("spilt.train=80", "unknown key 'spilt'; did you mean 'split'"),
        ("split.stratgy=single", "unknown key 'split.stratgy'; did you mean 'split.strategy'"),
        ("split.strategy=groupd", "split.strategy: there is no 'groupd'; did you mean 'grouped'"),
        ("split.train=90", "add up to 110"),
        ("split.train=eighty", "split.train: .*integer.*'eighty'"),
        ("pack.size=-1", "pack.size: .*greater than or equal to 0"),
        ("pack.format=bmp", "pack.format: there is no 'bmp'"),
        ("duplicates.radius=99", "duplicates.radius: .*less than or equal to 64"),
        ("duplicates.radius=20", "duplicates: .*at most 16 bits for hash .phash."),
        ("pack", "not have the form section.key=value"),
        ("=3", "not have the form section.key=value"),
        ("name.deep=3", "'name' is a value, not a section"),
        ("name='../evil'", "name: .*pattern"),
        ("[x]\n[y]\nz=1", "not have the form section.key=value"),
        ("card.title=\udcff", "not UTF-8"),
        ("pack.caption={nme}", "the only placeholder of a caption is {name}"),
    ],
)
def test_each_mistake_is_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        load(override)
    assert "\n" not in str(caught.value)


def test_source_options_are_checked_by_the_source() -> None:
    with pytest.raises(UsageError, match=r"unknown key 'source.pth'; did you mean 'source.path'"):
        sources.make(recipe.load("folder", ["source.pth=x"]))
    with pytest.raises(UsageError, match=r"'source.path' is missing"):
        sources.make(recipe.load("folder"))
    with pytest.raises(UsageError, match=r"no source 'foldr'; did you mean 'folder'"):
        sources.make(load("source.kind=foldr"))
    with pytest.raises(UsageError, match=r"needs a group"):
        sources.make(load("source.family='[0-9]+'"))


@pytest.mark.parametrize("name", recipe.builtin_names())
def test_builtin_recipes_load_and_report_missing_options(name: str) -> None:
    found = recipe.load(name)
    assert found.name == name
    assert found.summary
    with pytest.raises(UsageError, match=r"is missing|is not in this version"):
        sources.make(found)
    sources.make(recipe.load(name, sample=True))  # the sample source is installed and needs no options


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "My set.toml"
    path.write_text('[source]\nkind = "folder"\npath = "x"\n')
    assert recipe.load(str(path)).name == "My-set"
    path.write_text("[source\n")
    with pytest.raises(UsageError, match="not valid TOML"):
        recipe.load(str(path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        recipe.load(str(path))
    with pytest.raises(UsageError, match="cannot read the recipe"):
        recipe.load(str(tmp_path / "absent.toml"))
    with pytest.raises(UsageError, match="did you mean 'daf-re'"):
        recipe.load("daf_re")


def test_the_resolved_recipe_reads_back_the_same(tmp_path: Path) -> None:
    found = load("split.strategy=legacy-dafre", "label.rename={a = 'b'}")
    path = tmp_path / "recipe.toml"
    path.write_text(found.to_toml())
    assert recipe.load(str(path)) == found
    assert recipe.load(str(path)).digest() == found.digest() != load().digest()


def test_the_legacy_split_keeps_duplicates() -> None:
    assert load("split.strategy=legacy-dafre").duplicates.action == "report"
    with pytest.raises(UsageError, match="dropped no duplicates"):
        load("split.strategy=legacy-dafre", "duplicates.action=drop")


def test_a_recipe_of_another_version_can_still_be_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(load().to_toml().replace("[filter]", "[filter]\nmax_bytes = 3") + "\n[new]\nkey = 1\n")
    assert recipe.read_back(path) == load()
    path.write_text(load().to_toml().replace('strategy = "auto"', 'strategy = "magic"'))
    with pytest.raises(UsageError, match=r"split\.strategy"):
        recipe.read_back(path)
