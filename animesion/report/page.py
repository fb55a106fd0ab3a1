"""HTML of a report: shell, styles, scripts and data in one file that needs no network.

Data is in a JSON block that browsers do not run, and only scripts whose digest is in the page's content security policy
run. An untrusted name can therefore neither end its block nor start a script.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a build that has nothing to do renders no page
    import jinja2

_VENDORED = ("preact.min.js", "preact-hooks.min.js", "htm.min.js", "uplot.min.js")
_OURS = (
    *("core.js", "plots.js", "decisions.js", "dataset.js", "pairs.js", "boxes.js", "viewer.js", "images.js", "run.js"),
    "explain.js",
    "main.js",  # starts the page
)
_STYLES = ("uplot.min.css", "style.css", "boxes.css", "viewer.css", "explain.css")

_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def render(data: Mapping[str, Any], *, live: bool = False) -> str:
    """Render the page as HTML.

    Args:
        data: JSON-ready data of `animesion.report.facts`, `animesion.report.runs` or `animesion explain`.
        live: whether `animesion browse` serves the page, which may then send requests to it.
    """
    from markupsafe import Markup

    scripts = [*(_asset(name) for name in _VENDORED), _own()]
    return _template().render(
        title=f"{data['name']}: report",
        policy=policy(live=live),
        styles=Markup("\n".join(_asset(name) for name in _STYLES)),
        scripts=[Markup(script) for script in scripts],
        data=Markup(as_json({**data, "live": live})),
    )


def policy(*, live: bool = False) -> str:
    """Content security policy of the page: allows its own scripts, styles and embedded images, and nothing else."""
    digests = " ".join(
        "'sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii") + "'"
        for script in [*(_asset(name) for name in _VENDORED), _own()]
    )
    served = "; connect-src 'self'" if live else ""
    images = "img-src 'self' data:" if live else "img-src data:"
    return (
        f"default-src 'none'; {images}; style-src 'unsafe-inline'; script-src {digests}{served}; "
        "base-uri 'none'; form-action 'none'"
    )


def as_json(value: Any) -> str:
    """JSON that is safe inside a script element: `<`, `>`, `&` and line separators are escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # UTF-8 cannot encode a lone surrogate
    return text.encode("utf-8", "replace").decode().translate(_ESCAPES)


@functools.cache
def _own() -> str:
    return "(function () {\n'use strict';\n" + "\n".join(_asset(name) for name in _OURS) + "})();"


@functools.cache
def _asset(name: str) -> str:
    text = (resources.files("animesion.report") / "assets" / name).read_text(encoding="utf-8").strip() + "\n"
    if "</script" in text or "</style" in text or "<!--" in text:
        raise RuntimeError(f"{name} would end its own element")
    return text


@functools.cache
def _template() -> jinja2.Template:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("animesion.report", "assets"), undefined=jinja2.StrictUndefined, autoescape=True
    )
    return environment.get_template("page.html.j2")
