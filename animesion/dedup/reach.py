"""What a search for copies can and cannot see, in one sentence: for `animesion verify`, and for `--against`.

The figures are those of `docs/duplicates.md`, which has the commands that measure them.
"""

from __future__ import annotations

_WHERE = "docs/duplicates.md"

_SEEN = {
    "local": (
        "copies are searched by local features and compared by their pixels; recall measured on 1,000 faces, altered "
        f"in 24 ways: 0.982 to 1.000 each ({_WHERE}); not seen are copies smaller than half or larger than twice the "
        "scale, crops to less than a third of the area, photographs of one subject and tracings"
    ),
    "hash": (
        "copies are searched by hashes of windows and compared by their pixels; recall measured on 1,000 faces: 0.98 "
        "to 1.000 for another size, encoding or tone, a mirror image, a border and crops of up to 20 % of the sides, "
        f"0.87 for 10 % off one side, 0.3 to 0.6 under stickers and caption bars ({_WHERE}); not seen are turned "
        'copies, smaller crops, photographs of one subject and tracings; duplicates.copies = "local" sees more'
    ),
    "off": (
        "copies are searched by hashes of whole images, and no pixels are compared; recall measured on 1,000 faces: "
        f"0.99 to 1.000 for another size or encoding, 0.206 for crops of 2 %, 0.002 for crops of 5 % ({_WHERE}); not "
        "seen are larger crops, borders, turned copies, strong changes of tone and, unless duplicates.flip is set, "
        'mirror images; duplicates.copies = "local" sees more'
    ),
}


def sentence(copies: str, *, other_hash: str = "", decoded: bool = True) -> str:
    """What the search can and cannot see.

    Args:
        copies: `duplicates.copies`, decided: `local`, `hash` or `off`.
        other_hash: `duplicates.hash` if it is not pHash; else empty.
        decoded: whether pixels were read at all.
    """
    if not decoded:
        return "images were not decoded: a copy that differs in a byte is not seen, whatever its pixels are"
    if copies == "off" and other_hash:
        return (
            f"copies are searched by the {other_hash} of whole images and by thumbnails, and no pixels are compared; "
            f"what the hash finds by itself was measured on 1,000 faces ({_WHERE}); not seen are crops, borders, "
            "turned copies, strong changes of tone and, unless duplicates.flip is set, mirror images; "
            'duplicates.copies = "local" sees more'
        )
    return _SEEN[copies]
