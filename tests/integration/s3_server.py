"""Moto's S3 server on loopback, with one bucket that keeps every version, and what its clients need to find it."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

BUCKET = "shelf"
SECRET = "loopbackSecret"


@dataclass
class Shelf:
    """The server.

    Attributes:
        env: the environment of a process that uses it; nothing of the machine's own accounts.
        client: boto3's.
        bucket: its bucket.
    """

    env: dict[str, str]
    client: Any
    bucket: str

    def put(self, prefix: str, folder: Path) -> None:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.client.upload_file(str(path), self.bucket, prefix + path.relative_to(folder).as_posix())

    def objects(self, prefix: str) -> dict[str, bytes]:
        """Every object below the prefix, which ends in a slash."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        found = {}
        for each in (each for page in pages for each in page.get("Contents", [])):
            with self.client.get_object(Bucket=self.bucket, Key=each["Key"])["Body"] as body:
                found[each["Key"].removeprefix(prefix)] = body.read()
        return found

    def written(self, prefix: str) -> Counter[str]:
        """How often each object was written."""
        pages = self.client.get_paginator("list_object_versions").paginate(Bucket=self.bucket, Prefix=prefix)
        return Counter(each["Key"].removeprefix(prefix) for page in pages for each in page.get("Versions", []))


@contextmanager
def serving(home: Path, bucket: str = BUCKET) -> Iterator[Shelf]:
    """Serve; skips the test where moto or s3fs is not installed."""
    pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server.start()
    host, port = server.get_host_and_port()
    own = {
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
    }
    requests.post(f"{own['AWS_ENDPOINT_URL']}/moto-api/reset", timeout=30).raise_for_status()  # servers share a world
    client = boto3.client(
        "s3", endpoint_url=own["AWS_ENDPOINT_URL"], region_name="us-east-1",
        aws_access_key_id="someone", aws_secret_access_key=SECRET,
    )  # fmt: skip
    client.create_bucket(Bucket=bucket)
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "AWS_", "HUGGING"))}
    s3fs.S3FileSystem.clear_instance_cache()  # clients keep to the server that they were made for
    yield Shelf(kept | own, client, bucket)
    s3fs.S3FileSystem.clear_instance_cache()
    client.close()
    server.stop()
