"""Write a folder that a Gradio Space, or `python app.py`, serves as a page: an image in, names out.

The network is exported to ONNX and compared with the original, see `animesion_training.export`. The page itself is
`space/app.py`, which does not depend on this package.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml
from PIL import Image

from animesion.errors import UsageError
from animesion.images import codec, files
from animesion.images.formats import RejectedImageError
from animesion.storage.workspace import full_disk_is_clear
from animesion_training.export import export
from animesion_training.run_weights import BEST, FINAL, find_weights
from animesion_training.weights import load_model

#: Longer side of an example image, in pixels.
_SIDE = 768
#: Version of Gradio that a Space gets where none is installed here to take the number from.
_GRADIO = "6.0.0"


def write_space(
    checkpoint: Path, out: Path, *, title: str = "", licence: str = "", examples: Sequence[Path] = ()
) -> list[Path]:
    """Write `app.py`, `model.onnx`, `README.md`, `requirements.txt` and examples into a new folder.

    Args:
        checkpoint: a run, or a weights file or checkpoint that describes its network.
        out: the folder, which must not exist or be empty.
        title: of the page; by default the name of the run.
        licence: of the network and the page, as the Hugging Face Hub spells it.
        examples: images to offer; they are copied without their metadata.

    Returns:
        The files.

    Raises:
        UsageError: unusable weights or images, or a folder with files in it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not an empty folder: give another --out")
    weights = find_weights(checkpoint)
    _, card = load_model(weights)
    if not isinstance(card.img_size, int):
        raise UsageError(f"{checkpoint} takes images of {card.img_size}: only square inputs are supported")
    title = title or (weights.parent.resolve().name if weights.name in (BEST, FINAL) else weights.stem)
    with full_disk_is_clear(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_is_clear(out), tempfile.TemporaryDirectory(prefix=".tmp-demo-", dir=out.parent) as folder:
        draft = Path(folder) / out.name
        draft.mkdir()
        export(weights, "onnx", draft / "model.onnx")
        source = resources.files("animesion_training.space") / "app.py"
        (draft / "app.py").write_bytes(source.read_bytes())
        (draft / "TITLE").write_text(f"{title}\n", encoding="utf-8")
        (draft / "requirements.txt").write_text("numpy\nonnxruntime\npillow\n", encoding="utf-8")
        head = {"title": title, "sdk": "gradio", "sdk_version": _gradio(), "app_file": "app.py", "pinned": False}
        head |= {"license": licence} if licence else {}
        facts = {key: card.facts[key] for key in ("dataset", "epoch") if key in card.facts}
        about = f"{card.name} at {card.img_size} px, {card.num_classes:,} {'tags' if card.is_tagger else 'classes'}"
        about += f", {json.dumps(facts, ensure_ascii=False)}" if facts else ""
        text = f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n{about}.\n"
        (draft / "README.md").write_text(text, encoding="utf-8")
        _copy(examples, draft / "examples")
        if out.is_dir():
            out.rmdir()
        os.replace(draft, out)
    return sorted(path for path in out.rglob("*") if path.is_file())


def _copy(examples: Sequence[Path], folder: Path) -> None:
    """Write images as JPEGs under names of our own, at most 768 px and without metadata."""
    for number, path in enumerate(files.files(examples), 1):
        content, problem = files.read(path)
        try:
            image = codec.decode(content, codec.Limits()).image if not problem else None
        except RejectedImageError as error:
            image, problem = None, str(error)
        if image is None:
            raise UsageError(f"{path} cannot be an example ({problem}): give another image")
        folder.mkdir(exist_ok=True)
        image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        image.save(folder / f"{number:03d}.jpg", quality=90)


def _gradio() -> str:
    try:
        return version("gradio")
    except PackageNotFoundError:
        return _GRADIO
