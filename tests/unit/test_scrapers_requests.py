"""What is sent for the URLs that people have in tables: blanks, other scripts, percent signs, fragments."""

from __future__ import annotations

import pytest
from aiohttp import web

from animesion_sample.faults import local_server
from animesion_scrapers import Download, RateLimiter, Retries, download_all

HOST = "cdn.sample-booru.invalid"

#: What follows the host in a table -> the target of the request, as browsers send it.
FORMS = {
    "/a b.jpg": "/a%20b.jpg",
    "/a%20b.jpg ": "/a%20b.jpg",
    "/日本.jpg": "/%E6%97%A5%E6%9C%AC.jpg",
    "/100%.jpg": "/100%25.jpg",
    "/q.jpg?a=b c&d=é": "/q.jpg?a=b%20c&d=%C3%A9",
    "/q.jpg?a=b%20c+d": "/q.jpg?a=b%20c+d",
    "/semi;x=1.jpg": "/semi;x=1.jpg",
    "/pipe|x.jpg": "/pipe%7Cx.jpg",
    "/dot/../up.jpg": "/up.jpg",
    "/dbl//slash.jpg": "/dbl//slash.jpg",
    "/hash.jpg#frag": "/hash.jpg",
    "/plus+x.jpg": "/plus+x.jpg",
    "/amp.jpg?a=1&amp;b=2": "/amp.jpg?a=1&amp;b=2",
    "/tilde~.jpg": "/tilde~.jpg",
    "/quote'x.jpg": "/quote'x.jpg",
    "/UPPER.JPG": "/UPPER.JPG",
}


def test_the_target_of_a_request_is_that_of_browsers() -> None:
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.raw_path)
        return web.Response(body=b"content")

    def application() -> web.Application:
        app = web.Application()
        app.router.add_get("/{name:.*}", answer)
        return app

    with local_server(application) as server:
        results = download_all(
            [Download(form, f"http://{HOST}{form}") for form in FORMS],
            user_agent="animesion-tests/1.0 (tests@example.org)",
            limiter=RateLimiter(float("inf")),
            connect_to={HOST: server.address},
            retries=Retries(attempts=1),
            concurrency=1,
        )
        assert {result.status for result in results} == {"ok"}
    assert dict(zip(FORMS, asked, strict=True)) == FORMS


@pytest.mark.parametrize("location", ["/to a b/日本.jpg", "//other.invalid/x?a=b c", "?d e"])
def test_redirects_may_have_the_same_characters(location: str) -> None:
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(f"{request.host}{request.raw_path}")
        if len(asked) == 1:
            return web.Response(status=302, headers={"Location": location})
        return web.Response(body=b"content")

    def application() -> web.Application:
        app = web.Application()
        app.router.add_get("/{name:.*}", answer)
        return app

    with local_server(application) as server:
        [result] = download_all(
            [Download("k", f"http://{HOST}/first")],
            user_agent="animesion-tests/1.0 (tests@example.org)",
            limiter=RateLimiter(float("inf")),
            connect_to=dict.fromkeys([HOST, "other.invalid"], server.address),
        )
    expected = {
        "/to a b/日本.jpg": f"{HOST}/to%20a%20b/%E6%97%A5%E6%9C%AC.jpg",
        "//other.invalid/x?a=b c": "other.invalid/x?a=b%20c",
        "?d e": f"{HOST}/first?d%20e",
    }
    assert (result.status, asked[1]) == ("ok", expected[location])
