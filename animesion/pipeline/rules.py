"""Drop reasons that depend on metadata alone, and are known before an image is fetched.

Fetch records such a reason and does not read the image. Curate applies `face_reason` again to the boxes of a detector.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from animesion.config.recipe import FilterSection, LabelSection, Recipe
from animesion.schemas import DropReason, Item

_VERSION = re.compile(r"-\d+(?:\.\d+)*(?:-[a-z]{2,3})?$")
_HIDDEN_FLAGS = frozenset({"deleted", "banned", "pending"})


def labels_left(candidates: Sequence[str], rules: LabelSection) -> list[str]:
    """The candidate labels without ignored ones, renamed, without repeats and in their order."""
    # Ignored names are removed before and after renaming: either name of an alias may be on the list.
    renamed = (rules.rename.get(label, label) for label in candidates if label not in rules.ignore)
    return list(dict.fromkeys(label for label in renamed if label and label not in rules.ignore))


def metadata_reason(item: Item, recipe: Recipe) -> str:
    """The first drop reason that applies to an item's metadata, or an empty string."""
    rules = recipe.filter
    reason = _flag_reason(item.flags, rules) or _label_reason(labels_left(item.labels, recipe.label), recipe.label)
    if reason:
        return reason
    if rules.ratings and item.rating not in rules.ratings:
        return DropReason.RATING
    if rules.licences and not is_allowed(item.licence, rules.licences):
        return DropReason.LICENCE
    if recipe.crop.table_decides and item.boxes is not None and item.key not in recipe.curate.decisions.box:
        scores = sorted((box.score for box in item.boxes), reverse=True)
        best, second = [*scores, 0.0, 0.0][:2]
        return face_reason(len(scores), best, second, recipe)
    return ""


def is_allowed(licence: str, allowed: Sequence[str]) -> bool:
    """Whether a licence is in the list; `CC-BY` in it allows every version and port of CC-BY, but not CC-BY-SA."""
    names = {name.lower() for name in allowed}
    return not names.isdisjoint({licence.lower(), _VERSION.sub("", licence.lower())})


# Tables store float32, so a score of 0.85 is read back as slightly less and must still pass a minimum of 0.85.
SLACK = 1e-6


def face_reason(faces: int, best_score: float, second_score: float, recipe: Recipe) -> str:
    """The drop reason that follows from the boxes, or an empty string.

    Args:
        faces: number of boxes in the image.
        best_score: score of the sample's box, which is the best one unless each face is a sample.
        second_score: score of the image's second box; any number where there is none.
        recipe: its `crop` section matters.
    """
    crop = recipe.crop
    if faces == 0 or (crop.faces != "each" and best_score < crop.unsure_score - SLACK):
        return DropReason.NO_FACE
    least = crop.unsure_score if crop.unsure == "drop" else crop.min_score
    if faces > 1 and crop.faces == "one-only" and second_score >= least - SLACK:
        return DropReason.SEVERAL_FACES
    return DropReason.UNSURE_FACE if best_score < crop.min_score - SLACK else ""


def is_perhaps(faces: int, best_score: float, second_score: float, recipe: Recipe) -> bool:
    """Whether an image has one sure face and perhaps another, see `face_reason`."""
    crop = recipe.crop
    return (
        faces > 1
        and best_score >= crop.min_score - SLACK
        and crop.unsure_score - SLACK <= second_score < crop.min_score - SLACK
    )


def _flag_reason(flags: Sequence[str], rules: FilterSection) -> str:
    return DropReason.DELETED if not rules.deleted and not _HIDDEN_FLAGS.isdisjoint(flags) else ""


def _label_reason(left: Sequence[str], rules: LabelSection) -> str:
    if not left:
        return DropReason.NO_LABEL
    if len(left) > 1:
        return DropReason.SEVERAL_LABELS
    return DropReason.EXCLUDED_LABEL if left[0] in rules.exclude else ""
