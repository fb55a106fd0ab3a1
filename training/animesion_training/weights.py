"""Weights files: a trained model in safetensors, with a card that describes how to build it and names its classes.

The file is sufficient for prediction. Files come from untrusted sources, so the card is validated before a model is
built. The state that a run resumes from (optimizer, schedule, generators) is in `animesion_training.engine.checkpoint`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from animesion.errors import UsageError
from animesion.schemas import TAG_CATEGORIES
from animesion.storage import names
from animesion.storage.workspace import atomic_file
from animesion_training.options import reasonable
from animesion_training.run_weights import find_weights

if TYPE_CHECKING:
    from torch import Tensor, nn

    from animesion_training.models import ModelSpec

FORMAT = 1
_KEY = "animesion"
_LARGEST_HEADER = 64 << 20  # bytes; 1,000,000 class names of 60 bytes
_MOST_TENSORS = 20_000
#: Types of tensors that are accepted, by torch's names.
_DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}


@dataclass(frozen=True)
class WeightsCard:
    """The metadata of a weights file.

    Attributes:
        name: model name, as in `create_model`.
        num_classes: number of classes.
        img_size: side in pixels, or (height, width).
        classes: name of each class by id; empty if the model was saved without names.
        mean: mean per channel, for values in [0, 1].
        std: standard deviation per channel, for values in [0, 1].
        interpolation: interpolation for resizing images.
        crop_pct: share of the side of the resized image that evaluation crops, in (0, 1].
        head: name of the head.
        head_options: its arguments.
        norm_eps: epsilon of the layer norms, None for the architecture's own.
        options: further arguments of the timm model.
        methods: fine-grained methods of the model, from `models.methods.Methods.to_dict`.
        facts: further JSON-serialisable facts, such as the dataset, epoch and accuracy.
        tag_categories: of a tagger, whose outputs are tags and whose `classes` are their names: number of tags by
            category, one category after another in the order of `TAG_CATEGORIES`; empty for a classifier.
        thresholds: of a tagger, the probability of each tag from which on it is predicted; empty if none were fitted.
        format: version of the format.
    """

    name: str
    num_classes: int
    img_size: int | tuple[int, int]
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    head: str = "linear"
    head_options: Mapping[str, Any] = field(default_factory=dict)
    norm_eps: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    methods: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    tag_categories: Mapping[str, int] = field(default_factory=dict)
    thresholds: tuple[float, ...] = ()
    format: int = FORMAT

    @property
    def spec(self) -> ModelSpec:
        """Arguments of `create_model` for this model."""
        from animesion_training.models import ModelSpec
        from animesion_training.models.methods import Methods

        return ModelSpec(
            self.name,
            self.num_classes,
            self.img_size,
            self.head,
            self.head_options,
            self.norm_eps,
            self.options,
            Methods.from_dict(self.methods),
        )

    @property
    def is_tagger(self) -> bool:
        """Whether the outputs are tags, each a decision of its own, and not classes."""
        return bool(self.tag_categories)

    @property
    def categories(self) -> tuple[str, ...]:
        """Category of each output of a tagger."""
        return tuple(name for name in TAG_CATEGORIES for _ in range(self.tag_categories.get(name, 0)))

    def to_json(self) -> str:
        """Serialise to one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True)


def save_model(
    model: nn.Module,
    path: Path | str,
    classes: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float = 1.0,
) -> WeightsCard:
    """Write the weights file of a model, atomically and without a copy of it in memory.

    Args:
        model: a model of `create_model`, also compiled or in DistributedDataParallel.
        path: file to write, usually `*.safetensors`.
        classes: name of each class by id.
        facts: further JSON-serialisable facts for the card.
        mean: mean that it was trained with; by default that of its `pretrained_cfg`.
        std: standard deviation, likewise.
        crop_pct: share of the side of the resized image that evaluation crops.

    Raises:
        UsageError: not a model of `create_model`, or another number of class names.
    """
    from animesion_training.models.create import bare

    card = card_of(model, classes, facts, mean=mean, std=std, crop_pct=crop_pct)
    write_weights(path, card, bare(model).state_dict())
    return card


def card_of(
    model: nn.Module,
    classes: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float = 1.0,
    tag_categories: Mapping[str, int] | None = None,
    thresholds: Sequence[float] = (),
) -> WeightsCard:
    """Return the card of a model; arguments and errors are those of `save_model`, or attributes of `WeightsCard`."""
    from animesion_training.models import input_config, spec_of

    spec, inputs = spec_of(model), input_config(model)
    card = WeightsCard(
        name=spec.name,
        num_classes=spec.num_classes,
        img_size=spec.img_size,
        classes=tuple(classes),
        mean=tuple(mean or inputs.mean),
        std=tuple(std or inputs.std),
        interpolation=inputs.interpolation,
        crop_pct=crop_pct,
        head=spec.head,
        head_options=dict(spec.head_options),
        norm_eps=spec.norm_eps,
        options=dict(spec.options),
        methods=spec.methods.to_dict(),
        facts=dict(facts or {}),
        tag_categories=dict(tag_categories or {}),
        thresholds=tuple(thresholds),
    )
    try:
        _check(card, "the model")
        card.to_json()
    except TypeError as error:
        raise UsageError(f"the model cannot be described in a file: {error}") from error
    return card


def write_weights(path: Path | str, card: WeightsCard, tensors: Mapping[str, Tensor]) -> None:
    """Write a weights file, atomically, one tensor after the other.

    Args:
        path: file to write.
        card: of the model.
        tensors: its state dict, on any device.
    """
    # those of the largest numbers first, so that all are aligned
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {_KEY: card.to_json()}}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        kind = _DTYPES[str(tensors[name].dtype)]
        header[name] = {"dtype": kind, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(Path(path)) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(_bytes_of(tensors[name]))


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in the order of its indices; of a contiguous one on a CPU without a copy."""
    import torch

    numbers: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(numbers)


def read_card(path: Path | str) -> WeightsCard:
    """Read the card of a weights file, without its weights.

    Args:
        path: the file, or the folder of a run.

    Raises:
        UsageError: the file does not exist, is not a weights file of Animesion, or has an invalid card.
    """
    return _read_header(find_weights(path))[0]


def load_model(path: Path | str, device: str = "cpu") -> tuple[nn.Module, WeightsCard]:
    """Load a model in evaluation mode, and its card, from a weights file.

    Args:
        path: a file written by `save_model`, or the folder of a run; a checkpoint of timm's trainer or of the
            originals, which describes its network; or a folder in timm's hub layout. The card of the latter two
            follows from their settings, and a sentence on how they were understood is logged.
        device: device of the model.

    Raises:
        UsageError: the file does not exist, is damaged or does not describe its network, or its weights do not fit
            the description.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = find_weights(path)
    if _is_foreign(path):
        return _load_foreign(path, device)
    card, shapes = _read_header(path)
    # first on the meta device: a card may describe a model that exceeds the memory
    with torch.device("meta"), suppress(_UnbuiltError):  # some architectures compute in their constructors
        _compare(shapes, _build(card, path, shapes), path)
    model = _build(card, path, shapes)
    _compare(shapes, model, path)
    try:
        weights = load_file(path)
        if broken := sorted(key for key, value in weights.items() if not value.isfinite().all()):
            raise UsageError(
                f"{path}: {len(broken):,} of its tensors have values that are not finite, such as {broken[0]}: its "
                "training diverged, or the file is damaged"
            )
        model.load_state_dict(weights)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise UsageError(f"{path}: the weights cannot be read: {str(error).splitlines()[0]}") from error
    config = {**vars(model)["pretrained_cfg"], "mean": card.mean, "std": card.std, "crop_pct": card.crop_pct}
    config |= {"crop_mode": "squash", "interpolation": card.interpolation}  # to a square, whatever the aspect ratio
    vars(model)["pretrained_cfg"] = vars(model)["default_cfg"] = config
    return model.to(device).eval(), card


def _is_foreign(path: Path) -> bool:
    """Whether a file exists, and has neither a card nor the form of a file with one."""
    if path.is_dir():
        return (path / "config.json").is_file()
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        return False
    # the length of a safetensors header, which a brace follows, can begin like a zip archive or a pickle
    return start.startswith((b"PK\x03\x04", b"\x80")) and start[8:] != b"{"


def _load_foreign(path: Path, device: str) -> tuple[nn.Module, WeightsCard]:
    from animesion_training.foreign import build_described
    from animesion_training.models import ModelSpec, input_config

    built = build_described(path)
    inputs = input_config(built.network)
    spec = getattr(built.network, "spec", None)
    spec = spec if isinstance(spec, ModelSpec) else ModelSpec(built.name, built.num_classes, inputs.size)
    height, width = inputs.size
    card = WeightsCard(
        name=spec.name,
        num_classes=built.num_classes,
        img_size=height if height == width else (height, width),
        classes=built.classes,
        mean=inputs.mean,
        std=inputs.std,
        interpolation=inputs.interpolation,
        crop_pct=built.crop_pct,
        head=spec.head,
        head_options=dict(spec.head_options),
        norm_eps=spec.norm_eps,
        options=dict(spec.options),
        methods=spec.methods.to_dict(),
        facts=built.facts,
    )
    _check(card, str(path))
    return built.network.to(device).eval(), card


class _UnbuiltError(UsageError):
    """Building failed in timm or torch, not in validation."""


@contextmanager
def _no_larger_than(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[None]:
    """Stop building a model that has far more weights than a file: its card may name any number of layers and widths.

    Raises:
        UsageError: the model is too large.
    """
    from torch.nn.modules.module import register_module_parameter_registration_hook

    # Some layers are replaced while a model is built, and tied weights are in a file once.
    tensors, values = 2 * len(shapes) + 200, 2 * sum(map(math.prod, shapes.values())) + 10_000_000
    registered = [0, 0]

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            registered[0] += 1
            registered[1] += parameter.numel()
        if registered[0] > tensors or registered[1] > values:
            raise UsageError("it has more weights than the file")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _build(card: WeightsCard, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    try:
        with _no_larger_than(shapes):
            model = card.spec.build()
            mean = shapes.get("whitening.mean", ())
            if len(mean) == 1 and shapes.get("whitening.matrix") == (mean[0], mean[0]):
                from animesion_training.models.embedding import Whitening

                model.add_module("whitening", Whitening(mean[0]))
            return model
    except UsageError as error:
        raise UsageError(f"{path} describes a model that cannot be built: {error}") from error
    except Exception as error:  # timm can fail in any way on options from a file
        raise _UnbuiltError(
            f"{path} describes a model that cannot be built ({type(error).__name__}: {error})"
        ) from error


def _compare(found: Mapping[str, tuple[int, ...]], model: nn.Module, path: Path) -> None:
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if unknown := sorted(found.keys() - expected.keys()):
        raise UsageError(f"{path}: its card's model has no weights called {', '.join(unknown[:3])}")
    if missing := sorted(expected.keys() - found.keys()):
        raise UsageError(f"{path}: weights of its card's model are missing: {', '.join(missing[:3])}")
    for key in sorted(found):
        if found[key] != expected[key]:
            raise UsageError(f"{path}: {key} is {found[key]}, its card's model has {expected[key]}")


def _read_header(path: Path) -> tuple[WeightsCard, dict[str, tuple[int, ...]]]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 10 or not 2 <= length <= min(size - 8, _LARGEST_HEADER):
                raise UsageError(f"{path} is not a weights file: it does not start with a safetensors header")
            header = json.loads(file.read(length))
    except OSError as error:
        raise UsageError(f"cannot read the weights file {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a weights file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise UsageError(f"{path} is not a weights file: its header is not a table of tensors")
    metadata = header.pop("__metadata__", None)
    text = metadata.get(_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        if isinstance(metadata, dict) and "animesion_gallery" in metadata:
            raise UsageError(f"{path} is a gallery, not a network: `animesion identify {path} IMAGE` uses it")
        raise UsageError(
            f"{path} contains weights without a card: load them with `create_model(name, classes, pretrained=PATH)`"
        )
    shapes = _shapes(header, size - 8 - length, path)
    return _parse(text, path), shapes


def _shapes(header: Mapping[str, Any], room: int, path: Path) -> dict[str, tuple[int, ...]]:
    shapes = {}
    if len(header) > _MOST_TENSORS:
        raise UsageError(f"{path} is damaged: it has {len(header):,} tensors, and no model has {_MOST_TENSORS:,}")
    for key, entry in header.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if (
            not isinstance(shape, list)
            or entry.get("dtype") not in _DTYPES.values()
            or not all(isinstance(side, int) and not isinstance(side, bool) and side >= 0 for side in shape)
            or math.prod(shape) > room
        ):
            raise UsageError(f"{path} is damaged: the header's entry for {key!r} is not a tensor of this file")
        shapes[key] = tuple(shape)
    if sum(map(math.prod, shapes.values())) > room:
        raise UsageError(f"{path} is damaged: its header has more values than the file")
    return shapes


def _parse(text: str, path: Path) -> WeightsCard:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: its card is not JSON") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: its card is not a table")
    version = content.get("format")
    if version != FORMAT:
        raise UsageError(
            f"{path} has format {version!r}, this version reads format {FORMAT}: install a newer animesion"
        )
    if unknown := sorted(content.keys() - {each.name for each in fields(WeightsCard)}):
        raise UsageError(f"{path}: its card has unknown keys: {', '.join(unknown)}")
    if missing := sorted({"name", "num_classes", "img_size"} - content.keys()):
        raise UsageError(f"{path}: its card lacks {', '.join(missing)}")
    tuples = {key: tuple(value) for key, value in content.items() if isinstance(value, list)}
    card = WeightsCard(**{**content, **tuples})
    _check(card, str(path))
    return replace(card, mean=tuple(map(float, card.mean)), std=tuple(map(float, card.std)))


def _check(card: WeightsCard, where: str) -> None:
    """Validate types and ranges of a card."""

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    def integer(value: Any, most: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most

    def share(value: Any) -> bool:
        return number(value) and 0 <= value <= 1

    def categories(value: Mapping[str, Any]) -> bool:
        known = all(name in TAG_CATEGORIES and integer(n, 1_000_000) for name, n in value.items())
        return not value or (known and sum(value.values()) == card.num_classes == len(card.classes))

    def class_name(value: Any) -> bool:
        return isinstance(value, str) and names.is_text(value)

    sizes = card.img_size if isinstance(card.img_size, tuple) else (card.img_size,)
    invalid = [
        name
        for name, valid in (
            ("name", isinstance(card.name, str) and 0 < len(card.name) < 200),
            ("num_classes", integer(card.num_classes, 1_000_000)),
            ("img_size", len(sizes) in (1, 2) and all(integer(side, 8192) for side in sizes)),
            ("classes", isinstance(card.classes, tuple) and all(map(class_name, card.classes))),
            ("mean", isinstance(card.mean, tuple) and len(card.mean) > 0 and all(map(number, card.mean))),
            ("std", isinstance(card.std, tuple) and len(card.std) > 0 and all(number(v) and v > 0 for v in card.std)),
            ("interpolation", isinstance(card.interpolation, str)),
            ("crop_pct", number(card.crop_pct) and 0 < card.crop_pct <= 1),
            ("head", isinstance(card.head, str)),
            ("head_options", isinstance(card.head_options, Mapping) and reasonable(card.head_options)),
            ("norm_eps", card.norm_eps is None or (number(card.norm_eps) and 0 <= card.norm_eps < 1)),
            ("options", isinstance(card.options, Mapping) and reasonable(card.options)),
            ("methods", isinstance(card.methods, Mapping) and reasonable(card.methods)),
            ("facts", isinstance(card.facts, Mapping)),
            ("tag_categories", isinstance(card.tag_categories, Mapping) and categories(card.tag_categories)),
            ("thresholds", isinstance(card.thresholds, tuple) and all(map(share, card.thresholds))),
        )
        if not valid
    ]
    if invalid:
        raise UsageError(f"{where}: the card's {invalid[0]} is invalid: {str(getattr(card, invalid[0]))[:80]!a}")
    if card.classes and len(card.classes) != card.num_classes:
        raise UsageError(f"{where}: {len(card.classes)} class names for a model of {card.num_classes} classes")
    if card.thresholds and not (card.is_tagger and len(card.thresholds) == card.num_classes):
        raise UsageError(f"{where}: {len(card.thresholds)} thresholds for {card.num_classes} outputs")
