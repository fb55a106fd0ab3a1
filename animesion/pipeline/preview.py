"""Preview a build from the source's listing alone, for `animesion build --dry-run`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from animesion import sources
from animesion.config.recipe import Recipe
from animesion.errors import AnimesionError, UsageError
from animesion.pipeline import fetch
from animesion.pipeline.runner import open_upload
from animesion.sources import clean_text
from animesion.storage.workspace import Workspace

if TYPE_CHECKING:
    from animesion_scrapers.counts import HostCounts

#: Number of hosts in the preview, by most requests.
_BUSIEST = 10


def preview(
    recipe: Recipe, out: Path, *, replace: bool = False, count: Callable[[int], None] = lambda n: None, to: str = ""
) -> dict[str, Any]:
    """Count what a build would list and fetch, without writing anything.

    For a crawled source this includes the number of requests, the seconds at the polite pace of the busiest host, and
    the ten hosts with the most requests. Memory grows by 200 bytes per host.

    Args:
        recipe: the recipe.
        out: output folder, or the work folder if the output is a URL.
        replace: accept a folder that another recipe wrote.
        count: called with the number of images listed so far, every 1000 images.
        to: URL of the output; empty if the output is `out`.

    Returns:
        JSON-ready facts: numbers of images to fetch and not to fetch by reason, bytes where known, the demand on hosts,
        and the parts that an earlier build has finished, by stage.

    Raises:
        UsageError: wrong options of the source, or a folder that another recipe wrote.
        AnimesionError: the source cannot be listed.
    """
    from animesion_scrapers import ScraperError
    from animesion_scrapers.counts import HostCounts

    source = sources.make(recipe)
    open_upload(to, Workspace(out), recipe, replace=replace)
    Workspace(out).check(recipe.digest(), replace=replace)
    not_fetched: dict[str, int] = {}
    listed = wanted = size = unknown = 0
    demand = _Demand()
    host_counts = HostCounts()
    crawled = source if isinstance(source, sources.Crawled) else None
    try:
        refused = fetch.removed_images(Workspace(out), recipe)
        with source.session():
            for item in source.items():
                listed += 1
                reason = fetch.known_reason(item, recipe, refused)
                if reason:
                    not_fetched[reason] = not_fetched.get(reason, 0) + 1
                else:
                    wanted += 1
                    size += item.bytes
                    unknown += not item.bytes
                    if crawled:
                        host_counts.add(crawled.file_host(item), item.bytes)
                if listed % 1000 == 0:
                    count(listed)
            if crawled:
                demand = _demand(crawled, host_counts)
    except ScraperError as error:
        raise AnimesionError(str(error)) from None
    if not listed:
        raise UsageError(f"the source of recipe {recipe.name} lists no images: check its [source] options")
    parts = -(-listed // fetch.PART_ITEMS)
    workspace = Workspace(out)
    done = {
        stage: sum(workspace.receipt(f"{stage}/part-{part:05d}") is not None for part in range(parts))
        for stage in ("fetch", "inspect")
    }
    return {
        "recipe": recipe.name,
        "digest": recipe.digest(),
        "out": to or str(out),
        "out_exists": out.exists(),
        "listed": listed,
        "to_fetch": wanted,
        "bytes_to_fetch": size,
        "bytes_unknown": unknown,
        "requests": demand.requests,
        "seconds": demand.seconds,
        "hosts": demand.hosts,
        "busiest_hosts": demand.busiest,
        "not_fetched": not_fetched,
        "parts": parts,
        "parts_done": done,
        "notes": [*source.notes, *demand.sentences()],
    }


@dataclass
class _Demand:
    """Requests and seconds that a crawl takes, its number of hosts, and facts on the busiest hosts."""

    requests: int = 0
    seconds: float = 0.0
    hosts: int = 0
    busiest: list[dict[str, Any]] = field(default_factory=list)

    def sentences(self) -> list[str]:
        """One sentence on the busiest hosts, if there are several hosts."""
        if self.hosts < 2:
            return []
        hosts = []
        for host in self.busiest:
            megabytes = f", {host['bytes'] / 1e6:,.1f} MB" if host["bytes"] else ""
            duration = timedelta(seconds=round(host["seconds"]))
            hosts.append(f"{host['host']} {host['requests']:,} requests{megabytes}, {duration}")
        others = self.hosts - len(self.busiest)
        if others:
            hosts.append(f"{others:,} more")
        return [f"{self.hosts:,} hosts; the busiest: {'; '.join(hosts)}"]


def _demand(source: sources.Crawled, host_counts: HostCounts) -> _Demand:
    requests, seconds = source.forecast({each.host: each.files for each in host_counts})
    demand = _Demand(requests, seconds, len(host_counts))
    for each in host_counts.most_common(_BUSIEST):
        requests, seconds = source.forecast({each.host: each.files})
        facts = {"requests": requests, "seconds": seconds, "bytes": each.bytes, "bytes_unknown": each.unknown}
        demand.busiest.append({"host": clean_text(each.host, 80), "files": each.files, **facts})
    return demand
