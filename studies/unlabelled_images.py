"""Collect images for training without labels: all of some folders but those that belong to what is tested later.

Of each folder a dataset was built. Images of its test split are left out, and so are all that share a group with an
image of its test or validation split: copies, and other images of a family. What the dataset dropped for other reasons
(a cap of classes, for one) is taken. Usage:

    python studies/unlabelled_images.py OUT DATASET=FOLDER [DATASET=FOLDER ...]

OUT has `train/<class>/` and `val/<class>/`, which `animesion train --recipe mae --data OUT` reads; `val` is the
validation split of the datasets, for the linear probe.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq


def main(out: Path, pairs: list[tuple[Path, Path]]) -> None:
    """Copy the images."""
    counts: Counter[str] = Counter()
    for dataset, folder in pairs:
        rows = pq.read_table(
            dataset / "curated.parquet", columns=["source_id", "key", "label", "split", "group", "extension"]
        ).to_pylist()
        held = {row["group"] for row in rows if row["split"] in ("val", "test")}
        for row in rows:
            split = "val" if row["split"] == "val" else "train" if row["group"] not in held else ""
            counts[split or "left out"] += 1
            if split:
                path = out / split / row["label"] / f"{row['key']}.{row['extension']}"
                source = folder / row["source_id"]
                if not (
                    path.resolve().is_relative_to(out.resolve()) and source.resolve().is_relative_to(folder.resolve())
                ):
                    sys.exit(f"{dataset} has a sample outside of its folder: {row['source_id']}")
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, path)
    print(", ".join(f"{count:,} {what}" for what, count in sorted(counts.items())))


if __name__ == "__main__":
    if len(sys.argv) < 3 or not all("=" in pair for pair in sys.argv[2:]):
        sys.exit(__doc__)
    split = [pair.split("=", 1) for pair in sys.argv[2:]]
    main(Path(sys.argv[1]), [(Path(dataset), Path(folder)) for dataset, folder in split])
