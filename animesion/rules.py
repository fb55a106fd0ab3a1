"""What the recipe says of a picture from its metadata alone, before a byte of it is fetched.

Fetch does not read what would be dropped anyway, and writes the reason down; curate applies the rules for faces again
to what a detector found.
"""

from __future__ import annotations

from collections.abc import Sequence

from animesion.recipe import Filter, Label, Recipe
from animesion.records import Box

_HIDDEN_FLAGS = frozenset({"deleted", "banned", "pending"})


def labels_left(candidates: Sequence[str], rules: Label) -> list[str]:
    """The candidate labels after renaming, ignoring and removing repeats, in their order."""
    renamed = (rules.rename.get(label, label) for label in candidates if label not in rules.ignore)
    return list(dict.fromkeys(label for label in renamed if label and label not in rules.ignore))


def metadata_reason(
    labels: Sequence[str], rating: str, flags: Sequence[str], boxes: Sequence[Box] | None, recipe: Recipe
) -> str:
    """The first drop reason that metadata alone gives, or an empty string."""
    reason = _flag_reason(flags, recipe.filter) or _label_reason(labels_left(labels, recipe.label), recipe.label)
    if reason:
        return reason
    if recipe.filter.ratings and rating not in recipe.filter.ratings:
        return "rating"
    if recipe.crop.detector == "boxes" and boxes is not None:
        return face_reason(len(boxes), max((box[4] for box in boxes), default=0.0), recipe)
    return ""


def face_reason(faces: int, best_score: float, recipe: Recipe) -> str:
    """The drop reason that the number of boxes and the best (or the sample's own) score give, or an empty string."""
    if faces == 0:
        return "no face"
    if faces > 1 and recipe.crop.faces == "one-only":
        return "several faces"
    # tables hold float32: 0.85 read from one must pass a minimum of 0.85
    return "unsure face" if best_score < recipe.crop.min_score - 1e-6 else ""


def _flag_reason(flags: Sequence[str], rules: Filter) -> str:
    return "deleted" if not rules.deleted and not _HIDDEN_FLAGS.isdisjoint(flags) else ""


def _label_reason(left: Sequence[str], rules: Label) -> str:
    if not left:
        return "no label"
    if len(left) > 1:
        return "several labels"
    return "excluded label" if left[0] in rules.exclude else ""
