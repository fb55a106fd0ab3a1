"""The source for WebDataset shards: tars of samples whose members share a key, ours or others'.

Members are listed by `animesion.sources.file_tree` and read in place. The label of a sample is read
in `animesion.sources.sample_labels`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal

from pydantic import Field

from animesion.config.settings import Section
from animesion.dataset import readings
from animesion.errors import AnimesionError, UsageError
from animesion.schemas import DropReason, Item, Payload
from animesion.sources import clean_text, families, file_key, stamps
from animesion.sources.file_sets import FileSet, ordered_splits, split_of
from animesion.sources.file_tree import Entry, FileTree
from animesion.sources.sample_labels import LARGEST_MEMBER, SIDE_FILES, ClassNames, SampleLabel, label_of
from animesion.sources.stored import PathOrUrl
from animesion.wording import amount

#: Samples whose side members are read at once.
_AT_ONCE = 256


class WebDatasetOptions(Section):
    """Options of the `webdataset` source."""

    path: PathOrUrl = Field(
        description="folder of .tar shards, one shard, or pattern such as train-{00000..00003}.tar; may be s3://, "
        "gs:// or hf://datasets/owner/name"
    )
    image_member: str = Field("", description="suffix of the image members, such as jpg; empty to find it")
    label_member: Literal["auto", "cls", "json", "txt"] = Field(
        "auto", description="member with the label; auto: .cls, else .json"
    )
    label_key: str = Field("", description="key of the label in .json members; empty to find it")
    classes: str = Field(
        "", description="CSV of class id and name, or text file with one name per line; empty for the one by the shards"
    )
    family: families.Family = "auto"
    max_bytes: int = Field(64 * 1024 * 1024, ge=1, description="larger files are dropped unread")


@dataclass(frozen=True)
class _Sample:
    """One sample: its shard, its key with folders, its image and its side members."""

    shard: str
    key: str
    image: Entry
    label: SampleLabel


@dataclass
class _Seen:
    """Counts for the notes."""

    without_image: int = 0
    repeated: int = 0
    by: Counter[str] = field(default_factory=Counter)
    suffixes: Counter[str] = field(default_factory=Counter)


class WebDatasetSource:
    """Samples in WebDataset shards."""

    Options = WebDatasetOptions
    summary: ClassVar[str] = "WebDataset shards (.tar), ours and others'; published splits kept"
    remote: ClassVar[bool] = False

    def __init__(self, options: WebDatasetOptions) -> None:
        self.options = options
        self.notes: list[str] = []

    def session(self) -> contextlib.AbstractContextManager[object]:
        """An empty context."""
        return contextlib.nullcontext()

    def items(self) -> Iterator[Item]:
        """One item per sample with an image, by shard and position in it."""
        files = FileSet(self.options.path, "source.path", ".tar")
        names = ClassNames.find(files, self.options.classes)
        shards = [each.name for each in files.files()]
        if names.is_ours and files.is_folder and any(name.startswith("data/") for name in shards):
            shards = [name for name in shards if name.startswith("data/")]  # raw/ holds the originals of a build
        seen = _Seen()
        samples: list[_Sample] = []
        for shard in shards:
            samples += self._samples(files, shard, names, seen)
        if not samples:
            raise UsageError(
                f"source.path: no sample in {self.options.path} has an image: a sample is a set of members such as "
                "0001.jpg and 0001.cls"
            )
        if not self.options.classes:
            names.check_first([sample.label for sample in samples])
        yield from self._items(samples)
        self.notes += _sentences(samples, shards, seen, names)

    def read(self, items: Sequence[Item]) -> Iterator[Payload]:
        """The bytes of images at their offsets in the shards."""
        files = FileSet(self.options.path, "source.path", ".tar")
        places: list[dict[str, Any]] = [json.loads(item.locator) for item in items]
        for shard, group in itertools.groupby(places, key=lambda place: str(place["shard"])):
            wanted = [(int(place["offset"]), int(place["size"])) for place in group]
            done = 0
            try:
                for content, (_, size) in zip(files.pieces(shard, wanted), wanted, strict=True):
                    if len(content) < size:
                        yield Payload(reason=DropReason.FETCH_FAILED, detail="the shard is cut short")
                    else:
                        yield Payload(content)
                    done += 1
            except FileNotFoundError:
                for _ in wanted[done:]:
                    yield Payload(reason=DropReason.MISSING_FILE, detail=clean_text(shard))

    def stamp(self) -> str:
        """A digest of the names, sizes and times of the shards, and of the files with the names of classes."""
        given = self.options.classes
        try:
            files = FileSet(self.options.path, "source.path", ".tar")
        except AnimesionError:  # the listing says what is wrong
            return ""
        return stamps.together(files.stamp(() if given else SIDE_FILES), stamps.of([], [given] if given else []))

    def _samples(self, files: FileSet, shard: str, names: ClassNames, seen: _Seen) -> Iterator[_Sample]:
        tree = FileTree(files.path_of(shard), self.options.max_bytes)
        listing = tree.listing()
        self.notes += [f"{shard}: {note}" for note in [*listing.notes, *listing.passed_over()]]
        members: dict[str, dict[str, Entry]] = {}
        for entry in listing.entries:
            folder, slash, base = entry.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            fields = members.setdefault(folder + slash + stem, {})
            if suffix.lower() in fields:
                seen.repeated += 1
            else:
                fields[suffix.lower()] = entry
        chosen = []
        for key, fields in members.items():
            suffix = self._image_suffix(fields, f"{shard}/{key}")
            if suffix:
                seen.suffixes[suffix] += 1
                chosen.append((key, fields[suffix], fields))
            else:
                seen.without_image += 1
        chosen.sort(key=lambda each: (int(each[1].locator["offset"]), os.fsencode(each[0])))
        for batch in _batches(chosen):
            contents = _side_contents(tree, [fields for _, _, fields in batch])
            for (key, image, _), content in zip(batch, contents, strict=True):
                label = label_of(content, names, self.options.label_member, self.options.label_key)
                seen.by[label.by] += 1
                yield _Sample(shard, key, image, label)

    def _image_suffix(self, fields: dict[str, Entry], where: str) -> str:
        """The suffix of a sample's image; empty if it has none."""
        if self.options.image_member:
            wanted = self.options.image_member.lower().removeprefix(".")
            return wanted if wanted in fields else ""
        images = [name for name in fields if f".{name.rpartition('.')[2]}" in readings.IMAGE_SUFFIXES]
        plain = [name for name in images if "." not in name]  # `jpg`, rather than `mask.png`
        choice = plain or images
        if len(choice) > 1:
            named = ", ".join(sorted(choice)[:8])
            raise UsageError(
                f"source.path: the sample {clean_text(where, 200)} has several images ({named}): "
                "set source.image_member to the suffix of one"
            )
        return choice[0] if choice else ""

    def _items(self, samples: Sequence[_Sample]) -> Iterator[Item]:
        stems = [PurePosixPath(sample.key).name for sample in samples]
        firsts = [sample.label.labels[0] if sample.label.labels else "" for sample in samples]
        known = families.tokens(stems, firsts, self.options.family)
        for order, (sample, stem, family) in enumerate(zip(samples, stems, known, strict=True)):
            label, image = sample.label, sample.image
            name = f"{sample.shard}/{image.name}"
            place = {"shard": sample.shard, **image.locator}
            yield Item(
                key=file_key("webdataset", os.fsencode(name), stem),
                source="webdataset",
                source_id=clean_text(name, 1000),
                locator=json.dumps(place),
                order=order,
                labels=label.labels,
                families=(*((f"group:{label.group}",) if label.group else ()), *family),
                split=split_of(sample.shard),
                class_order=label.class_id,
                rating=label.fields.get("rating", "")[:1].lower(),
                author=label.fields.get("author", ""),
                page_url=label.fields.get("page_url", ""),
                file_url=label.fields.get("file_url", ""),
                licence=label.fields.get("licence", ""),
                failure=image.failure or (DropReason.BAD_RECORD if label.fault else ""),
                detail=image.detail or label.fault,
            )


def _batches(
    values: Iterable[tuple[str, Entry, dict[str, Entry]]],
) -> Iterator[list[tuple[str, Entry, dict[str, Entry]]]]:
    iterator = iter(values)
    while batch := list(itertools.islice(iterator, _AT_ONCE)):
        yield batch


def _side_contents(tree: FileTree, samples: Sequence[dict[str, Entry]]) -> list[dict[str, bytes]]:
    """The contents of the `.cls`, `.json` and `.txt` members of samples; larger ones are no labels."""
    wanted = [
        (index, name, fields[name])
        for index, fields in enumerate(samples)
        for name in ("cls", "json", "txt")
        if name in fields and not fields[name].failure and int(fields[name].locator["size"]) <= LARGEST_MEMBER
    ]
    contents: list[dict[str, bytes]] = [{} for _ in samples]
    payloads = tree.read([entry.locator for _, _, entry in wanted])
    for (index, name, _), payload in zip(wanted, payloads, strict=True):
        if not payload.reason:
            contents[index][name] = payload.content
    return contents


def _sentences(samples: Sequence[_Sample], shards: Sequence[str], seen: _Seen, names: ClassNames) -> list[str]:
    """The notes: what was understood, and what was left out."""
    classes = {label for sample in samples for label in sample.label.labels}
    splits = ordered_splits({split_of(shard) for shard in shards})
    by = " and ".join(f".{name}" for name, _ in seen.by.most_common() if name) or "nothing"
    words = [
        f"{len(classes):,} {'class' if len(classes) == 1 else 'classes'}"
        f"{f' in splits {chr(47).join(splits)}' if splits else ''}, by {by}"
        f"{f' and {names.where}' if names.where else ''}",
        f"{len(samples):,} images ({', '.join(f'.{name}' for name, _ in seen.suffixes.most_common(4))}) in "
        f"{amount(len(shards), 'shard')}",
    ]
    if seen.by[""]:
        words.append(amount(seen.by[""], "image has no label", "images have no label"))
    if seen.without_image:
        words.append(amount(seen.without_image, "sample has no image", "samples have no image"))
    if seen.repeated:
        words.append(f"{amount(seen.repeated, 'member')} skipped, whose name the shard has already")
    return [f"{'; '.join(words)} (source.label_member, source.label_key and source.image_member choose others)"]
