"""The HTML of a report: shell, styles, scripts and data in one file that asks no network for anything.

Data stands in a JSON block that no browser runs; scripts run only when their digest is in the page's own content
security policy. So a name from outside can neither end its block nor start a script.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

_KEPT = ("preact.min.js", "preact-hooks.min.js", "htm.min.js", "uplot.min.js")
_OURS = ("core.js", "plots.js", "dataset.js", "run.js", "main.js")
_STYLES = ("uplot.min.css", "style.css")

_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def render(data: Mapping[str, Any], *, live: bool = False) -> str:
    """The page.

    Args:
        data: of `animesion.report.facts` or `animesion.report.runs`, JSON-ready.
        live: it is served by `animesion browse` and may ask that server.
    """
    scripts = [*(_asset(name) for name in _KEPT), _own()]
    return _template().render(
        title=f"{data['name']}: report",
        policy=policy(live=live),
        styles=Markup("\n".join(_asset(name) for name in _STYLES)),
        scripts=[Markup(script) for script in scripts],
        data=Markup(as_json({**data, "live": live})),
    )


def policy(*, live: bool = False) -> str:
    """The content security policy of the page: its own scripts, its own styles, images inside it, nothing else."""
    digests = " ".join(
        "'sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii") + "'"
        for script in [*(_asset(name) for name in _KEPT), _own()]
    )
    served = "; connect-src 'self'" if live else ""
    images = "img-src 'self' data:" if live else "img-src data:"
    return (
        f"default-src 'none'; {images}; style-src 'unsafe-inline'; script-src {digests}{served}; "
        "base-uri 'none'; form-action 'none'"
    )


def as_json(value: Any) -> str:
    """JSON that may stand inside a script element: no `<`, `>`, `&` or line separator as it is."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # a lone surrogate is no text that a file can hold
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


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("animesion.report", "assets"), undefined=jinja2.StrictUndefined, autoescape=True
    )
    return environment.get_template("page.html.j2")
