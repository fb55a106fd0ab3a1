"""Decode JPEGs on a GPU: torchvision's `decode_jpeg`, which runs nvJPEG, then crop and resize each image there.

The views are those that `decode` chooses, so a run draws the same crops with both decoders; pixels differ slightly.
torchvision runs the same calls on a CPU, where the tests compare the two. No GPU has run this module yet.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.io import ImageReadMode, decode_jpeg

from animesion.errors import UsageError
from animesion_training.data.decode import Content, View


def check_decoder(device: torch.device) -> None:
    """Decode a small image.

    Raises:
        UsageError: torchvision cannot decode on the device.
    """
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    try:
        decode_on_device([file.getvalue()], [View(0, 0, 16, 16, 8, 8, 0, 0)], 8, device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:200]
        raise UsageError(
            f"data.decoder is 'gpu', and torchvision cannot decode JPEGs on {device} ({reason}): use 'cpu'"
        ) from None


def decode_on_device(contents: Sequence[Content], views: Sequence[View], size: int, device: torch.device) -> Tensor:
    """Decode JPEGs that `decode.plain_jpeg` accepts, and take a view of each.

    Args:
        contents: of N files.
        views: their views.
        size: S, side of the squares in pixels.
        device: where to decode.

    Returns:
        Shape (N, S, S, 3), uint8, on the device.

    Raises:
        RuntimeError: one of the files cannot be decoded.
    """
    out = torch.empty((len(contents), size, size, 3), dtype=torch.uint8, device=device)
    if not contents:
        return out
    files = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]
    decoded: list[Tensor] = decode_jpeg(files, ImageReadMode.RGB, device=device)
    for square, pixels, view in zip(out, decoded, views, strict=True):
        part = pixels[:, view.top : view.top + view.height, view.left : view.left + view.width]
        whole = functional.interpolate(
            part[None].to(torch.float32), (view.to_height, view.to_width), mode="bilinear", antialias=True
        )
        cut = whole[0, :, view.y : view.y + size, view.x : view.x + size]
        square.copy_(cut.permute(1, 2, 0).add(0.5).clamp_(0, 255))
    return out
