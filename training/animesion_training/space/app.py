"""A page that names what is in an image, for a Gradio Space: `python app.py`, and open the address that it prints.

The network is model.onnx beside this file, as `animesion export RUN --to onnx` writes it. This file needs gradio,
numpy, onnxruntime and Pillow, and nothing else; it is copied as it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent
#: Guesses that are shown.
SHOWN = 5
#: Pixels of an image that is accepted.
Image.MAX_IMAGE_PIXELS = 50_000_000


class Network:
    """The network, with the names of its classes or tags.

    Args:
        path: file of the network, whose metadata describes it.
    """

    def __init__(self, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.card: dict[str, Any] = json.loads(self.session.get_modelmeta().custom_metadata_map["animesion"])
        self.names = self.card["classes"] or [str(i) for i in range(self.card["num_classes"])]
        self.is_tagger = bool(self.card.get("tag_categories"))

    def pixels(self, image: Image.Image) -> np.ndarray:
        """The network's input for an image: (1, 3, S, S), normalised."""
        size = self.card["img_size"]
        whole = max(size, int(size / self.card["crop_pct"]))
        upright = ImageOps.exif_transpose(image)
        if "A" in upright.getbands() or "transparency" in upright.info:  # what is transparent becomes white
            layer = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        rgb = upright.convert("RGB")
        how = Image.Resampling.BOX if max(rgb.size) > whole else Image.Resampling.BILINEAR
        resized = rgb.resize((whole, whole), how)
        edge = (whole - size) // 2
        values = np.asarray(resized, np.float32)[edge : edge + size, edge : edge + size] / 255
        values = (values - np.float32(self.card["mean"])) / np.float32(self.card["std"])
        return values.transpose(2, 0, 1)[None]

    def predict(self, image: Image.Image | None) -> dict[str, float]:
        """Names and probabilities, most probable first; nothing without an image."""
        if image is None:
            return {}
        [logits] = self.session.run(None, {"images": self.pixels(image)})[0].astype(np.float64)
        if self.is_tagger:
            values = 1 / (1 + np.exp(-logits))
        else:
            powers = np.exp(logits - logits.max())
            values = powers / powers.sum()
        best = np.argsort(-values)[: len(values) if self.is_tagger else SHOWN]
        limits = self.card.get("thresholds") or [0.5] * len(values)
        return {self.names[i]: float(values[i]) for i in best if not self.is_tagger or values[i] >= limits[i]}


def page(network: Network) -> Any:
    """The Gradio page."""
    import gradio

    examples = sorted(str(path) for path in (HERE / "examples").glob("*.jpg"))
    what = f"{len(network.names):,} {'tags' if network.is_tagger else 'classes'}"
    return gradio.Interface(
        network.predict,
        gradio.Image(type="pil", label="Image"),
        gradio.Label(num_top_classes=20 if network.is_tagger else SHOWN, label="Prediction"),
        title=(HERE / "TITLE").read_text(encoding="utf-8").strip(),
        description=f"{network.card['name']}, {network.card['img_size']} px, {what}.",
        examples=examples or None,
        flagging_mode="never",
    )


if __name__ == "__main__":
    page(Network(HERE / "model.onnx")).launch()
