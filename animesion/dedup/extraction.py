"""Features that a search for copies needs, of images that are in files already, in worker processes.

For published datasets whose features are those of another search or of another version of a library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import PIL

from animesion.dedup import compare
from animesion.dedup.compare import Place
from animesion.images import codec, local_features
from animesion.images.windows import window_phashes

if TYPE_CHECKING:
    from animesion.executors import Executor

#: Images per job: a second or two of work.
_JOB_IMAGES = 100


class Extracted(NamedTuple):
    """Features of one image.

    Attributes:
        content: its local features or the hashes of its windows, as in `animesion.schemas.FEATURES`.
        width: of the image that they are of, in pixels.
        height: likewise.
    """

    content: bytes
    width: int
    height: int


def version(copies: str) -> str:
    """Version of the features that a search needs, with that of the library that they depend on.

    Args:
        copies: `local` or `hash`.
    """
    return local_features.version() if copies == "local" else f"windows-1/pillow-{PIL.__version__}"


@dataclass(frozen=True)
class ExtractJob:
    """Decode some images and compute their features.

    Attributes:
        places: where the images are.
        copies: `local` or `hash`.
        limits: limits of the decoder.
    """

    places: Sequence[Place]
    copies: str
    limits: codec.Limits

    @property
    def name(self) -> str:
        """Name of the job in messages, unlike any other's."""
        return f"features of {len(self.places)} images from byte {self.places[0].offset} of {self.places[0].path}"

    def run(self) -> list[Extracted]:
        """Compute the features, in the order of the places.

        Raises:
            UsageError: an image cannot be read.
        """
        found = []
        for place in self.places:
            image = compare.decoded(place, self.limits)
            if self.copies == "local":
                content = local_features.extract(image).tobytes()
            else:
                content = window_phashes(image.convert("L")).astype("<u8").tobytes()
            found.append(Extracted(content, *image.size))
        return found


def extract(
    places: Sequence[Place],
    copies: str,
    limits: codec.Limits,
    executor: Executor,
    advance: Callable[[int], None] = lambda images: None,
) -> list[Extracted]:
    """Compute the features of images, in the order of the places.

    Args:
        places: where the images are.
        copies: `local` or `hash`.
        limits: limits of the decoder.
        executor: runs the jobs.
        advance: called with the number of images that are done.

    Raises:
        UsageError: an image cannot be read.
    """
    jobs = [
        ExtractJob(places[start : start + _JOB_IMAGES], copies, limits) for start in range(0, len(places), _JOB_IMAGES)
    ]
    results: dict[str, list[Extracted]] = {}

    def finished(job: Any, result: list[Extracted]) -> None:
        results[job.name] = result
        advance(len(job.places))

    executor.run(jobs, finished)
    return [each for job in jobs for each in results[job.name]]
