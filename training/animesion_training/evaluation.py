"""Evaluate a trained network on a split: what `animesion eval` and `animesion_training.evaluate` do.

The package `eval` computes the scores of a split and the metrics of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from animesion.errors import UsageError
from animesion.progress import Progress
from animesion_training.data import DataSplits, open_data
from animesion_training.distributed import DistributedContext, distributed_context
from animesion_training.engine.setup import text_length
from animesion_training.engine.texts import texts_of
from animesion_training.eval import evaluate as scoring
from animesion_training.eval import report, similarity_report, tag_report
from animesion_training.eval.embed import embed_split
from animesion_training.eval.metrics import Evaluation
from animesion_training.eval.reading import Reading
from animesion_training.eval.similarity_report import Settings, Similarity
from animesion_training.eval.tag_metrics import TagEvaluation, evaluate_tags
from animesion_training.eval.tta import TTA
from animesion_training.models.cal import CALClassifier
from animesion_training.text.facts import read_facts
from animesion_training.text.tokenizer import TagTokenizer, Texts
from animesion_training.weights import WeightsCard, load_model

if TYPE_CHECKING:
    from rich.console import RenderableType

    from animesion_training.eval.scores import Scores

#: The task of a network's own outputs, which are classes or tags.
OUTPUTS = "classification"


@dataclass(frozen=True)
class Result:
    """Metrics of a network on a split.

    Attributes:
        facts: what was evaluated: data, split, checkpoint, views.
        metrics: of a classifier, of a tagger, or of tasks on embeddings.
        notes: what to know about the figures, in sentences.
    """

    facts: dict[str, Any]
    metrics: Evaluation | TagEvaluation | Similarity
    notes: tuple[str, ...] = ()
    _scores: Scores | None = field(default=None, repr=False)
    _data: DataSplits | None = field(default=None, repr=False)

    def as_json(self) -> dict[str, Any]:
        """Facts and metrics as plain data, with every class or tag."""
        if isinstance(self.metrics, Similarity):
            return {**self.facts, "notes": list(self.notes), **similarity_report.as_json(self.metrics)}
        if isinstance(self.metrics, TagEvaluation):
            return {**self.facts, **tag_report.as_json(self.metrics, per_tag=True)}
        return {**self.facts, **report.as_json(self.metrics, per_class=True)}

    def tables(self) -> Sequence[RenderableType]:
        """The metrics as tables for a terminal."""
        if isinstance(self.metrics, Similarity):
            return similarity_report.tables(self.metrics)
        if isinstance(self.metrics, TagEvaluation):
            return tag_report.tables(self.metrics)
        return report.tables(self.metrics)

    def write(self, folder: Path) -> None:
        """Write JSON, and tables as CSV, into a folder, which is created if necessary."""
        if isinstance(self.metrics, Similarity):
            similarity_report.write(folder, self.metrics, {**self.facts, "notes": list(self.notes)})
        elif isinstance(self.metrics, TagEvaluation):
            tag_report.write(folder, self.metrics, self.facts)
        else:
            assert self._scores is not None
            assert self._data is not None
            scoring.write_report(folder, self.metrics, self.facts, self._scores, self._data, self.facts["split"])


def evaluate(
    checkpoint: Path | str,
    data: Path | str,
    *,
    split: str = "test",
    images: Path | str | None = None,
    tasks: Sequence[str] = (OUTPUTS,),
    fit_split: str = "val",
    settings: Settings | None = None,
    batch_size: int = 128,
    precision: str = "fp32",
    tta: TTA = "none",
    read_tags: bool = False,
    evaluation: Mapping[str, Any] | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Result | None:
    """Evaluate a trained network on a split.

    Args:
        checkpoint: a run, or a weights file or checkpoint that describes its network.
        data: a built dataset, class folders, or label CSVs.
        split: split to evaluate on.
        images: with label CSVs: root of their paths.
        tasks: `classification` for the network's own outputs; or, by its embeddings, any of `retrieval`,
            `verification` and `open-set`.
        fit_split: split that thresholds of similarities are fitted on.
        settings: of the tasks on embeddings.
        batch_size: images per step and process.
        precision: `fp32`, `bf16` or `fp16`.
        tta: views of an image whose predictions are averaged.
        read_tags: give a network that reads tags those of each image.
        evaluation: values of `models.cal.CALEvaluation`, which say how a network with CAL classifies.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        progress: receives progress events.

    Returns:
        The result; None in all processes but the first.

    Raises:
        UsageError: unusable weights or data, data of other classes, or tasks that do not go together.
    """
    similar = [task for task in dict.fromkeys(tasks) if task != OUTPUTS]
    if similar and OUTPUTS in tasks:
        raise UsageError(f"the task {OUTPUTS} cannot be combined with the others: evaluate twice")
    if similar and read_tags:
        raise UsageError("tags are read by the classifier: embeddings are those of images alone")
    model, card = load_model(checkpoint)
    shown = progress or Progress()
    reading = Reading.of(card, checkpoint, batch_size=batch_size, precision=precision, tta=tta, advance=shown.advanced)
    facts: dict[str, Any] = {"data": str(data), "split": split, "checkpoint": str(checkpoint), "tta": tta}
    if evaluation:
        if not isinstance(model, CALClassifier):
            raise UsageError(f"{checkpoint} is a network without CAL, whose evaluation has no settings: leave them out")
        model.evaluation = model.evaluation.changed(evaluation)
        facts["evaluation"] = dict(evaluation)
    job = _Job(model, card, split, facts, shown, reading, device)
    if similar:
        # any classes: those of the weights do not matter to embeddings
        return job.embeddings(open_data(data, images=images), fit_split, similar, settings or Settings())
    if card.is_tagger:
        if read_tags:
            raise UsageError(f"{checkpoint} predicts tags, and reads none: evaluate it without tags to read")
        return job.tags(open_data(data, tags=True))
    opened = open_data(data, images=images, classes=card.classes or None)
    scoring.check_classes(card, opened, str(checkpoint))
    scoring.check_trained(card, opened, split)
    return job.classes(opened, _texts(model, card, opened, split, str(checkpoint)) if read_tags else None)


@dataclass(frozen=True)
class _Job:
    """What the three kinds of evaluation have in common."""

    model: nn.Module
    card: WeightsCard
    split: str
    facts: dict[str, Any]
    progress: Progress
    reading: Reading
    device: str

    def classes(self, data: DataSplits, texts: Texts | None) -> Result | None:
        """Evaluate a classifier."""
        with distributed_context(self.device) as context:
            self._started(context, data)
            scores = scoring.score(*self._common(context, data), texts=texts)
            self.progress.finished("eval")
            if not context.is_main:
                return None
        # counts of the training data if the weights have them, else of the training split of this data
        counts = self.card.facts.get("train_counts") or scoring.train_counts(data)
        metrics = scoring.compute_metrics(scores, data, self.split, counts)
        return Result(self.facts, metrics, _scores=scores, _data=data)

    def tags(self, data: DataSplits) -> Result | None:
        """Evaluate a tagger at its thresholds."""
        found = scoring.tags_of(data)
        unknown = sorted(set(self.card.classes) - set(found.names))
        tags = found.named(self.card.classes)
        data = replace(data, tags=tags)
        with distributed_context(self.device) as context:
            self._started(context, data)
            scores = scoring.score_tags(*self._common(context, data))
            self.progress.finished("eval")
            if not context.is_main:
                return None
        metrics = evaluate_tags(
            scores,
            tags.assigned[self.split],
            self.card.classes,
            self.card.categories,
            thresholds=self.card.thresholds,
            train_counts=self.card.facts.get("train_counts"),
            expected=len(data.select(self.split)),
        )
        if not unknown:
            return Result(self.facts, metrics)
        note = f"{len(unknown):,} tags of the weights are not in the data, such as {', '.join(unknown[:3])}"
        return Result({**self.facts, "unknown_tags": len(unknown)}, metrics, (note,))

    def embeddings(self, data: DataSplits, fit_split: str, tasks: Sequence[str], settings: Settings) -> Result | None:
        """Run tasks on embeddings."""
        fits = settings.threshold is None and bool({"verification", "open-set"} & set(tasks))
        if fits and fit_split == self.split:
            raise UsageError(
                f"thresholds are fitted on '{fit_split}', which is the split that is evaluated: name another "
                "(--fit-split), or give a threshold"
            )
        splits = (self.split, *([fit_split] if fits else []))
        with distributed_context(self.device) as context:
            self.progress.started("eval", sum(len(data.select(each)) for each in splits))
            model = self.model.to(context.device)
            found = [embed_split(model, data, each, self.reading, context) for each in splits]
            self.progress.finished("eval")
            if not context.is_main:
                return None
        metrics = similarity_report.measure(found[0], tasks, settings, *((found[1], fit_split) if fits else ()))
        notes = scoring.trained_notes(self.card, data, self.split, fit_split if fits else "")
        return Result(self.facts, metrics, tuple(notes))

    def _started(self, context: DistributedContext, data: DataSplits) -> None:
        self.progress.started("eval", len(data.select(self.split)) if context.world_size == 1 else None)

    def _common(self, context: DistributedContext, data: DataSplits) -> tuple[Any, ...]:
        return self.model.to(context.device), data, self.split, self.reading, context


def _texts(model: nn.Module, card: WeightsCard, data: DataSplits, split: str, checkpoint: str) -> Texts:
    """The tags of a split as the network reads them.

    Raises:
        UsageError: it reads none, or the data have none.
    """
    names, categories = read_facts(card.facts, checkpoint)
    if not names:
        raise UsageError(
            f"{checkpoint} is a network of images alone, or does not name its tags: evaluate it without tags to read"
        )
    return texts_of(TagTokenizer(names, text_length(model)), data, split, categories)
