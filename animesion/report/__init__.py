"""The page that shows a build or a training run: one file that works from disk, or live from `animesion browse`.

`facts` and `runs` collect what is shown, `images` makes thumbnails, `page` writes the HTML, `live` serves it.
"""

from __future__ import annotations
