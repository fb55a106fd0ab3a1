"""Progress events of a run, for whoever shows them."""

from __future__ import annotations


class Watcher:
    """Progress events of a run, in the first process; this base class ignores them."""

    def message(self, text: str) -> None:
        """Show a message to the user."""

    def started(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        """An epoch (from 1) of `steps` steps begins, or resumes after `done` of them."""

    def stepped(self, loss: float, rate: float, speed: float) -> None:
        """A step is done, with the newest loss that was read, the learning rate and images per second."""

    def scored(self, split: str, done: int, total: int) -> None:
        """This process has scored `done` of its `total` images of a split."""

    def ended(self, epoch: int, numbers: dict[str, float]) -> None:
        """An epoch is done, with its metrics by name."""
