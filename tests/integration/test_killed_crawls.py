"""A crawl that is killed twenty times ends with the bytes of an undisturbed one."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

from aiohttp import web

from animesion_sample.faults import local_server

from .crawling import HOST, body, wanted

KILLED = """
import json, sys
from pathlib import Path
from animesion_scrapers import Crawler, Download, Ledger, RateLimiter
folder, host, port = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
requests = [Download(**each) for each in json.loads(Path(sys.argv[4]).read_text())]
with Ledger(folder) as ledger:
    limiter = RateLimiter(1e9)
    with Crawler(ledger, user_agent="animesion-tests/1.0 (tests@example.org)", limiter=limiter, per_host=4,
                 connect_to={host: ("127.0.0.1", port)}) as crawler:
        entries = crawler.fetch("part", requests)
    with open(sys.argv[5], "wb") as out:  # what a part's tar is written from, in the order of the plan
        for request in requests:
            out.write(ledger.content(entries[request.key]))
"""


def test_twenty_kills_at_random_instants_give_the_same_bytes(tmp_path: Path) -> None:
    count = 600

    def slow() -> web.Application:
        async def file(request: web.Request) -> web.Response:
            await asyncio.sleep(0.02)
            return web.Response(body=body(int(request.match_info["number"])))

        app = web.Application()
        app.router.add_get(r"/data/{number:\d+}.jpg", file)
        return app

    requests = wanted(count)
    undisturbed = b"".join(body(number) for number in range(count))
    listing, folder, out = tmp_path / "requests.json", tmp_path / "ledger", tmp_path / "raw"
    listing.write_text(json.dumps([{"key": r.key, "url": r.url, "md5": r.md5} for r in requests]))
    rng = random.Random(8)
    kills, progress = 0, []
    with local_server(slow) as server:
        command: list[str | Path] = [sys.executable, "-c", KILLED, folder, HOST, str(server.address[1]), listing, out]
        while kills < 20:
            process = subprocess.Popen(command)
            # Killed some time after its first request, or the start of the interpreter takes every blow.
            before = sum(server.journal.paths.values())
            while process.poll() is None and sum(server.journal.paths.values()) == before:
                time.sleep(0.005)
            time.sleep(rng.uniform(0.0, 0.15))
            process.send_signal(signal.SIGKILL)
            if process.wait() == -signal.SIGKILL:
                kills += 1
            database = sqlite3.connect(folder / "ledger.sqlite")
            progress.append(database.execute("SELECT count(*) FROM items WHERE state = 'done'").fetchone()[0])
            database.close()
            assert out.exists() == (process.returncode == 0)
            if out.exists():
                break
        subprocess.run(command, check=True)
        asked = server.journal.paths
    assert kills == 20
    assert out.read_bytes() == undisturbed
    assert progress == sorted(progress)
    assert progress[-1] > 20
    # At each kill, four were in flight and at most one batch was not written down.
    repeats = sum(times - 1 for path, times in asked.items() if path.startswith("/data/"))
    assert repeats <= 20 * (4 + 64)
    assert all(asked[f"/data/{number}.jpg"] for number in range(count))
