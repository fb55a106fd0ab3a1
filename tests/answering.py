"""A server for tests of crawlers, with responses written by the test."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from aiohttp import web

from animesion_sample.faults import LocalServer, local_server


def answering(answer: Callable[[web.Request], web.Response]) -> contextlib.AbstractContextManager[LocalServer]:
    """A server that responds to every path with the result of a function."""

    async def handler(request: web.Request) -> web.Response:
        return answer(request)

    def application() -> web.Application:
        app = web.Application()
        app.router.add_get("/{path:.*}", handler)
        return app

    return local_server(application)
