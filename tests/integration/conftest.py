"""What several tests of sources watch."""

from __future__ import annotations

from collections import Counter

import pytest

from animesion_scrapers.http.records import Download, Downloaded
from animesion_scrapers.http.transfers import Transfers


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Keys of the images that are asked for over the network."""
    keys: Counter[str] = Counter()
    original = Transfers.fetch

    async def counting(self: Transfers, item: Download) -> Downloaded:
        if item.key != "table":
            keys[item.key] += 1
        return await original(self, item)

    monkeypatch.setattr(Transfers, "fetch", counting)
    return keys
