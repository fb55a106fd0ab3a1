"""JPEGs that torchvision decodes, as it would with nvJPEG on a GPU: on the CPU, which runs the same calls."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from animesion.errors import UsageError
from animesion_training.data import (
    DataSplits,
    RandomResizedCrop,
    Resize,
    ResizeCenterCrop,
    ResizeRandomCrop,
    Stream,
    Transform,
    open_data,
)
from tests.running import run_here

CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


@pytest.fixture
def folders(tmp_path: Path) -> DataSplits:
    """Smooth images of several forms and sizes: JPEGs, of which one is grey and one turned, and a PNG."""
    root, rng = tmp_path / "w" / "a", np.random.default_rng(0)
    root.mkdir(parents=True)
    for i, (width, height) in enumerate([(60, 40), (50, 90), (64, 64), (33, 47), (80, 60), (70, 50)]):
        image = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((width, height))
        exif = Image.Exif()
        if i == 4:
            exif[0x0112] = 6
        if i == 5:
            image.save(root / f"{i}.png")
        else:
            (image.convert("L") if i == 3 else image).save(root / f"{i}.jpg", quality=95, exif=exif)
    return open_data(tmp_path / "w")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "transform", [RandomResizedCrop(24, (0.5, 1)), ResizeRandomCrop(24, 8), Resize(24), ResizeCenterCrop(24)]
)
def test_both_decoders_take_the_same_views(folders: DataSplits, transform: Transform, workers: int) -> None:
    streams = [
        Stream(folders, "all", 4, 24, transform=transform, workers=workers, seed=2, decoder=decoder)
        for decoder in (None, CPU)
    ]
    for ours, theirs in zip(*streams, strict=True):
        assert ours.indices.tolist() == theirs.indices.tolist()
        assert ours.images.shape == theirs.images.shape
        assert theirs.images.stride() == ours.images.stride()
        gaps = (ours.images.float() - theirs.images.float()).abs().mean((1, 2, 3))
        assert gaps.max() < 4, gaps


def test_a_broken_image_is_named_or_skipped(folders: DataSplits) -> None:
    path = Path(folders.path) / "a" / "1.jpg"
    content = path.read_bytes()
    scan = content.index(b"\xff\xda")
    path.write_bytes(content[: scan + 4])  # the header is whole, and there are no pixels
    with pytest.raises(UsageError, match=r"1\.jpg does not decode"):
        list(Stream(folders, "all", 6, 24, decoder=CPU))
    stream = Stream(folders, "all", 6, 24, decoder=CPU, on_error="skip")
    [batch] = stream
    assert sorted(batch.indices.tolist()) == [0, 2, 3, 4, 5]
    assert (stream.skipped, stream.failures[0].sample) == (1, 1)


def test_a_device_that_cannot_decode_is_refused(folders: DataSplits, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_nvjpeg(*arguments: object, **options: object) -> None:
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")

    monkeypatch.setattr("animesion_training.data.device_decode.decode_jpeg", without_nvjpeg)
    with pytest.raises(UsageError, match=r"torchvision cannot decode JPEGs on cpu \(.*nvJPEG support\): use 'cpu'"):
        Stream(folders, "all", 6, 24, decoder=CPU)
    command = ("train", "--data", folders.path, "--device", "cpu", "--find-lr", "--set", "data.train=all")
    assert "use 'cpu'" in run_here(*command, "--set", "data.decoder=gpu", "--img-size", "32").stderr
