"""Export trained models to ONNX, TorchScript, or a folder in timm's Hugging Face layout.

Each export is written to a temporary place, read back, and compared with the original before it is moved to its target;
a difference is an error. All exports map normalised images (B, C, H, W), any B, at the size of the card, to logits
(B, num_classes).
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from animesion.errors import AnimesionError, UsageError
from animesion.progress import Progress
from animesion.publishing.base import File
from animesion.publishing.hub import Hub
from animesion.storage.workspace import full_disk_is_clear, sha256_file
from animesion_training.models import input_config
from animesion_training.weights import WeightsCard, load_model

#: Largest allowed difference between the logits of an export and of the original.
TOLERANCE = 1e-4
_BATCHES = (1, 3)  # two sizes, so that an export with a fixed batch size fails
_NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torchscript": (), "hf": ("huggingface_hub", "safetensors")}


@dataclass(frozen=True)
class Exported:
    """A verified export.

    Attributes:
        path: file or folder.
        kind: `onnx`, `torchscript` or `hf`.
        difference: largest absolute difference between its logits and those of the original.
        size: size in bytes.
    """

    path: Path
    kind: str
    difference: float
    size: int


def export(weights: Path | str, kind: str, out: Path | str) -> Exported:
    """Export a weights file and verify the result.

    Args:
        weights: a file written by `save_model`.
        kind: `onnx`, `torchscript` or `hf`.
        out: the file to write, or the folder for `hf`.

    Raises:
        UsageError: unusable weights, kind or target, or a package that is not installed.
        AnimesionError: the outputs of the export differ from those of the original.
    """
    if kind not in _NEEDS:
        raise UsageError(f"unknown export {kind!r}: choose from {', '.join(_NEEDS)}")
    if missing := [package for package in _NEEDS[kind] if find_spec(package) is None]:
        raise UsageError(f'exporting to {kind} needs {", ".join(missing)}: pip install "animesion[export]"')
    out = Path(out)
    if out.is_dir() and (kind != "hf" or any(out.iterdir())):
        raise UsageError(f"{out} is a folder{' with files in it' if kind == 'hf' else ''}: give another --out")
    if kind == "hf" and out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file, and hf writes a folder: give another --out")
    model, card = load_model(weights)
    write, run = _WRITERS[kind]
    images = _images(model)
    with full_disk_is_clear(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    # in the folder of the target, so that a rename moves it into place
    with full_disk_is_clear(out), tempfile.TemporaryDirectory(prefix=".tmp-export-", dir=out.parent) as folder:
        draft = Path(folder) / out.name
        with _quiet():
            write(model, card, draft)
            difference = max(_difference(model, run(draft), batch) for batch in images)
        if not difference <= TOLERANCE:
            raise AnimesionError(
                f"the {kind} export of {weights} differs from the original by {difference:.1e}, more than "
                f"{TOLERANCE:.0e}: nothing was written"
            )
        if draft.is_dir() and out.is_dir():
            out.rmdir()
        os.replace(draft, out)
    files = [path for path in out.rglob("*") if path.is_file()] if out.is_dir() else [out]
    return Exported(out, kind, difference, sum(path.stat().st_size for path in files))


def push(folder: Path, hub: Hub) -> int:
    """Send an export in the Hub's layout to a repository, and check that all of it has arrived.

    Args:
        folder: written by `export` as `hf`.
        hub: the repository, which is created where it does not exist.

    Returns:
        Number of files that were sent; the repository had the others.

    Raises:
        UsageError: the repository is public and must be private.
        AnimesionError: the Hub cannot be reached or denies access, or a file does not arrive.
    """
    files = [
        File(path.relative_to(folder).as_posix(), path, path.stat().st_size, sha256_file(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    if refusal := hub.refusal("", changes=True):
        raise UsageError(refusal)
    hub.prepare()
    present = hub.present(files)
    missing = [file for file in files if file.name not in present]
    hub.send(missing, (), "Weights exported by Animesion", Progress())
    if faults := hub.faults(files):
        raise AnimesionError(f"{hub.url} is not what was sent ({faults[0]}): run the same command again")
    return len(missing)


def _images(model: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    channels = _timm_config(model)["input_size"][0]
    return [torch.randn(batch, channels, *input_config(model).size, generator=generator) for batch in _BATCHES]


def _timm_config(model: nn.Module) -> dict[str, Any]:
    config: Any = model.pretrained_cfg
    return dict(config)


def _difference(model: nn.Module, exported: Callable[[Tensor], Tensor], images: Tensor) -> float:
    with torch.inference_mode():
        expected, actual = model(images), exported(images)
    if actual.shape != expected.shape:
        return float("inf")
    return float((actual - expected).abs().max())


def _write_onnx(model: nn.Module, card: WeightsCard, path: Path) -> None:
    import onnx

    example = _images(model)[-1]
    batch = torch.export.Dim("batch", min=1)
    torch.onnx.export(
        model,
        (example,),
        path,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: batch},),
        external_data=False,
        dynamo=True,
        verbose=False,
    )
    proto = onnx.load(path)
    onnx.helper.set_model_props(proto, {"animesion": card.to_json()})
    onnx.save(proto, path)


def _run_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _write_torchscript(model: nn.Module, card: WeightsCard, path: Path) -> None:
    with torch.inference_mode():
        traced = torch.jit.trace(model, _images(model)[-1], check_trace=False)  # type: ignore[no-untyped-call]
    torch.jit.save(traced, path, _extra_files={"animesion.json": card.to_json()})


def _run_torchscript(path: Path) -> Callable[[Tensor], Tensor]:
    loaded: Callable[[Tensor], Tensor] = torch.jit.load(path)  # type: ignore[no-untyped-call]
    return loaded


def _write_hf(model: nn.Module, card: WeightsCard, path: Path) -> None:
    from timm.models import is_model, save_for_hf

    architecture = _timm_config(model).get("architecture", "")
    if card.head == "cosine" or not is_model(architecture) or (card.head == "ifa") != architecture.endswith("_ifa"):
        raise UsageError(f"timm has no name for {card.name} with head {card.head}: export it to onnx or torchscript")
    if card.norm_eps is not None:
        raise UsageError(f"timm has no argument for norm_eps={card.norm_eps}: export it to onnx or torchscript")
    size = (card.img_size, card.img_size) if isinstance(card.img_size, int) else card.img_size
    arguments = dict(card.options)
    if _timm_config(model).get("fixed_input_size"):
        arguments["img_size"] = size
    config = {"label_names": list(card.classes)} if card.classes else {}
    save_for_hf(model, str(path), model_config=config, model_args=arguments, safe_serialization=True)
    extra = {"animesion": json.loads(card.to_json())}
    document = json.loads((path / "config.json").read_text(encoding="utf-8"))
    # these describe the pretrained weights of the architecture, not the exported ones
    for stale in ("tag", "hf_hub_id", "url", "origin_url", "test_input_size", "test_crop_pct"):
        document["pretrained_cfg"].pop(stale, None)
    text = json.dumps(document | extra, indent=2, ensure_ascii=False)
    (path / "config.json").write_text(f"{text}\n", encoding="utf-8")


def _run_hf(path: Path) -> Callable[[Tensor], Tensor]:
    import timm

    model: nn.Module = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    return model


_WRITERS: dict[
    str, tuple[Callable[[nn.Module, WeightsCard, Path], None], Callable[[Path], Callable[[Tensor], Tensor]]]
] = {
    "onnx": (_write_onnx, _run_onnx),
    "torchscript": (_write_torchscript, _run_torchscript),
    "hf": (_write_hf, _run_hf),
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the deprecation warnings of exporters; the result is verified in any case."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "timm")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
