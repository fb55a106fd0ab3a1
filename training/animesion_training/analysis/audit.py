"""Which labels to look at: images that lie nearer to another class than to their own, or far from their own.

An embedding of every image, cosine similarity, and the nearest neighbours in and out of the image's class. Nothing
is dropped here: the outcome is a list for people, as a table and as a page that needs no other file.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from animesion.errors import UsageError
from animesion.images import codec
from animesion.storage.workspace import write_atomic
from animesion_training.data import Augment, DataSplits, Resize, Stream
from animesion_training.distributed import DistributedContext
from animesion_training.eval.evaluate import as_rgb
from animesion_training.models import create_model, input_config
from animesion_training.precision import autocast
from animesion_training.weights import load_model

_BLOCK = 1024
"""Images whose similarities to all others are in memory at a time."""

_FAR = 3.5
"""Robust standard deviations below its class from which on an image counts as an outlier (Iglewicz and Hoaglin)."""

_SPREAD = 1e-3
"""Least deviation of a class's similarities: equal images have none."""

_THUMBNAIL = 96

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Finding:
    """An image to look at.

    Attributes:
        key: of the sample.
        split: where it is.
        label: the class that it stands under.
        kind: `other class` when its neighbours are of another class, `outlier` when it is far from its own.
        suggested: the class of its neighbours; empty for an outlier.
        score: how far the similarity to other classes exceeds that to its own, -2 to 2; the list is ranked by it.
        own: mean cosine similarity to the nearest images of its class, -1 to 1.
        other: mean cosine similarity to the nearest images of other classes, -1 to 1.
        deviation: robust standard deviations by which `own` is below the class's median; 0 or less is ordinary.
        nearest: key of the most similar image of another class.
        nearest_split: where that is.
        nearest_label: that image's class.
    """

    key: str
    split: str
    label: str
    kind: str
    suggested: str
    score: float
    own: float
    other: float
    deviation: float
    nearest: str
    nearest_split: str
    nearest_label: str


@dataclass(frozen=True)
class Pair:
    """Two classes whose images lie among one another's.

    Attributes:
        first: name of a class.
        second: name of the other.
        images: how many images of either have an image of the other as their very nearest.
        share: of the images of both, 0 to 1.
    """

    first: str
    second: str
    images: int
    share: float


@dataclass(frozen=True)
class Audit:
    """The outcome.

    Attributes:
        findings: the most suspicious first.
        pairs: classes that are mixed up most, first.
        images: how many were looked at.
        skipped: how many could not be read.
    """

    findings: list[Finding]
    pairs: list[Pair]
    images: int
    skipped: int


def audit(
    data: DataSplits,
    model: str,
    context: DistributedContext,
    *,
    neighbours: int = 5,
    batch_size: int = 64,
    precision: str = "fp32",
    advance: Callable[[int], None] = lambda count: None,
) -> Audit:
    """Embed every image of every split and rank those whose label its neighbours do not share.

    The only image of a class is not judged: there is nothing to compare it with.

    Args:
        data: what `open_data` gives.
        model: a `.safetensors` of a run, or a name that `create_model` knows, with the weights that timm publishes.
        context: where to compute; a single process.
        neighbours: images that are averaged over, in and out of the class.
        batch_size: images at a time.
        precision: of the network: `fp32`, `bf16` or `fp16`.
        advance: told how many images were done.

    Raises:
        UsageError: an unusable model, or fewer than two classes with images.
    """
    network, size, crop_pct, normalise = _network(model)
    network = network.to(context.device).eval()
    parts, labels, keys, splits = [], [], [], []
    skipped = 0
    for split in data.splits:
        if not len(data.splits[split]):
            continue
        transform = Resize(size, crop_pct)
        stream = Stream(data, split, batch_size, size, train=False, transform=transform, on_error="skip")
        with torch.inference_mode():
            for batch in stream:
                seen = normalise(batch.images.to(context.device), batch.seeds.to(context.device)).contiguous()
                with autocast(precision, context.device):
                    parts.append(_embedded(network, seen, model).cpu())
                labels.append(batch.labels.numpy())
                keys += [data.splits[split].keys[i] for i in batch.indices.tolist()]
                splits += [split] * len(batch.labels)
                advance(len(batch.labels))
        skipped += stream.skipped
        stream.close()
    if not parts:
        raise UsageError(f"{data.path} has no image that can be read")
    # batches arrive in the split's reading order; keys give one that does not depend on it
    order = np.array(sorted(range(len(keys)), key=lambda i: (keys[i], splits[i])), dtype=np.int64)
    vectors, ids = torch.cat(parts)[torch.from_numpy(order)], np.concatenate(labels)[order]
    named = [(keys[i], splits[i]) for i in order.tolist()]
    findings, pairs = judge(vectors.to(context.device), ids, named, data.classes, neighbours)
    return Audit(findings, pairs, len(named), skipped)


def judge(
    vectors: Tensor, labels: IntArray, named: Sequence[tuple[str, str]], classes: Sequence[str], neighbours: int
) -> tuple[list[Finding], list[Pair]]:
    """Findings and pairs from embeddings alone.

    Args:
        vectors: one an image, shape (N, D), any float type.
        labels: class ids, shape (N,).
        named: key and split of each image.
        classes: names by class id.
        neighbours: images that are averaged over; a class of fewer has what it has.

    Raises:
        UsageError: fewer than two classes with images.
    """
    if len(set(labels.tolist())) < 2:
        raise UsageError("an audit compares classes, so it needs images of two or more")
    own, other, suggested, nearest, closer = _neighbourhoods(vectors, labels, neighbours)
    deviation = _deviations(own, labels)
    findings: list[Finding] = []
    mixed: dict[tuple[int, int], int] = {}
    for i, (key, split) in enumerate(named):
        if np.isnan(own[i]):
            continue
        score = float(other[i] - own[i])
        if closer[i]:
            a, b = sorted((int(labels[i]), int(labels[nearest[i]])))
            mixed[a, b] = mixed.get((a, b), 0) + 1
        wrong = score > 0
        if not wrong and deviation[i] <= _FAR:
            continue
        twin, twin_split = named[nearest[i]]
        findings.append(
            Finding(
                key,
                split,
                classes[labels[i]],
                "other class" if wrong else "outlier",
                classes[suggested[i]] if wrong else "",
                round(score, 6),
                round(float(own[i]), 6),
                round(float(other[i]), 6),
                round(float(deviation[i]), 3),
                twin,
                twin_split,
                classes[labels[nearest[i]]],
            )
        )
    findings.sort(key=lambda each: (-each.score, each.key, each.split))
    counts = np.bincount(labels, minlength=len(classes))
    pairs = [
        Pair(classes[a], classes[b], count, round(count / int(counts[a] + counts[b]), 6))
        for (a, b), count in mixed.items()
    ]
    return findings, sorted(pairs, key=lambda each: (-each.share, -each.images, each.first, each.second))


def _neighbourhoods(
    vectors: Tensor, labels: IntArray, neighbours: int
) -> tuple[FloatArray, FloatArray, IntArray, IntArray, npt.NDArray[np.bool_]]:
    """What lies around each image.

    Returns:
        Similarity to its own class (not a number for the only one of a class), similarity to others, the class most
        like it, the nearest image of another class, and whether that one is nearer than any of its own.
    """
    unit = nn.functional.normalize(vectors.float(), dim=1)
    ids = torch.from_numpy(labels).to(unit.device)
    counts = torch.bincount(ids)[ids]
    n = len(unit)
    own, other = np.empty(n, np.float32), np.empty(n, np.float32)
    suggested, nearest = np.empty(n, np.int64), np.empty(n, np.int64)
    closer = np.empty(n, np.bool_)
    for start in range(0, n, _BLOCK):
        rows = slice(start, min(n, start + _BLOCK))
        similar = unit[rows] @ unit.T
        same = ids[rows, None] == ids[None]
        similar[torch.arange(len(similar)), torch.arange(rows.start, rows.stop)] = -torch.inf  # not its own neighbour
        inner = similar.masked_fill(~same, -torch.inf).topk(min(neighbours, n)).values
        there = torch.isfinite(inner)
        mean = inner.where(there, torch.zeros_like(inner)).sum(1) / there.sum(1).clamp(min=1)
        alone = counts[rows] == 1
        own[rows] = mean.masked_fill(alone, torch.nan).cpu().numpy()
        outer = similar.masked_fill(same, -torch.inf).topk(min(neighbours, n))
        values, places = outer.values, outer.indices
        there = torch.isfinite(values)
        other[rows] = (values.where(there, torch.zeros_like(values)).sum(1) / there.sum(1)).cpu().numpy()
        closer[rows] = (values[:, 0] > inner[:, 0]).cpu().numpy()
        nearest[rows] = places[:, 0].cpu().numpy()
        # the class with the largest summed similarity among the neighbours, shifted so that all count for something
        weights = (values + 2).where(there, torch.zeros_like(values))
        found = ids[places]
        votes = ((found[:, :, None] == found[:, None, :]) * weights[:, None, :]).sum(2).where(there, weights)
        suggested[rows] = found.gather(1, votes.argmax(1, keepdim=True))[:, 0].cpu().numpy()
    return own, other, suggested, nearest, closer


def _deviations(own: FloatArray, labels: IntArray) -> FloatArray:
    """Robust standard deviations below the median of the class."""
    found = np.zeros(len(own), np.float32)
    order = np.argsort(labels, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        if np.isnan(own[rows]).any():  # the only image of its class
            continue
        middle = np.median(own[rows])
        spread = 1.4826 * np.median(np.abs(own[rows] - middle))
        found[rows] = (middle - own[rows]) / max(spread, _SPREAD)
    return found


def _network(model: str) -> tuple[nn.Module, int, float, Augment]:
    """The network, the side and share of its input, and what its input is normalised with."""
    if model.endswith(".safetensors"):
        network, card = load_model(model)
        size, mean, std, crop_pct = card.img_size, card.mean, card.std, card.crop_pct
    else:
        network = create_model(model, 1, pretrained=True)
        inputs = input_config(network)
        size, mean, std, crop_pct = inputs.size, inputs.mean, inputs.std, 1.0
    if isinstance(size, tuple) and size[0] == size[1]:
        size = size[0]
    if not isinstance(size, int):
        raise UsageError(f"{model} takes images of {size}; only squares are made")
    return network, size, crop_pct, Augment.plain(as_rgb(mean), as_rgb(std))


def _embedded(network: Any, pixels: Tensor, model: str) -> Tensor:
    """What the classifier is given, (B, D)."""
    found = network.forward_head(network.forward_features(pixels), pre_logits=True)
    if not isinstance(found, Tensor) or found.ndim != 2:
        raise UsageError(f"{model} has no single vector before its classifier; take another model")
    return found.float()


# -- what is written -------------------------------------------------------------------------------------------------


def write(folder: Path, outcome: Audit, data: DataSplits, *, model: str, limit: int = 200) -> list[Path]:
    """Write `audit.csv`, `audit.json` and `audit.html` into a folder; returns their paths.

    Args:
        folder: is made.
        outcome: of `audit`.
        data: for the images of the page.
        model: named on the page.
        limit: images that the page shows at most; the tables have all.
    """
    rows = [{"rank": rank, **asdict(each)} for rank, each in enumerate(outcome.findings, 1)]
    text = io.StringIO()
    names = ["rank", *Finding.__dataclass_fields__]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    whole = {
        "data": data.path,
        "model": model,
        "images": outcome.images,
        "skipped": outcome.skipped,
        "findings": rows,
        "pairs": [asdict(pair) for pair in outcome.pairs],
    }
    written = {
        "audit.csv": text.getvalue(),
        "audit.json": json.dumps(whole, ensure_ascii=False, indent=1) + "\n",
        "audit.html": page(outcome, data, model=model, limit=limit),
    }
    for name, content in written.items():
        write_atomic(folder / name, content.encode("utf-8", "backslashreplace"))
    return [folder / name for name in written]


def _cell(value: Any) -> Any:
    """A value for a CSV; text that a spreadsheet would run as a formula is kept from it."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def page(outcome: Audit, data: DataSplits, *, model: str, limit: int) -> str:
    """The findings as HTML that loads nothing: images lie in it, every text is escaped."""
    import jinja2

    where = {(split, key): i for split, samples in data.splits.items() for i, key in enumerate(samples.keys)}
    shown: list[dict[str, Any]] = []
    for rank, each in enumerate(outcome.findings[:limit], 1):
        twin = each.nearest_split, each.nearest
        shown.append(
            {
                "rank": rank,
                **asdict(each),
                "image": _thumbnail(data, each.split, where[each.split, each.key]),
                "twin": _thumbnail(data, twin[0], where[twin]),
            }
        )
    # everything is from outside: names of classes and keys, and the path
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_PAGE).render(
        data=data.path, model=model, outcome=outcome, rows=shown, pairs=outcome.pairs[:50]
    )


def _thumbnail(data: DataSplits, split: str, i: int) -> str:
    """An image of a sample as base64 of a JPEG; empty when it cannot be read."""
    try:
        image = codec.decode(bytes(data.splits[split].read(i)), codec.Limits()).image
    except (codec.RejectedImageError, UsageError):
        return ""
    image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return base64.b64encode(codec.encode(image, "jpg", 85)).decode("ascii")


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Audit of {{ data }}</title>
<style>
body { font: 14px/1.4 sans-serif; margin: 2em; }
table { border-collapse: collapse; margin-bottom: 2em; }
th, td { border-bottom: 1px solid #ccc; padding: 4px 10px; text-align: left; vertical-align: middle; }
td.number { text-align: right; }
</style>
</head>
<body>
<h1>Audit of {{ data }}</h1>
<p>{{ "{:,}".format(outcome.images) }} images embedded with {{ model }},
{{ "{:,}".format(outcome.findings | length) }} to look at, {{ "{:,}".format(outcome.skipped) }} unread.
Nothing was dropped. A high score says that the neighbours have another label; a person decides.</p>
<table>
<tr><th>rank</th><th>image</th><th>stands under</th><th>looks like</th><th>score</th><th>deviation</th>
<th>nearest of another class</th><th>its class</th></tr>
{% for row in rows %}
<tr><td class="number">{{ row.rank }}</td>
<td>{% if row.image %}<img alt="" src="data:image/jpeg;base64,{{ row.image }}">{% endif %}<br>
{{ row.key }} ({{ row.split }})</td>
<td>{{ row.label }}</td><td>{{ row.suggested or "nothing in its class" }}</td>
<td class="number">{{ "%.3f" | format(row.score) }}</td><td class="number">{{ "%.1f" | format(row.deviation) }}</td>
<td>{% if row.twin %}<img alt="" src="data:image/jpeg;base64,{{ row.twin }}">{% endif %}<br>{{ row.nearest }}</td>
<td>{{ row.nearest_label }}</td></tr>
{% endfor %}
</table>
{% if pairs %}
<h2>Classes among one another</h2>
<table>
<tr><th>class</th><th>class</th><th>images whose nearest is of the other</th><th>share</th></tr>
{% for pair in pairs %}
<tr><td>{{ pair.first }}</td><td>{{ pair.second }}</td><td class="number">{{ pair.images }}</td>
<td class="number">{{ "%.1f%%" | format(100 * pair.share) }}</td></tr>
{% endfor %}
</table>
{% endif %}
</body>
</html>
"""
