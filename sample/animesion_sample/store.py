"""The files of a sample world on disk, each drawn once by one of the server processes and shared by all.

Processes coordinate through the file system: the one that creates ``<id>.claim`` draws, the others wait for
``<id>.file``, which is moved into place. ``md5/<checksum>`` contains the id of the post with that checksum.

Drawn files are kept in the user's cache, under a version that depends on everything that draws them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import PIL
from PIL import features

from animesion.storage.stores import cache_folder
from animesion_sample.world import Claim, SamplePost, World

_PATIENCE = 20.0
"""Seconds to wait for an image from another process, which is then assumed dead."""

_MOST_KEPT = 3000
"""Files of larger worlds are not kept: 30 KB each."""


def version() -> str:
    """The version of what draws and encodes the files: this package, Pillow, and its codecs."""
    digest = hashlib.sha256(PIL.__version__.encode())
    for codec in ("libjpeg_turbo", "jpg", "zlib", "webp"):
        digest.update(f"{codec} {features.version(codec)}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class KeptFiles:
    """Drawn files in the user's cache; without a writable cache, none are kept."""

    def __init__(self) -> None:
        self.folder = cache_folder(version(), "sample")
        with contextlib.suppress(OSError):
            for other in self.folder.parent.iterdir():
                if other != self.folder:  # drawn by another version
                    shutil.rmtree(other, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)

    def _path(self, post: SamplePost) -> Path:
        return self.folder / hashlib.sha256(repr((post.drawing, post.coding)).encode()).hexdigest()[:32]

    def read(self, post: SamplePost) -> bytes | None:
        """The file of a post; None if it is not here or damaged."""
        with contextlib.suppress(OSError):
            content = self._path(post).read_bytes()
            if hashlib.sha256(content[32:]).digest() == content[:32]:
                return content[32:]
        return None

    def write(self, post: SamplePost, data: bytes) -> None:
        """Keep the file of a post."""
        with contextlib.suppress(OSError):
            _write(self._path(post), hashlib.sha256(data).digest() + data)


def _write(path: Path, data: bytes) -> None:
    # readers never see a partly written file
    part = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
    part.write_bytes(data)
    part.replace(path)


@dataclass(frozen=True)
class _Names:
    file: Path
    claim: Path


class DrawnFiles:
    """The drawn files of one world.

    Args:
        world: The world to draw.
        folder: A folder that all server processes share.
    """

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.folder = world, folder
        self._claims: dict[int, Claim] = {}
        self._kept = KeptFiles() if len(world.posts) <= _MOST_KEPT else None
        (folder / "md5").mkdir(exist_ok=True)

    def _names(self, post: SamplePost) -> _Names:
        return _Names(self.folder / f"{post.id}.file", self.folder / f"{post.id}.claim")

    def _take(self, post: SamplePost) -> bool:
        try:
            os.close(os.open(self._names(post).claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True

    def _draw(self, post: SamplePost) -> bytes:
        data = self._kept.read(post) if self._kept else None
        if data is None:
            data = self.world.file(post)
            if self._kept:
                self._kept.write(post, data)
        self._claims[post.id] = claim = self.world.claim(post, data)
        _write(self.folder / "md5" / claim.md5, str(post.id).encode())
        _write(self._names(post).file, data)
        return data

    def draw_if_free(self, post: SamplePost) -> None:
        """Draw the file of a post unless a process has drawn or is drawing it."""
        if self._take(post):
            self._draw(post)

    def file(self, post: SamplePost) -> bytes:
        """The file of a post, drawn here or awaited from another process."""
        path = self._names(post).file
        if self._take(post):
            return self._draw(post)
        give_up = time.monotonic() + _PATIENCE
        while True:
            try:
                return path.read_bytes()
            except FileNotFoundError:
                if time.monotonic() > give_up:  # the process with the claim is dead
                    return self._draw(post)
                time.sleep(0.003)

    def claim(self, post: SamplePost) -> Claim:
        """The checksum and size that the site states for the file of a post."""
        known = self._claims.get(post.id)
        if known is None:
            known = self._claims[post.id] = self.world.claim(post, self.file(post))
        return known

    def claims(self, posts: list[SamplePost]) -> dict[int, Claim]:
        """The claims of many posts; draws unclaimed files before it waits for other processes."""
        for post in posts:
            if post.id not in self._claims:
                self.draw_if_free(post)
        return {post.id: self.claim(post) for post in posts}

    def find(self, md5: str) -> SamplePost | None:
        """The post for whose file the site states this checksum.

        A resumed crawl may request a file that this server has not listed yet, so all files are drawn before the
        result is None.
        """
        for patient in (False, True):
            if patient:
                for post in reversed(self.world.posts):
                    self.draw_if_free(post)
                for post in self.world.posts:
                    self.claim(post)
            try:
                return self.world.by_id[int((self.folder / "md5" / md5).read_bytes())]
            except FileNotFoundError:
                continue
        return None

    def warm(self) -> None:
        """Draw all files ahead of the requests, newest first like a crawler, until the folder is removed."""
        with contextlib.suppress(FileNotFoundError):
            for post in reversed(self.world.posts):
                self.draw_if_free(post)
