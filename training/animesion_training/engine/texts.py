"""The tags that a network of a run reads: its vocabulary, and the texts of the samples.

`animesion_training.text` makes token ids and masks them, `steps.TaggingStep` computes the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from animesion.checkpoints import read_checkpoint
from animesion.errors import UsageError
from animesion_training.data import DataSplits, open_data
from animesion_training.data.tags import TagLabels
from animesion_training.models.shorthand import split_name
from animesion_training.recipe import TrainRecipe
from animesion_training.run_weights import find_weights
from animesion_training.text.facts import read_facts
from animesion_training.text.tokenizer import SPECIAL_TOKENS, TagTokenizer, Texts, readable
from animesion_training.weights import read_card

_MOST_BYTES = 64 << 20
_WORDS = "plugins.text.words.weight"


def tag_vocabulary(recipe: TrainRecipe, data: DataSplits) -> tuple[str, ...]:
    """Return the names of the tags that the network of a run knows; none if it reads no tags.

    Raises:
        UsageError: the file with the names cannot be read, initial weights are of a vocabulary that they do not name,
            or the data have no tags.
    """
    if not (recipe.model.text or split_name(recipe.model.name)[1].text):
        return ()
    if data.tags is not None:
        raise UsageError(
            f"objective.name: '{recipe.objective.name}' trains on the tags that the network would read: leave "
            "model.text out, or take an objective on classes"
        )
    if "vocab_size" in recipe.model.method_options.get("text", {}):
        raise UsageError(
            "model.method_options.text.vocab_size follows from the vocabulary: leave it out, or name the tags in a "
            "file and give that as text.vocabulary"
        )
    if recipe.text.vocabulary:
        return read_names(Path(recipe.text.vocabulary))
    if recipe.model.init and (names := _of_weights(recipe.model.init)):
        return names
    found = _tags(data)
    if unknown := sorted(set(recipe.text.categories) - set(found.categories)):
        raise UsageError(
            f"text.categories: {data.path} has no tags of the category {unknown[0]!r}; it has "
            f"{', '.join(dict.fromkeys(found.categories)) or 'none'}"
        )
    chosen = readable(found.names, found.categories, recipe.text.categories, data.classes)
    names = tuple(filter(None, chosen))
    if not names:
        raise UsageError(f"{data.path} has no tags that are not names of classes: add a category to text.categories")
    return names


def read_names(path: Path) -> tuple[str, ...]:
    """Read a vocabulary from a text file with one name per line.

    Raises:
        UsageError: the file cannot be read, or has an empty line.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        lines = content.decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UsageError(f"text.vocabulary: {path} cannot be read ({reason}): give a text file of names") from None
    if len(content) > _MOST_BYTES:
        raise UsageError(f"text.vocabulary: {path} has more than {_MOST_BYTES:,} bytes: give a shorter list of names")
    names = tuple(line.strip() for line in lines)
    if "" in names:
        raise UsageError(f"text.vocabulary: line {names.index('') + 1} of {path} is empty: give one name per line")
    return names


def _tags(data: DataSplits) -> TagLabels:
    """The tags of the samples of a dataset: what `data.tags` would be if they were targets."""
    found = open_data(data.path, tags=True).tags
    assert found is not None
    return found


def _of_weights(given: str) -> tuple[str, ...]:
    """The vocabulary of initial weights; empty for those of a network that reads no tags."""
    path = str(find_weights(given))
    try:
        names, _ = read_facts(read_card(path).facts, path)
    except UsageError:
        names = ()  # another trainer's file, without a card
    if not names and any(name.endswith(_WORDS) for name in read_checkpoint(path).tensors):
        raise UsageError(
            f"model.init: {path} has embeddings of tags that it does not name: give their names in a file as "
            "text.vocabulary"
        )
    return names


def open_texts(recipe: TrainRecipe, data: DataSplits, vocabulary: tuple[str, ...], *, length: int) -> dict[str, Texts]:
    """Read the tags of the samples by split: those to train on and, with `text.evaluate`, those to evaluate.

    Args:
        recipe: of the run.
        data: the opened data.
        vocabulary: of the network; empty if it reads no tags.
        length: of a text.

    Raises:
        UsageError: the data have no tags, or none that the network knows.
    """
    if not vocabulary:
        return {}
    settings = recipe.data
    if settings.blend:
        raise UsageError("data.blend: a network that reads tags trains on one dataset: leave the others out")
    tokenizer = TagTokenizer(vocabulary, length, order=recipe.text.order)
    evaluated = [settings.val, settings.test] if recipe.text.evaluate else []
    return {
        split: texts_of(tokenizer, data, split, recipe.text.categories)
        for split in (settings.train, *evaluated)
        if split in data.splits
    }


def texts_of(tokenizer: TagTokenizer, data: DataSplits, split: str, categories: Sequence[str]) -> Texts:
    """Read the tags of the samples of a split.

    Raises:
        UsageError: the data have no tags, or none that the tokenizer knows.
    """
    found = _tags(data)
    assigned = found.assigned[data.select(split).split]
    names = readable(found.names, found.categories, categories, data.classes)
    texts = Texts.of(tokenizer, names, assigned.ids, assigned.ends)
    if not (texts.ids >= len(SPECIAL_TOKENS)).any():
        raise UsageError(
            f"no image of the split '{split}' of {data.path} has a tag that the network knows: check its vocabulary "
            f"and the categories it reads ({', '.join(categories)})"
        )
    return texts
