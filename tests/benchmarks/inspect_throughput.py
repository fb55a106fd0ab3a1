"""Cost of inspecting images: hashes and quality figures, compared with decoding alone and with other packages.

    OMP_NUM_THREADS=1 python tests/benchmarks/inspect_throughput.py
        [--faces ../shared/data/holo-faces/faces-train-128.tar] [--images 1000] [--large 24] [--rounds 3]
        [--others FOLDER]

Prints images per second of CPU time in one process, best of the rounds, on real face crops of 128 x 128 px and on
synthetic images of 1920 x 1080 px (JPEG, quality 90). `--others` also measures imagededup's PHash encoding and
cleanvision's checks on the same files, each in a virtual environment that the script creates in FOLDER. If a package
cannot be installed, the script prints the reason and leaves it out.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from animesion.config.recipe import Recipe, load
from animesion.images import codec, features, hashing, quality
from animesion.pipeline import inspect

TIMED = """
import resource, sys, time
from pathlib import Path
def spent():
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
folder = sys.argv[1]
"""

OTHERS = {
    "imagededup": """
from imagededup.methods import PHash
method = PHash(verbose=False)
start = spent()
method.encode_images(image_dir=folder, num_enc_workers=0)
print(spent() - start)
""",
    "cleanvision": """
import contextlib, io
from cleanvision import Imagelab
start = spent()
with contextlib.redirect_stdout(io.StringIO()):
    Imagelab(data_path=folder).find_issues(n_jobs=1)
print(spent() - start)
""",
}


PORTABLE = "inspect without the compiled pass"


@contextmanager
def portable() -> Iterator[None]:
    """Run as if `_pixels.c` had not been compiled."""
    with mock.patch.object(hashing, "compiled", None):
        features._compiled.cache_clear()
        yield
    features._compiled.cache_clear()
    features.lacking()  # fills the cache again, outside of any measurement


def synthetic_images(count: int) -> list[bytes]:
    """Images of two megapixels with blobs of colour and grain, which are neither trivial nor pure noise."""
    found = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        blobs = Image.fromarray(rng.integers(0, 256, (27, 48, 3), dtype=np.uint8)).resize((1920, 1080), 3)
        grain = rng.integers(-12, 13, (1080, 1920, 1))
        image = Image.fromarray((np.asarray(blobs) + grain).clip(0, 255).astype(np.uint8))
        out = io.BytesIO()
        image.save(out, "JPEG", quality=90)
        found.append(out.getvalue())
    return found


def rates(contents: list[bytes], recipe: Recipe, rounds: int) -> dict[str, float]:
    """Images per second of CPU time of each step."""
    limits = codec.Limits()
    decoded = [codec.decode(content, limits).image for content in contents[:200]]

    def inspected(content: bytes) -> None:
        inspect.features(codec.decode(content, limits), None, recipe)

    def looked(content: bytes) -> None:
        features.compute_features(codec.decode(content, limits).image)

    def opened(content: bytes) -> None:
        with Image.open(io.BytesIO(content)) as image:
            image.load()

    def drafted(content: bytes) -> None:
        with Image.open(io.BytesIO(content)) as image:
            image.draft("RGB", (256, 256))
            image.load()

    def passed(image: Image.Image) -> None:
        plan, module = features._plan(image.size), features._compiled()
        assert plan is not None
        assert module is not None
        module.look(hashing.words_of(image) or image.tobytes(), 4, *plan)

    # no image is kept: the allocation of new memory for each would be measured too
    steps: dict[str, tuple[Callable[[Any], object], Sequence[Any]]] = {
        "decode (the baseline)": (lambda content: codec.decode(content, limits), contents),
        "inspect: decode, hashes, quality": (inspected, contents),
        "decode and all but the pixel digest": (looked, contents),
        PORTABLE: (inspected, contents),
        "Pillow's open and load alone": (opened, contents),
        "a draft decode to 256 px (not used)": (drafted, contents),
        "  of it: pixel digest": (hashing.of_pixels, decoded),
        "  of it: hashes, thumbnail and figures": (features.compute_features, decoded),
        "  of these: the compiled code alone": (passed, decoded),
        "  portable: pHash": (hashing.phashes, decoded),
        "  portable: thumbnail": (hashing.thumbnail, decoded),
        "  portable: quality": (quality.measure, decoded),
    }
    taken = {name: float("inf") for name in steps}
    for _ in range(rounds):  # alternate, so that other load on the machine affects all steps
        for name, (step, items) in steps.items():
            with portable() if name == PORTABLE else nullcontext():
                start = time.process_time()
                for item in items:
                    step(item)
                taken[name] = min(taken[name], (time.process_time() - start) / len(items))
    return {name: 1 / seconds for name, seconds in taken.items()}


def other(name: str, contents: list[bytes], home: Path) -> str:
    """Images per second of another package on the same files, or the reason why it was not measured."""
    python = home / name / "bin" / "python"
    if not (home / name / "ready").exists():
        print(f"installing {name} in {home / name}", file=sys.stderr)
        venv.create(home / name, with_pip=True, clear=True)
        # imagededup imports torch for other methods: use the torch of this environment
        where: list[str | Path] = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        packages = Path(subprocess.check_output(where, text=True).strip())
        (packages / "torch-from-outside.pth").write_text(sysconfig.get_path("purelib") + "\n")
        done = subprocess.run([python, "-m", "pip", "install", "-q", name], capture_output=True, text=True)
        if done.returncode:
            return f"skipped: installation failed ({(done.stderr.strip().splitlines() or ['no message'])[-1][:120]})"
        (home / name / "ready").touch()
    with tempfile.TemporaryDirectory() as folder:
        for number, content in enumerate(contents):
            Path(folder, f"{number:06d}.jpg").write_bytes(content)
        done = subprocess.run([python, "-c", TIMED + OTHERS[name], folder], capture_output=True, text=True)
    try:
        return f"{len(contents) / float(done.stdout.strip().splitlines()[-1]):,.0f}"
    except (ValueError, IndexError):
        return f"skipped: run failed ({(done.stderr.strip().splitlines() or ['no message'])[-1][:120]})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(__file__).resolve().parents[3] / "shared" / "data" / "holo-faces" / "faces-train-128.tar"
    parser.add_argument("--faces", type=Path, default=shared, help="tar of face crops")
    parser.add_argument("--images", type=int, default=1000, help="number of faces")
    parser.add_argument("--large", type=int, default=24, help="number of large images")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--others", type=Path, help="folder for the environments of other packages")
    given = parser.parse_args()
    recipe = load("folder", ["source.path=x"])
    sets = {f"{given.large} synthetic images of 1920x1080": synthetic_images(given.large)}
    if given.faces.is_file():
        with tarfile.open(given.faces) as tar:
            files = (tar.extractfile(member) for member in tar if member.isfile())
            chosen = [file.read() for file, _ in zip(filter(None, files), range(given.images), strict=False)]
        sets = {f"{len(chosen)} faces of {given.faces.name}": chosen, **sets}
    else:
        print(f"faces are left out: {given.faces} not found")
    for title, contents in sets.items():
        found = rates(contents, recipe, given.rounds)
        baseline = found["decode (the baseline)"]
        print(f"\n{title}: images per second of CPU time, and as a share of decoding alone")
        for name, rate in found.items():
            print(f"{name:<40}{rate:>10,.0f}{rate / baseline:>9.2f}")
        # what no Python around the compiled code could exceed
        needed = 1 / baseline + 1 / found["  of these: the compiled code alone"] + 1 / found["  of it: pixel digest"]
        print(f"{'decode, compiled code and digest alone':<40}{1 / needed:>10,.0f}{1 / needed / baseline:>9.2f}")
        for name in OTHERS if given.others else ():
            print(f"{name:<40}{other(name, contents, given.others):>10}")


if __name__ == "__main__":
    main()
