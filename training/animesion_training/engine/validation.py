"""Evaluation within a run: of the validation split after each epoch, and of the test split at its end.

A split whose classes have training images is scored by the classifier. One whose classes have none is evaluated by its
embeddings: no output of the classifier could be right. `eval` has the metrics, `trainer` keeps the best weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from animesion.errors import UsageError
from animesion_training.data import Augment, DataSplits
from animesion_training.data.seeds import IntArray
from animesion_training.distributed import DistributedContext
from animesion_training.engine.watcher import Watcher
from animesion_training.eval import evaluate, similarity_report, tag_report
from animesion_training.eval.embed import embed_split
from animesion_training.eval.metrics import Evaluation
from animesion_training.eval.reading import Reading
from animesion_training.eval.scores import Scores
from animesion_training.eval.similarity import Embedded, retrieval
from animesion_training.eval.similarity_report import Settings, Similarity, measure
from animesion_training.eval.tag_metrics import TagEvaluation, TagScores, evaluate_tags, fit_thresholds
from animesion_training.recipe import TrainRecipe
from animesion_training.text.tokenizer import Texts


class Evaluator:
    """Evaluates a network on the splits of a run; all processes call its methods together.

    Args:
        recipe: of the run.
        data: the opened data.
        context: of this process.
        watcher: receives progress events.
        normalise: from uint8 to the input of the network.
        precision: of the forward pass.
        train_counts: training images of each class or tag, (C,), if known.
        texts: by split, to give the network the tags of its images; a split without texts has unknown tags.

    Attributes:
        thresholds: of the tags, fitted in the last validation; empty for classes, and before.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        data: DataSplits,
        context: DistributedContext,
        watcher: Watcher,
        normalise: Augment,
        precision: str,
        train_counts: IntArray | None,
        texts: Mapping[str, Texts],
    ) -> None:
        self.recipe, self.data, self.context, self.watcher = recipe, data, context, watcher
        self.normalise, self.precision, self.train_counts, self.texts = normalise, precision, train_counts, texts
        self.thresholds: tuple[float, ...] = ()

    def unseen(self, split: str) -> bool:
        """Whether no class of a split has training images, so that only embeddings can be evaluated."""
        if self.data.tags is not None or not len(self.data.splits.get(split, ())):
            return False
        return evaluate.untrained(self.train_counts, self.data, split) == 1

    @property
    def best_metric(self) -> str:
        """The metric of the validation split that chooses the best weights."""
        if self.data.tags is not None:
            return "val_map"
        return "val_map_at_r" if self.unseen(self.recipe.data.val) else "val_top_1"

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Return the metrics of the validation split, the same in all processes.

        Raises:
            UsageError: the split cannot be evaluated by retrieval.
        """
        split = self.recipe.data.val
        numbers: dict[str, float] = {}
        problem = ""
        if self.data.tags is not None:
            numbers, problem = self._validate_tags(model, split)
        elif self.unseen(split):
            embedded = self._embed(model, split)
            if self.context.is_main:
                try:
                    found = retrieval(embedded, shots=())
                    numbers = {"val_r_at_1": found.r_at_1, "val_map_at_r": found.map_at_r}
                except UsageError as error:  # told to the others, which would wait for this process
                    problem = f"the split '{split}': {error}"
        else:
            scores = self._score(model, split)
            if self.context.is_main:
                evaluation = self._metrics(scores, split)
                numbers = {
                    "val_top_1": evaluation.top_1,
                    "val_top_5": evaluation.top_5,
                    "val_macro": evaluation.macro_accuracy,
                    "val_nll": evaluation.calibration.nll,
                }
        numbers, problem = self.context.all_gather((numbers, problem))[0]
        if problem:
            raise UsageError(problem)
        return numbers

    def _validate_tags(self, model: nn.Module, split: str) -> tuple[dict[str, float], str]:
        """Metrics of the tags at thresholds that are fitted on the same split, or why there are none.

        Both are empty but in the first process.
        """
        scores = evaluate.score_tags(model, self.data, split, self._reading(split), self.context)
        if not self.context.is_main:
            return {}, ""
        tags = evaluate.tags_of(self.data)
        expected = self._expected(split)
        least = self.recipe.tags.threshold_images
        self.thresholds = tuple(
            fit_thresholds(scores, tags.assigned[split], tags.categories, least=least, expected=expected)
        )
        found = self._tag_metrics(scores, split, self.thresholds).overall
        if found.map is None or found.macro_f1 is None or found.micro_f1 is None:
            return {}, f"no image of the split '{split}' has one of the tags: name another in data.val"
        return {"val_map": found.map, "val_macro_f1": found.macro_f1, "val_micro_f1": found.micro_f1}, ""

    def test_tags(
        self, model: nn.Module, out: Path, facts: dict[str, Any], thresholds: Sequence[float]
    ) -> TagEvaluation | None:
        """Evaluate the tags of the test split, and write the report into a folder; None but in the first process.

        Args:
            model: the network.
            out: the folder.
            facts: of the weights, for the report.
            thresholds: of the tags; empty if none were fitted.
        """
        split = self.recipe.data.test
        scores = evaluate.score_tags(model, self.data, split, self._reading(split), self.context)
        if not self.context.is_main:
            return None
        evaluation = self._tag_metrics(scores, split, thresholds)
        tag_report.write(out, evaluation, {"data": self.data.path, "split": split, **facts})
        return evaluation

    def _tag_metrics(self, scores: TagScores, split: str, thresholds: Sequence[float]) -> TagEvaluation:
        tags = evaluate.tags_of(self.data)
        return evaluate_tags(
            scores,
            tags.assigned[split],
            tags.names,
            tags.categories,
            thresholds=thresholds,
            train_counts=self.train_counts,
            expected=self._expected(split),
        )

    def _expected(self, split: str) -> int | None:
        return len(self.data.select(split)) if self.recipe.data.on_error == "raise" else None

    def test(self, model: nn.Module, out: Path, facts: dict[str, Any]) -> tuple[Evaluation | None, Similarity | None]:
        """Evaluate the test split, and write the report into a folder.

        Args:
            model: the network.
            out: the folder.
            facts: of the weights, for the report.

        Returns:
            In the first process, an evaluation of the classifier or one of embeddings; None otherwise.
        """
        split = self.recipe.data.test
        facts = {"data": self.data.path, "split": split, **facts}
        if self.unseen(split):
            return None, self._test_embeddings(model, split, out, facts)
        scores = self._score(model, split)
        if not self.context.is_main:
            return None, None
        evaluation = self._metrics(scores, split)
        evaluate.write_report(out, evaluation, facts, scores, self.data, split)
        return evaluation, None

    def _test_embeddings(self, model: nn.Module, split: str, out: Path, facts: dict[str, Any]) -> Similarity | None:
        """Evaluate embeddings, with a threshold from the validation split if its classes are not trained on either."""
        val = self.recipe.data.val
        fits = self.unseen(val)
        found = [self._embed(model, each) for each in ((split, val) if fits else (split,))]
        if not self.context.is_main:
            return None
        tasks = ["retrieval", *(["verification"] if fits else [])]
        result = measure(found[0], tasks, Settings(), *((found[1], val) if fits else ()))
        similarity_report.write(out, result, facts)
        return result

    def _score(self, model: nn.Module, split: str) -> Scores:
        texts = self.texts.get(split)
        return evaluate.score(model, self.data, split, self._reading(split), self.context, texts=texts)

    def _metrics(self, scores: Any, split: str) -> Evaluation:
        complete = self.recipe.data.on_error == "raise"
        return evaluate.compute_metrics(scores, self.data, split, self.train_counts, complete=complete)

    def _embed(self, model: nn.Module, split: str) -> Embedded:
        return embed_split(model, self.data, split, self._reading(split), self.context)

    def _reading(self, split: str) -> Reading:
        """How a split is read and passed through the network."""
        done, total = 0, -(-len(self.data.select(split)) // self.context.world_size)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.watcher.scored(split, min(done, total), total)

        return Reading(
            self.normalise,
            self.recipe.model.img_size,
            self.recipe.augment.crop_pct,
            batch_size=max(1, 2 * self.recipe.run.batch_size // self.context.world_size),
            precision=self.precision,
            channels_last=self.recipe.run.channels_last,
            workers=None if self.recipe.data.workers < 0 else self.recipe.data.workers,
            on_error=self.recipe.data.on_error,
            advance=advance,
        )
