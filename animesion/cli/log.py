"""`animesion log`: the versions of a dataset that has grown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command(epilog="Example: animesion log datasets/faces")
@click.argument("path", metavar="DATASET")
@click.option("--json", "as_json", is_flag=True, help="Print the versions as JSON.")
def log(path: str, as_json: bool) -> None:
    """List the versions of DATASET, the newest first: images, and what was added and removed since the version before.

    A version is named by the SHA-256 of its dataset.json. `animesion build --update` makes a new one.
    """
    import hashlib
    import json

    from animesion import open_dataset
    from animesion.dataset import remote
    from animesion.pipeline import versions

    dataset = open_dataset(remote.local(path))
    content = (Path(dataset.path) / "dataset.json").read_bytes()
    facts: dict[str, Any] = json.loads(content)
    listed = versions.next_lineage({**facts, "images": dataset.images}, hashlib.sha256(content).hexdigest())
    if as_json:
        click.echo(json.dumps({"dataset": path, "versions": listed[::-1]}, indent=1))
        return
    for each in listed[::-1]:
        change = f"{each['added']:+,} {-each['removed']:+,}" if each is not listed[0] else "first"
        click.echo(f"{each['dataset'][:12]}  {each['images']:>11,} images  {change}")
