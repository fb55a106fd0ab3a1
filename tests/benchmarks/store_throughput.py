"""Throughput of a bucket: `python tests/benchmarks/store_throughput.py` (requires moto and s3fs).

Runs against moto's S3 server in a separate process on loopback: uploading a shard and reading it back, listing, and
reading images from a bucket and from a folder. The server runs Python code on the same cores, so the rates are lower
bounds, and their ratios are more meaningful.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_SERVER = """
import logging, sys, boto3
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.WARNING)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
host, port = server.get_host_and_port()
url = f"http://{host}:{port}"
client = boto3.client("s3", endpoint_url=url)
client.create_bucket(Bucket="bench")
folder, count = sys.argv[1], int(sys.argv[2])
for i in range(count):
    with open(f"{folder}/class-{i % 20:02d}/{i:06d}.jpg", "rb") as file:
        client.put_object(Bucket="bench", Key=f"faces/class-{i % 20:02d}/{i:06d}.jpg", Body=file.read())
print(url, flush=True)
sys.stdin.read()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--bytes", type=int, default=40_000, help="size of an image in bytes")
    parser.add_argument("--shard", type=int, default=256, help="size of the shard in MiB")
    options = parser.parse_args()
    os.environ |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "faces"
        for i in range(options.images):
            path = folder / f"class-{i % 20:02d}" / f"{i:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(os.urandom(options.bytes))
        command = [sys.executable, "-c", _SERVER, str(folder), str(options.images)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            os.environ["AWS_ENDPOINT_URL"] = server.stdout.readline().strip()
            measure(folder, options.images, options.shard)
            server.terminate()


def measure(folder: Path, images: int, megabytes: int) -> None:
    from animesion.publishing import File
    from animesion.publishing.object_store import ObjectStore
    from animesion.sources.folder import FolderOptions, FolderSource

    rates = {}
    for place in (str(folder), "s3://bench/faces"):
        source = FolderSource(FolderOptions(path=place, family="", max_bytes=1 << 26))
        began, memory = time.perf_counter(), peak()
        items = list(source.items())
        listed = time.perf_counter()
        size = sum(len(payload.content) for payload in source.read(items))
        rates[place] = images / (time.perf_counter() - listed)
        print(
            f"{place}: {images:,} listed in {listed - began:.1f} s (memory grows by {peak() - memory:.0f} MB), "
            f"read at {rates[place]:,.0f} images/s, {size / (time.perf_counter() - listed) / 1e6:.0f} MB/s"
        )
    print(f"reading from the bucket takes {rates[str(folder)] / rates['s3://bench/faces']:.1f} times as long")
    shard = folder / "shard.tar"
    shard.write_bytes(os.urandom(megabytes << 20))
    with shard.open("rb") as file:
        facts = File(
            "data/train-00000.tar", shard, shard.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
        )
    store, memory, began = ObjectStore("s3://bench/sets/one"), peak(), time.perf_counter()
    store.put(facts)
    sent = time.perf_counter()
    assert not store.fault(facts)
    proved = time.perf_counter()
    print(
        f"a shard of {megabytes} MiB: sent at {facts.bytes / (sent - began) / 1e6:.0f} MB/s, read back at "
        f"{facts.bytes / (proved - sent) / 1e6:.0f} MB/s, memory grows by {peak() - memory:.0f} MB"
    )


def peak() -> float:
    """Peak memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    main()
