"""Find labels to review: images that are nearer to another class than to their own, or far from their own.

Every image is embedded; cosine similarity gives its nearest neighbours in its class and in others. Nothing is dropped:
the result is a list for a curator, as tables and as a self-contained HTML page.
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
from animesion_training.eval.reading import as_rgb
from animesion_training.models import create_model, input_config
from animesion_training.precision import autocast
from animesion_training.weights import load_model

_BLOCK = 1024
"""Number of images whose similarities to all others are computed at a time."""

_FAR = 3.5
"""Robust standard deviations below its class from which an image is an outlier (Iglewicz and Hoaglin)."""

_SPREAD = 1e-3
"""Smallest deviation of the similarities in a class; equal images would have 0."""

_THUMBNAIL = 96

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Finding:
    """An image to review.

    Attributes:
        key: key of the sample.
        split: its split.
        label: its class.
        kind: `other class` when its neighbours are of another class, `outlier` when it is far from its own.
        suggested: class of its neighbours; empty for an outlier.
        score: similarity to other classes minus similarity to its own, -2 to 2; the list is ranked by it.
        own: mean cosine similarity to the nearest images of its class, -1 to 1.
        other: mean cosine similarity to the nearest images of other classes, -1 to 1.
        deviation: robust standard deviations by which `own` is below the median of the class; 0 or less is ordinary.
        nearest: key of the most similar image of another class.
        nearest_split: split of that image.
        nearest_label: class of that image.
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
    """Two classes that are mixed up.

    Attributes:
        first: name of one class.
        second: name of the other class.
        images: number of images of either class whose nearest neighbour is in the other.
        share: their share of the images of both, 0 to 1.
    """

    first: str
    second: str
    images: int
    share: float


@dataclass(frozen=True)
class Audit:
    """Result of an audit.

    Attributes:
        findings: images to review, highest score first.
        pairs: classes that are mixed up, largest share first.
        images: number of embedded images.
        skipped: number of images that could not be read.
    """

    findings: list[Finding]
    pairs: list[Pair]
    images: int
    skipped: int


def audit(
    data: DataSplits,
    model: Path | str,
    context: DistributedContext,
    *,
    neighbours: int = 5,
    batch_size: int = 64,
    precision: str = "fp32",
    advance: Callable[[int], None] = lambda count: None,
) -> Audit:
    """Embed every image of every split and rank those whose neighbours have another label.

    The only image of a class is skipped, as there is nothing to compare it with.

    Args:
        data: the data, from `open_data`.
        model: path of a run or of a weights file; or a name for `create_model`, with timm's pretrained weights.
        context: device to compute on; a single process.
        neighbours: number of neighbours to average over, in and out of the class.
        batch_size: images per batch.
        precision: `fp32`, `bf16` or `fp16`.
        advance: called with the number of images of each batch.

    Raises:
        UsageError: an unusable model, or fewer than two classes with images.
    """
    network, size, crop_pct, normalise = _network(model)
    network = network.to(context.device).eval()
    embeddings, labels, keys, splits = [], [], [], []
    skipped = 0
    for split in data.splits:
        if not len(data.splits[split]):
            continue
        transform = Resize(size, crop_pct)
        stream = Stream(data, split, batch_size, size, train=False, transform=transform, on_error="skip")
        with torch.inference_mode():
            for batch in stream:
                images = normalise(batch.images.to(context.device), batch.seeds.to(context.device)).contiguous()
                with autocast(precision, context.device):
                    embeddings.append(_embed(network, images, model).cpu())
                labels.append(batch.labels.numpy())
                keys += [data.splits[split].keys[i] for i in batch.indices.tolist()]
                splits += [split] * len(batch.labels)
                advance(len(batch.labels))
        skipped += stream.skipped
        stream.close()
    if not embeddings:
        raise UsageError(f"{data.path} has no readable image: give other data")
    # sorted by key, so that the result does not depend on the order in which a split is read
    order = np.array(sorted(range(len(keys)), key=lambda i: (keys[i], splits[i])), dtype=np.int64)
    vectors, ids = torch.cat(embeddings)[torch.from_numpy(order)], np.concatenate(labels)[order]
    named = [(keys[i], splits[i]) for i in order.tolist()]
    findings, pairs = find_label_errors(vectors.to(context.device), ids, named, data.classes, neighbours)
    return Audit(findings, pairs, len(named), skipped)


def find_label_errors(
    vectors: Tensor, labels: IntArray, named: Sequence[tuple[str, str]], classes: Sequence[str], neighbours: int
) -> tuple[list[Finding], list[Pair]]:
    """Compute findings and pairs from embeddings.

    Args:
        vectors: one embedding per image, shape (N, D), any float type.
        labels: class ids, shape (N,).
        named: key and split of each image.
        classes: names by class id.
        neighbours: number of neighbours to average over, at most those that a class has.

    Raises:
        UsageError: fewer than two classes with images.
    """
    if len(set(labels.tolist())) < 2:
        raise UsageError("an audit compares classes: give data with images of at least two")
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
    """Compare each image with its nearest neighbours.

    Returns:
        Each (N,): mean similarity to its own class (NaN for the only image of a class), mean similarity to others, the
        most similar other class, the nearest image of another class, and whether that is nearer than any of its own.
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
        similar = unit[rows] @ unit.T  # (R, N), R rows of the block
        same = ids[rows, None] == ids[None]
        similar[torch.arange(len(similar)), torch.arange(rows.start, rows.stop)] = -torch.inf  # not its own neighbour
        # (R, K) neighbours in the class; entries of small classes that do not exist are -inf
        inner = similar.masked_fill(~same, -torch.inf).topk(min(neighbours, n)).values
        exists = torch.isfinite(inner)
        mean = inner.where(exists, torch.zeros_like(inner)).sum(1) / exists.sum(1).clamp(min=1)
        alone = counts[rows] == 1
        own[rows] = mean.masked_fill(alone, torch.nan).cpu().numpy()
        outer = similar.masked_fill(same, -torch.inf).topk(min(neighbours, n))
        values, places = outer.values, outer.indices
        exists = torch.isfinite(values)
        other[rows] = (values.where(exists, torch.zeros_like(values)).sum(1) / exists.sum(1)).cpu().numpy()
        closer[rows] = (values[:, 0] > inner[:, 0]).cpu().numpy()
        nearest[rows] = places[:, 0].cpu().numpy()
        # the class with the largest sum of similarities among the neighbours, shifted so that each is positive
        weights = (values + 2).where(exists, torch.zeros_like(values))
        classes = ids[places]  # (R, K)
        votes = ((classes[:, :, None] == classes[:, None, :]) * weights[:, None, :]).sum(2).where(exists, weights)
        suggested[rows] = classes.gather(1, votes.argmax(1, keepdim=True))[:, 0].cpu().numpy()
    return own, other, suggested, nearest, closer


def _deviations(own: FloatArray, labels: IntArray) -> FloatArray:
    """Robust standard deviations of each image below the median of its class, (N,)."""
    deviations = np.zeros(len(own), np.float32)
    order = np.argsort(labels, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        if np.isnan(own[rows]).any():  # the only image of its class
            continue
        median = np.median(own[rows])
        # 1.4826 MAD estimates the standard deviation of a normal distribution
        spread = 1.4826 * np.median(np.abs(own[rows] - median))
        deviations[rows] = (median - own[rows]) / max(spread, _SPREAD)
    return deviations


def _network(model: Path | str) -> tuple[nn.Module, int, float, Augment]:
    """Load the network; return it with its input size, crop share and normalisation."""
    if isinstance(model, Path):
        network, card = load_model(model)
        size, mean, std, crop_pct = card.img_size, card.mean, card.std, card.crop_pct
    else:
        network = create_model(model, 1, pretrained=True)
        inputs = input_config(network)
        size, mean, std, crop_pct = inputs.size, inputs.mean, inputs.std, 1.0
    if isinstance(size, tuple) and size[0] == size[1]:
        size = size[0]
    if not isinstance(size, int):
        raise UsageError(f"{model} takes images of {size}: only square inputs are supported")
    return network, size, crop_pct, Augment.plain(as_rgb(mean), as_rgb(std))


def _embed(network: Any, pixels: Tensor, model: Path | str) -> Tensor:
    """Embeddings (B, D): the input of the classifier."""
    vectors = network.forward_head(network.forward_features(pixels), pre_logits=True)
    if not isinstance(vectors, Tensor) or vectors.ndim != 2:
        raise UsageError(f"{model} has no single vector before its classifier: choose another model")
    return vectors.float()


# -- output ---------------------------------------------------------------------------------------------------------


def write(folder: Path, outcome: Audit, data: DataSplits, *, model: str, limit: int = 200) -> list[Path]:
    """Write `audit.csv`, `audit.json` and `audit.html` into a folder, and return their paths.

    Args:
        folder: created if needed.
        outcome: from `audit`.
        data: source of the images on the page.
        model: name of the model, for the page.
        limit: upper limit of images on the page; the tables list all.
    """
    rows = [{"rank": rank, **asdict(each)} for rank, each in enumerate(outcome.findings, 1)]
    text = io.StringIO()
    names = ["rank", *Finding.__dataclass_fields__]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    document = {
        "data": data.path,
        "model": model,
        "images": outcome.images,
        "skipped": outcome.skipped,
        "findings": rows,
        "pairs": [asdict(pair) for pair in outcome.pairs],
    }
    written = {
        "audit.csv": text.getvalue(),
        "audit.json": json.dumps(document, ensure_ascii=False, indent=1) + "\n",
        "audit.html": page(outcome, data, model=model, limit=limit),
    }
    for name, content in written.items():
        write_atomic(folder / name, content.encode("utf-8", "backslashreplace"))
    return [folder / name for name in written]


def _cell(value: Any) -> Any:
    """Quote text that a spreadsheet would evaluate as a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def page(outcome: Audit, data: DataSplits, *, model: str, limit: int) -> str:
    """Render the findings as self-contained HTML with embedded images and escaped text."""
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
    # class names, keys and the path come from data: escape them
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_PAGE).render(
        data=data.path, model=model, outcome=outcome, rows=shown, pairs=outcome.pairs[:50]
    )


def _thumbnail(data: DataSplits, split: str, i: int) -> str:
    """Encode the image of a sample as a base64 JPEG; empty when it cannot be read."""
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
{{ "{:,}".format(outcome.findings | length) }} to review, {{ "{:,}".format(outcome.skipped) }} unread.
Nothing was dropped. A high score means that the neighbours have another label; a curator decides.</p>
<table>
<tr><th>rank</th><th>image</th><th>label</th><th>looks like</th><th>score</th><th>deviation</th>
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
<h2>Classes that are mixed up</h2>
<table>
<tr><th>class</th><th>class</th><th>images whose nearest neighbour is in the other</th><th>share</th></tr>
{% for pair in pairs %}
<tr><td>{{ pair.first }}</td><td>{{ pair.second }}</td><td class="number">{{ pair.images }}</td>
<td class="number">{{ "%.1f%%" | format(100 * pair.share) }}</td></tr>
{% endfor %}
</table>
{% endif %}
</body>
</html>
"""
