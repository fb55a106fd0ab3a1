"""The fine-grained methods of a network, as recipes, weight files and `create_model` name them.

The methods themselves are in `tokens` and `cal`; `assemble` adds them to a network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from animesion.errors import UsageError

#: Kinds of methods, each with its own options.
PARTS = ("reduction", "cache", "adapter", "selector", "text")


@dataclass(frozen=True)
class Methods:
    """The methods of a network.

    Attributes:
        reduction: name of a token reduction, empty for no reduction.
        keep_rate: share of tokens that each reduction keeps, in (0, 1]; one for all of them or one per reduction.
        reduction_layers: blocks that reduce, from 0; empty for the reduction's own.
        cache: name of a cross-layer cache, empty for no cache.
        adapter: name of an adapter, empty for no adapter.
        selector: name of a selector of parts, empty for no selector.
        options: further arguments of the methods, by one of `PARTS`.
        text: name of a method that reads text beside the image, empty for none.
    """

    reduction: str = ""
    keep_rate: float | tuple[float, ...] = 1.0
    reduction_layers: tuple[int, ...] = ()
    cache: str = ""
    adapter: str = ""
    selector: str = ""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    text: str = ""

    def __post_init__(self) -> None:
        rates = self.keep_rate if isinstance(self.keep_rate, tuple) else (self.keep_rate,)
        for rate in rates:
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1:
                raise UsageError(f"keep_rate must be a share of tokens above 0 and at most 1, not {rate!r}")
        for layer in self.reduction_layers:
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
                raise UsageError(f"reduction_layers are numbers of blocks from 0, not {layer!r}")
        if not self.reduction and (self.keep_rate != 1.0 or self.reduction_layers):
            raise UsageError("keep_rate and reduction_layers belong to a token reduction: name one as reduction")
        for part in self.options:
            if part not in PARTS:
                raise UsageError(f"method options are for {', '.join(PARTS)}, not for {part!r}")
            if self.options[part] and not getattr(self, part):
                raise UsageError(f"there are options for {part}, but no {part}: name one or leave them out")

    def __bool__(self) -> bool:
        return any(getattr(self, part) for part in PARTS)

    def of(self, part: str) -> dict[str, Any]:
        """The options of one of `PARTS`; lists become tuples."""
        given = self.options.get(part, {})
        return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}

    def to_dict(self) -> dict[str, Any]:
        """The values that differ from the defaults, JSON-ready."""
        default = Methods()
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value != getattr(default, name)
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Methods:
        """Read the result of `to_dict`, possibly from an untrusted file.

        Raises:
            UsageError: an unknown key, or an invalid value.
        """
        known = {each.name for each in fields(cls)}
        if unknown := sorted(content.keys() - known):
            raise UsageError(f"unknown methods: {', '.join(map(str, unknown))}")
        for name in PARTS:
            if not isinstance(content.get(name, ""), str):
                raise UsageError(f"{name} is a name, not {content[name]!r}")
        options = content.get("options", {})
        if not isinstance(options, Mapping) or not all(isinstance(each, Mapping) for each in options.values()):
            raise UsageError("method options are a table of tables, one per method")
        if not isinstance(content.get("reduction_layers", []), list | tuple):
            raise UsageError(f"reduction_layers must be a list, not {content['reduction_layers']!r}")
        rate = content.get("keep_rate", 1.0)
        values = {name: value for name, value in content.items() if name in PARTS}
        return cls(
            **values,
            keep_rate=tuple(rate) if isinstance(rate, Sequence) and not isinstance(rate, str) else rate,
            reduction_layers=tuple(content.get("reduction_layers", ())),
            options={name: dict(each) for name, each in options.items()},
        )
