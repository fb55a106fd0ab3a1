"""timm's own model tests for the registered networks: how many names of each family pass each of them.

    python tests/benchmarks/timm_model_tests.py [--tests FILE] [--all] [--names PATTERN]

The tests are `tests/test_models.py` of the installed version of timm, from its source archive, which pip downloads;
`--tests` gives the file instead. They are called as timm calls them: convolutional networks have the test of configs
with maps, transformers the one of `NON_STD_FILTERS`, and all of them the tests of the networks with
`forward_intermediates`. Combinations of methods are tested on ViT-Tiny, and on every registered backbone with `--all`,
which needs 16 GB of memory and hours.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import subprocess
import sys
import tarfile
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import animesion_training.models  # noqa: F401  # registers the networks
from animesion_training.models import shorthand

#: Column -> name of the test, and the arguments that timm gives it besides the name of the network.
TESTS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "forward": ("test_model_forward", (1,)),
    "backward": ("test_model_backward", (2,)),
    "config": ("test_model_default_cfgs", (1, "meta")),
    "features": ("test_model_forward_intermediates_features", (1,)),
    "intermediates": ("test_model_forward_intermediates", (1,)),
    "fx": ("test_model_forward_fx", (1,)),
    "fx backward": ("test_model_backward_fx", (2,)),
    "script": ("test_model_forward_torchscript", (1,)),
    "fx, scripted": ("test_model_forward_fx_torchscript", (1,)),
}


def download(folder: Path) -> Path:
    """Download the source archive of the installed timm with pip; returns the file of its model tests."""
    name = f"timm=={version('timm')}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-binary",
        "timm",
        "-d",
        str(folder),
        name,
    ]
    subprocess.run(command, check=True)
    [archive] = folder.glob("timm-*.tar.gz")
    with tarfile.open(archive) as members:
        [member] = [each for each in members if each.name.endswith("/tests/test_models.py")]
        file = members.extractfile(member)
        assert file is not None
        path = folder / "timm_test_models.py"
        path.write_bytes(file.read())
    return path


def families(every: bool) -> dict[str, list[str]]:
    """The registered names by family; combinations of methods by their kind."""
    found = {
        "LRNet": timm.list_models("lrnet*"),
        "ViTFS": timm.list_models("vitfs_*"),
        "IFA": timm.list_models("*_ifa") if every else ["vit_tiny_patch16_ifa"],
    }
    for name in shorthand.NAMES:
        if every or name.endswith("_vit_tiny_patch16"):
            _, methods, _ = shorthand.split_name(name)
            kinds = ("reductions" * bool(methods.reduction), "CLCA" * bool(methods.cache))
            kind = " + ".join(filter(None, kinds)) or ("adapters" if methods.adapter else "selectors")
            found.setdefault(kind, []).append(name)
    return found


def outcome(test: Callable[..., None], name: str, arguments: tuple[Any, ...]) -> str:
    """Run a test: `passed`, `skipped`, or the first line of the error."""
    torch.manual_seed(0)
    try:
        test(name, *arguments)
    except pytest.skip.Exception as error:
        return f"skipped: {error}"
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        return f"{type(error).__name__}: {lines[0][:150]}"
    return "passed"


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tests", type=Path, help="tests/test_models.py of timm's source")
    parser.add_argument("--all", action="store_true", help="every registered backbone")
    parser.add_argument("--names", default="*", help="pattern of names")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.tests or download(Path(folder))
        specification = importlib.util.spec_from_file_location("timm_test_models", path)
        assert specification is not None
        assert specification.loader is not None
        module: Any = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
    print(f"timm {version('timm')}, torch {torch.__version__}")
    print(f"| family | names | {' | '.join(TESTS)} |\n|---|---|{'---|' * len(TESTS)}")
    reasons: Counter[tuple[str, str, str]] = Counter()
    for family, all_names in families(arguments.all).items():
        names = fnmatch.filter(all_names, arguments.names)
        counts = []
        for column, (test, given) in TESTS.items():
            if column == "config" and family != "LRNet":
                test = "test_model_default_cfgs_non_std"
            elif column == "features" and family == "LRNet":
                test = "test_model_forward_features"
            results = [outcome(getattr(module, test), name, given) for name in names]
            counts.append(f"{results.count('passed')}/{len(names)}")
            for name, result in zip(names, results, strict=True):
                if result != "passed":
                    reasons[family, column, result] += 1
                    print(f"{name}: {test}: {result}", file=sys.stderr, flush=True)
        print(f"| {family} | {len(names)} | {' | '.join(counts)} |", flush=True)
    for (family, column, reason), count in reasons.items():
        print(f"{family}, {column}, {count}: {reason}")


if __name__ == "__main__":
    main()
