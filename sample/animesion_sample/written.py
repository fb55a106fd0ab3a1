"""Files of drawn collections: heads, images and texts, written into folders."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from animesion_sample import drawing


def face(name: str, seed: str, side: int) -> Image.Image:
    """The head of a character, cropped from a drawn image, with both sides `side`."""
    drawn = drawing.Drawing(f"{name}/{seed}", (name,), 240, 240)
    image = drawing.render(drawn)
    [head] = drawing.heads(drawn)
    box = [round(value * 240) for value in head.box]
    return image.crop((box[0], box[1], box[2], box[3])).resize((side, side), Image.Resampling.LANCZOS)


def put(path: Path, image: Image.Image, kind: str, **settings: object) -> None:
    """Write an image, and the folders that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    out = io.BytesIO()
    image.save(out, kind, **({"compress_level": 3} if kind == "PNG" else {}), **settings)
    path.write_bytes(out.getvalue())


def text(path: Path, content: str) -> None:
    """Write a text file, and the folders that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
