"""HTML report of a build or a training run: one self-contained file, or a live page from `animesion browse`.

`facts`, `pairs` and `runs` collect the data, `images` makes thumbnails, `page` renders the HTML, `live` serves it.
"""

from __future__ import annotations
