"""Throughput of the stream, compared with a baseline and other loaders: JPEG to float batches, RandomResizedCrop, flip.

    python tests/benchmarks/loader_throughput.py [--sizes 128 224] [--upsample 256] [--repeats 5] [--peers DIR]

The baseline is a pool of threads that runs the same decoder over bytes in memory without any guarantee. Every row runs
in a separate process: two epochs to warm up, then three measured ones; rows alternate. CPU time includes worker
processes. The first epoch of the stream, in which it verifies the digest of every sample, is printed separately.
`--peers` installs litdata, mosaicml-streaming and SPDL into separate virtual environments in DIR and reuses them. SPDL
decodes with PIL, as in its examples of torchvision's transforms: its own decoder needs the libraries of FFmpeg.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import venv
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FACES = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "holo-faces" / "faces-train-128.tar"
BATCH = 256
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PEERS = {"litdata": "litdata", "mosaicml-streaming": "mosaicml-streaming", "SPDL": "spdl-core"}


# -- one row, in its own process -------------------------------------------------------------------------------------


def ours(folder: Path, size: int, workers: int) -> Callable[[], Iterator[Any]]:
    """The stream with all guarantees; digests of samples are verified in the first warm-up epoch."""
    from animesion_training.data import Augment, Stream, open_data

    stream, augment = Stream(open_data(folder / "built"), "train", BATCH, size, workers=workers), Augment()
    return lambda: (augment(batch.images, batch.seeds) for batch in stream)


def floor(folder: Path, size: int, workers: int) -> Callable[[], Iterator[Any]]:
    """A pool of threads over bytes in memory."""
    import cv2
    import numpy as np
    import torch

    from animesion_training.data import Augment, RandomResizedCrop, open_data
    from animesion_training.data.decode import decode_into

    cv2.setNumThreads(1)
    samples = open_data(folder / "built").select("train")
    contents = [samples.read(i) for i in range(len(samples))]
    transform, augment, rng = RandomResizedCrop(size), Augment(), np.random.default_rng(0)
    pool = ThreadPoolExecutor(workers)

    def part(pixels: Any, rows: Any, numbers: Any) -> None:
        for out, row, u in zip(pixels, rows.tolist(), numbers.tolist(), strict=True):
            decode_into(out, contents[row], transform, u)

    def submit(rows: Any) -> tuple[Any, list[Any]]:
        pixels, numbers = np.empty((len(rows), size, size, 3), np.uint8), rng.random((len(rows), transform.numbers))
        steps = [slice(i, i + 16) for i in range(0, len(rows), 16)]
        return pixels, [pool.submit(part, pixels[s], rows[s], numbers[s]) for s in steps]

    def epoch() -> Iterator[Any]:
        order = rng.permutation(len(contents))
        ahead: deque[tuple[Any, list[Any]]] = deque()
        starts = iter(range(0, len(order), BATCH))
        while True:
            while len(ahead) < 3 and (start := next(starts, None)) is not None:
                ahead.append(submit(order[start : start + BATCH]))
            if not ahead:
                return
            pixels, futures = ahead.popleft()
            for future in futures:
                future.result()
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
            yield augment(images, torch.from_numpy(rng.integers(0, 2**62, len(images))))

    return epoch


def processes(folder: Path, size: int, workers: int) -> Callable[[], Iterator[Any]]:
    """Our decoder in torch's worker processes."""
    import cv2
    import numpy as np
    import torch

    from animesion_training.data import Augment, RandomResizedCrop, open_data
    from animesion_training.data.decode import decode_into

    samples, transform, augment = open_data(folder / "built").select("train"), RandomResizedCrop(size), Augment()

    class Images(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(samples)

        def __getitems__(self, rows: list[int]) -> tuple[Any, Any]:
            cv2.setNumThreads(1)
            rng = np.random.default_rng()
            pixels = np.empty((len(rows), size, size, 3), np.uint8)
            for out, row, u in zip(pixels, rows, rng.random((len(rows), transform.numbers)).tolist(), strict=True):
                decode_into(out, samples.read(row), transform, u)
            return torch.from_numpy(pixels), torch.from_numpy(rng.integers(0, 2**62, len(rows)))

    loader = torch.utils.data.DataLoader(
        Images(), BATCH, shuffle=True, num_workers=workers, persistent_workers=True, collate_fn=_as_it_is
    )
    return lambda: (augment(pixels.permute(0, 3, 1, 2), seeds) for pixels, seeds in loader)


def imagefolder(folder: Path, size: int, workers: int) -> Callable[[], Iterator[Any]]:
    """torchvision's ImageFolder with torch's DataLoader."""
    import torch
    from torchvision.datasets import ImageFolder

    decoded = ImageFolder(str(folder / "folders"), _pil_transform(size))
    loader: Any = torch.utils.data.DataLoader(
        decoded, BATCH, shuffle=True, num_workers=workers, persistent_workers=True
    )
    return lambda: (images for images, _ in loader)


def webdataset(folder: Path, size: int, workers: int) -> Callable[[], Iterator[Any]]:
    """webdataset's WebLoader over the built shards; workers create the batches, as its documentation recommends."""
    import webdataset as wds

    transform = _pil_transform(size)
    shards = [str(path) for path in sorted((folder / "built" / "data").glob("train-*.tar"))]
    dataset = (
        wds.WebDataset(shards, shardshuffle=False, empty_check=False)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transform, int)
        .batched(BATCH)
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=True)
    return lambda: (images for images, _ in loader)


def litdata(folder: Path, size: int, workers: int) -> Callable[[], Iterator[Any]]:
    """litdata's StreamingDataset; its JPEG serializer decodes to tensors."""
    import torch
    from litdata import StreamingDataLoader, StreamingDataset
    from torchvision.transforms import v2

    after = v2.Compose(
        [
            v2.RandomResizedCrop(size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )

    class Images(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return after(sample["image"]), sample["label"]

    loader = StreamingDataLoader(
        Images(str(folder / "litdata"), shuffle=True), batch_size=BATCH, num_workers=workers, persistent_workers=True
    )
    return lambda: (images for images, _ in loader)


def mosaic(folder: Path, size: int, workers: int) -> Callable[[], Iterator[Any]]:
    """mosaicml-streaming's StreamingDataset."""
    import torch
    from streaming import StreamingDataset

    transform = _pil_transform(size)

    class Images(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return transform(sample["image"]), sample["label"]

    decoded = Images(local=str(folder / "mosaic"), shuffle=True, batch_size=BATCH)
    loader: Any = torch.utils.data.DataLoader(decoded, BATCH, num_workers=workers, persistent_workers=True)
    return lambda: (images for images, _ in loader)


def spdl(folder: Path, size: int, workers: int) -> Callable[[], Iterator[Any]]:
    """SPDL's pipeline: threads decode files, and another one stacks them to batches."""
    import random

    import torch
    from PIL import Image
    from spdl.pipeline import PipelineBuilder

    transform = _pil_transform(size)
    paths = [(str(path), int(path.parent.name)) for path in sorted((folder / "folders").rglob("*.jpg"))]

    def load(sample: tuple[str, int]) -> tuple[Any, int]:
        with Image.open(sample[0]) as image:
            return transform(image.convert("RGB")), sample[1]

    def stack(samples: list[tuple[Any, int]]) -> tuple[Any, Any]:
        return torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])

    def epoch() -> Iterator[Any]:
        builder = PipelineBuilder().add_source(random.sample(paths, len(paths)))
        builder = builder.pipe(load, concurrency=workers).aggregate(BATCH).pipe(stack).add_sink(3)
        pipeline = builder.build(num_threads=workers + 1)
        with pipeline.auto_stop():
            yield from (images for images, _ in pipeline)

    return epoch


def _pil_transform(size: int) -> Callable[[Any], Any]:
    from torchvision import transforms as t

    return t.Compose([t.RandomResizedCrop(size), t.RandomHorizontalFlip(), t.ToTensor(), t.Normalize(MEAN, STD)])


def _as_it_is(batch: Any) -> Any:
    return batch


def read_only(folder: Path) -> dict[str, float]:
    """Samples read per CPU-second without decoding: by offset, and by webdataset's tar stage."""
    import webdataset as wds

    from animesion_training.data import open_data

    samples = open_data(folder / "built").select("train")
    shards = [str(path) for path in sorted((folder / "built" / "data").glob("train-*.tar"))]
    speeds: dict[str, list[float]] = {"by place": [], "tar stage": []}
    order = __import__("random").Random(0).sample(range(len(samples)), len(samples))
    for _ in range(5):
        start = time.process_time()
        for i in order:
            samples.read(i)
        speeds["by place"].append(len(order) / (time.process_time() - start))
        start = time.process_time()
        count = sum(1 for _ in wds.WebDataset(shards, shardshuffle=False))
        speeds["tar stage"].append(count / (time.process_time() - start))
    return {what: statistics.median(values[1:]) for what, values in speeds.items()}


ROWS: dict[str, Callable[[Path, int, int], Callable[[], Iterator[Any]]]] = {
    "threads, no guarantee": floor,
    "animesion Stream": ours,
    "our decoder, processes": processes,
    "ImageFolder": imagefolder,
    "webdataset": webdataset,
    "litdata": litdata,
    "mosaicml-streaming": mosaic,
    "SPDL": spdl,
}


def measure(row: str, folder: Path, size: int, workers: int) -> dict[str, float]:
    """Run two epochs to warm up and three measured ones.

    Returns:
        Images, wall seconds and CPU seconds (children included) of the measured epochs, and images/s of the first one.
    """
    epoch = ROWS[row](folder, size, workers)
    firsts = []
    for _ in range(2):
        start, count = time.perf_counter(), 0
        for images in epoch():
            assert images.shape[1:] == (3, size, size), images.shape
            count += len(images)
        firsts.append(count / (time.perf_counter() - start))
    wall, cpu, count = time.perf_counter(), _cpu_seconds(), 0
    for _ in range(3):
        for images in epoch():
            count += len(images)
    return {
        "images": count,
        "wall": time.perf_counter() - wall,
        "cpu": _cpu_seconds() - cpu,
        "first": firsts[0],
    }


def _cpu_seconds() -> float:
    """CPU seconds of this process and all its live descendants."""
    parents, times = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(path.parent.name)] = int(fields[1])
        times[int(path.parent.name)] = sum(map(int, fields[11:15]))
    mine, more = {os.getpid()}, True
    while more:
        grown = mine | {pid for pid, parent in parents.items() if parent in mine}
        more, mine = grown != mine, grown
    return sum(times.get(pid, 0) for pid in mine) / os.sysconf("SC_CLK_TCK")


# -- preparation -----------------------------------------------------------------------------------------------------


def upsampled(source: Path, target: Path, side: int) -> Path:
    """A tar of the same images, re-encoded at another size."""
    from PIL import Image

    with tarfile.open(source) as archive, tarfile.open(target, "w") as out:
        for member in archive:
            if not member.isreg():
                continue
            with Image.open(archive.extractfile(member)) as image:  # type: ignore[arg-type]
                large = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            content = io.BytesIO()
            large.save(content, "JPEG", quality=92)
            info = tarfile.TarInfo(member.name)
            info.size = content.tell()
            out.addfile(info, io.BytesIO(content.getvalue()))
    return target


def prepare(folder: Path, source: Path) -> int:
    """Build the dataset and copy its training samples into class folders; returns their number."""
    import animesion

    animesion.build(
        animesion.load_recipe("folder", [f'source.path="{source}"', "pack.shard_samples=1000"]), folder / "built"
    )
    count = 0
    for sample in animesion.open_dataset(folder / "built").samples("train"):
        path = folder / "folders" / f"{sample.label:03d}" / f"{sample.key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample.image)
        count += 1
    return count


WRITE_LITDATA = """
import sys
from pathlib import Path
from PIL import Image
from litdata import optimize
def sample(path): return {"image": Image.open(path), "label": int(Path(path).parent.name)}
if __name__ == "__main__":
    paths = sorted(str(p) for p in Path(sys.argv[1]).rglob("*.jpg"))
    optimize(fn=sample, inputs=paths, output_dir=sys.argv[2], chunk_bytes="64MB", num_workers=2)
"""
WRITE_MOSAIC = """
import sys
from pathlib import Path
from PIL import Image
from streaming import MDSWriter
with MDSWriter(out=sys.argv[2], columns={"image": "jpeg", "label": "int"}) as out:
    for path in sorted(Path(sys.argv[1]).rglob("*.jpg")):
        out.write({"image": Image.open(path), "label": int(path.parent.name)})
"""


def peer(name: str, home: Path, folder: Path) -> Path | str:
    """Install a peer and write its dataset; returns its interpreter, or the reason of the failure as text."""
    python = home / name / "bin" / "python"
    if not (home / name / "ready").exists():
        venv.create(home / name, with_pip=True, clear=True)
        # after the peer's own packages, use torch and torchvision of this environment: all rows decode with the same
        packages = subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        )
        Path(packages.strip(), "torch-from-outside.pth").write_text(sysconfig.get_path("purelib") + "\n")
        command: list[str | Path] = [python, "-m", "pip", "install", "-q", PEERS[name]]
        if (done := subprocess.run(command, capture_output=True, text=True)).returncode:
            return f"not installed: {done.stderr.strip().splitlines()[-1]}"
        (home / name / "ready").touch()
    if name == "SPDL":
        return python  # it reads the class folders
    script, out = (WRITE_LITDATA, "litdata") if name == "litdata" else (WRITE_MOSAIC, "mosaic")
    (folder / f"write_{out}.py").write_text(script)
    done = subprocess.run(
        [python, folder / f"write_{out}.py", folder / "folders", folder / out], capture_output=True, text=True
    )
    return f"its dataset cannot be written: {done.stderr.strip().splitlines()[-1]}" if done.returncode else python


# -- the table -------------------------------------------------------------------------------------------------------


def run_row(python: Path | str, row: str, folder: Path, size: int, workers: int) -> dict[str, float] | str:
    """Run `measure` in a new process; returns its result, or the last line of its error output."""
    command = [
        str(python),
        __file__,
        "--row",
        row,
        "--folder",
        str(folder),
        "--sizes",
        str(size),
        "--workers",
        str(workers),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    facts: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return facts


def table(pythons: dict[str, Path | str], folder: Path, size: int, arguments: argparse.Namespace) -> None:
    """Measure the rows alternately and print medians."""
    runs: dict[str, list[dict[str, float]]] = {row: [] for row in pythons}
    for _ in range(arguments.repeats):
        for row, python in pythons.items():
            result = run_row(python, row, folder, size, arguments.workers)
            if isinstance(result, str):
                print(f"{row}: {result}", file=sys.stderr)
            else:
                runs[row].append(result)
    speeds = {row: statistics.median(r["images"] / r["wall"] for r in of) for row, of in runs.items() if of}
    costs = {row: statistics.median(1000 * r["cpu"] / r["images"] for r in of) for row, of in runs.items() if of}
    pairs = list(zip(runs["animesion Stream"], runs["threads, no guarantee"], strict=False))
    print(f"\n{size} px, batches of {BATCH}, {arguments.workers} workers, medians of {arguments.repeats} runs")
    print(f"{'':<24} {'images/s':>9} {'CPU-s / 1,000':>14} {'Stream / this':>14}")
    for row, speed in speeds.items():
        print(f"{row:<24} {speed:>9,.0f} {costs[row]:>14.3f} {speeds['animesion Stream'] / speed:>13.2f}x")
    paired = statistics.median((a["images"] / a["wall"]) / (b["images"] / b["wall"]) for a, b in pairs)
    print(f"median of the paired ratios Stream / threads: {paired:.3f}")
    first = statistics.median(run["first"] for run in runs["animesion Stream"])
    print(f"first epoch of the stream, with verification of every digest: {first:,.0f} images/s")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=FACES, help="tar of class folders of JPEGs")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 224])
    parser.add_argument("--upsample", type=int, help="re-encode the images at this side in pixels first")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", type=Path, metavar="DIR", help="also measure litdata, mosaicml-streaming and SPDL")
    parser.add_argument("--row", choices=list(ROWS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(measure(arguments.row, arguments.folder, arguments.sizes[0], arguments.workers)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = arguments.data
        if arguments.upsample:
            source = upsampled(source, folder / "upsampled.tar", arguments.upsample)
        count = prepare(folder, source)
        pythons: dict[str, Path | str] = {row: sys.executable for row in ROWS if row not in PEERS}
        for row in PEERS if arguments.peers else ():
            python = peer(row, arguments.peers.resolve(), folder)
            if isinstance(python, str):
                print(f"{row}: {python}", file=sys.stderr)
            else:
                pythons[row] = python
        print(f"{count:,} images of {source.name}")
        speeds = read_only(folder)
        print(", ".join(f"{what}: {speed:,.0f} samples read per CPU-second" for what, speed in speeds.items()))
        for size in arguments.sizes:
            table(pythons, folder, size, arguments)


if __name__ == "__main__":
    main()
