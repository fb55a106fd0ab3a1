"""What a build would do, from the source's listing alone: `animesion build --dry-run`."""

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

#: Hosts that are named, those with the most requests.
_BUSIEST = 10


def preview(
    recipe: Recipe, out: Path, *, replace: bool = False, count: Callable[[int], None] = lambda n: None, to: str = ""
) -> dict[str, Any]:
    """What a build would do, without writing: images by metadata verdict, bytes where known, state of `out`.

    For a crawled source also the requests that fetching takes, the seconds at the polite pace of the busiest host, and
    the ten hosts with the most requests. Memory grows with the number of hosts, 200 bytes each.

    Raises:
        UsageError: bad options of the source, or a folder that is not this recipe's.
    """
    from animesion_scrapers import ScraperError
    from animesion_scrapers.counts import HostCounts

    source = sources.make(recipe)
    open_upload(to, Workspace(out), recipe, replace=replace)
    Workspace(out).check(recipe.digest(), replace=replace)
    verdicts: dict[str, int] = {}
    listed = wanted = size = unknown = 0
    demand = _Demand()
    host_counts = HostCounts()
    crawled = source if isinstance(source, sources.Crawled) else None
    try:
        with source.session():
            for item in source.items():
                listed += 1
                reason = fetch.known_reason(item, recipe)
                if reason:
                    verdicts[reason] = verdicts.get(reason, 0) + 1
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
        "not_fetched": verdicts,
        "parts": -(-listed // fetch.PART_ITEMS),
        "notes": [*source.notes, *demand.sentences()],
    }


@dataclass
class _Demand:
    """What a crawl asks of how many hosts, and of the busiest of them."""

    requests: int = 0
    seconds: float = 0.0
    hosts: int = 0
    busiest: list[dict[str, Any]] = field(default_factory=list)

    def sentences(self) -> list[str]:
        """The busiest hosts in words, if there are several."""
        if self.hosts < 2:
            return []
        hosts = []
        for host in self.busiest:
            known = f", {host['bytes'] / 1e6:,.1f} MB" if host["bytes"] else ""
            took = timedelta(seconds=round(host["seconds"]))
            hosts.append(f"{host['host']} {host['requests']:,} requests{known}, {took}")
        rest = self.hosts - len(self.busiest)
        return [f"{self.hosts:,} hosts; most is asked of {'; '.join(hosts)}{f'; {rest:,} more' * bool(rest)}"]


def _demand(source: sources.Crawled, host_counts: HostCounts) -> _Demand:
    requests, seconds = source.forecast({each.host: each.files for each in host_counts})
    demand = _Demand(requests, seconds, len(host_counts))
    for each in host_counts.most_common(_BUSIEST):
        requests, seconds = source.forecast({each.host: each.files})
        facts = {"requests": requests, "seconds": seconds, "bytes": each.bytes, "bytes_unknown": each.unknown}
        demand.busiest.append({"host": clean_text(each.host, 80), "files": each.files, **facts})
    return demand
