"""The cast of the sample world: invented characters with distinct hair, eyes, headgear and clothes.

A design is the constant look of a character. Pose, expression, light and scene vary at random in ``drawing``.
"""

from __future__ import annotations

from dataclasses import dataclass

from animesion_sample.shapes import Colour

FAIR: Colour = (255, 228, 212)
PALE: Colour = (255, 238, 230)
TAN: Colour = (232, 184, 150)
DARK: Colour = (178, 124, 92)


@dataclass(frozen=True)
class Design:
    """The constant look of a character.

    Attributes:
        name: The character tag.
        work: The copyright tag of the character's invented work.
        hair: Hair colour.
        eyes: Colours of the left and the right eye.
        back: Style of the hair behind the head, a key of ``hair.BACKS``.
        fringe: Style of the hair over the forehead, a key of ``hair.FRINGES``.
        outfit: Kind of clothes, a key of ``outfits.OUTFITS``.
        cloth: Main colour of the clothes.
        trim: Second colour of the clothes, also of ribbons and hats.
        gear: Pieces worn on the head or growing from it, keys of ``headgear.GEAR``.
        skin: Skin colour.
        tips: Colour of the ends and the inside of the hair; a shade of the hair colour if None.
        boy: Whether the tag is ``1boy``.
    """

    name: str
    work: str
    hair: Colour
    eyes: tuple[Colour, Colour]
    back: str
    fringe: str
    outfit: str
    cloth: Colour
    trim: Colour
    gear: tuple[str, ...] = ()
    skin: Colour = FAIR
    tips: Colour | None = None
    boy: bool = False


BLACK: Colour = (58, 52, 72)
NAVY: Colour = (48, 62, 118)
BLUE: Colour = (82, 142, 226)
SKY: Colour = (136, 204, 240)
TEAL: Colour = (50, 178, 178)
MINT: Colour = (142, 222, 190)
GREEN: Colour = (84, 172, 92)
LIME: Colour = (176, 212, 92)
GOLD: Colour = (246, 206, 100)
BLOND: Colour = (250, 230, 160)
ORANGE: Colour = (242, 146, 66)
RED: Colour = (216, 62, 70)
WINE: Colour = (138, 44, 72)
PINK: Colour = (250, 164, 190)
ROSE: Colour = (236, 96, 146)
LILAC: Colour = (196, 164, 234)
VIOLET: Colour = (134, 88, 196)
PLUM: Colour = (92, 56, 120)
BROWN: Colour = (132, 88, 66)
CHESTNUT: Colour = (168, 100, 64)
SAND: Colour = (212, 176, 134)
SILVER: Colour = (206, 212, 226)
SNOW: Colour = (244, 244, 250)
GREY: Colour = (142, 146, 164)


def _same(colour: Colour) -> tuple[Colour, Colour]:
    return (colour, colour)


CAST: tuple[Design, ...] = (
    Design("minamo_shiori", "tidal_letters", BLUE, _same(GOLD), "twin_tails", "blunt", "sailor", SNOW, NAVY, ("bows",)),
    Design("akagane_tsubaki", "iron_garden", RED, _same(GREEN), "ponytail", "swept", "blazer", BLACK, RED, ("flower",)),
    Design(
        "hoshiyomi_luna_(astrolabe)",
        "astrolabe",
        LILAC,
        _same(VIOLET),
        "long",
        "centre",
        "cape",
        PLUM,
        GOLD,
        ("witch_hat",),
    ),
    Design("komorebi_haru", "leafside", GREEN, _same(BROWN), "bob", "messy", "overalls", GREEN, GOLD, ("leaf",)),
    Design(
        "shirokane_yuki", "tidal_letters", SNOW, _same(RED), "hime", "blunt", "kimono", PALE, RED, ("hairpin",), PALE
    ),
    Design(
        "kitsunebi_ran", "nine_lanterns", ORANGE, _same(GOLD), "wavy", "between", "kimono", RED, SNOW, ("fox_ears",)
    ),
    Design(
        "yoru_no_kaito",
        "iron_garden",
        BLACK,
        _same(BLUE),
        "spiky",
        "spiky",
        "hoodie",
        NAVY,
        SKY,
        ("eyepatch",),
        boy=True,
    ),
    Design("momoi_ichigo", "sugar_parade", PINK, _same(ROSE), "drills", "between", "frill", ROSE, SNOW, ("headdress",)),
    Design(
        "crème_brûlée_(pâtissière)",
        "sugar_parade",
        BLOND,
        _same(CHESTNUT),
        "bun",
        "parted",
        "maid",
        BROWN,
        SNOW,
        ("beret",),
    ),
    Design("tetsuno_rei", "iron_garden", SILVER, _same(TEAL), "short", "swept", "armour", GREY, TEAL, ("headphones",)),
    Design(
        "neko_no_suzu", "nine_lanterns", CHESTNUT, (GOLD, SKY), "short", "messy", "hoodie", GOLD, BROWN, ("cat_ears",)
    ),
    Design(
        "aoba_ren_(leafside)",
        "leafside",
        TEAL,
        _same(BROWN),
        "spiky",
        "messy",
        "tee",
        SNOW,
        TEAL,
        ("goggles",),
        TAN,
        boy=True,
    ),
    Design("kuroha_mizuki", "astrolabe", PLUM, _same(RED), "long", "cover", "dress", BLACK, WINE, ("horns",), PALE),
    Design(
        "himawari_nao", "leafside", GOLD, _same(BLUE), "low_tails", "parted", "overalls", BLUE, SNOW, ("straw_hat",)
    ),
    Design(
        "sumire_violetta", "sugar_parade", VIOLET, _same(MINT), "side_tail", "swept", "frill", LILAC, VIOLET, ("bow",)
    ),
    Design("usagi_ohta", "nine_lanterns", SNOW, _same(PINK), "bob", "blunt", "sailor", PINK, ROSE, ("rabbit_ears",)),
    Design(
        "benimaru_kaji",
        "iron_garden",
        WINE,
        _same(ORANGE),
        "spiky",
        "centre",
        "blazer",
        WINE,
        GOLD,
        ("headband",),
        TAN,
        boy=True,
    ),
    Design("mizore_sae", "astrolabe", SKY, _same(NAVY), "braid", "blunt", "coat", SNOW, SKY, ("earmuffs",), PALE),
    Design("chitose_mei", "tidal_letters", BROWN, _same(GREEN), "bob", "swept", "blazer", NAVY, RED, ("glasses",)),
    Design(
        "raimu_soda", "sugar_parade", LIME, _same(ORANGE), "double_bun", "between", "tee", LIME, ORANGE, ("star_clip",)
    ),
    Design("oto_kanade_(choir)", "choir", MINT, _same(ROSE), "wavy", "centre", "dress", SNOW, MINT, ("halo",)),
    Design(
        "ember_valentine", "choir", ROSE, _same(GOLD), "ponytail", "spiky", "coat", RED, BLACK, ("small_horns",), DARK
    ),
    Design("shizuku_amano", "tidal_letters", NAVY, _same(SKY), "long", "blunt", "sailor", NAVY, SKY, ("hairband",)),
    Design(
        "kohaku_riku",
        "leafside",
        SAND,
        _same(VIOLET),
        "short",
        "parted",
        "turtleneck",
        SAND,
        BROWN,
        ("glasses",),
        boy=True,
    ),
    Design("lotte_(clockwork)", "astrolabe", CHESTNUT, _same(TEAL), "drills", "centre", "maid", TEAL, GOLD, ("tiara",)),
    Design("nagi_hayase", "tidal_letters", BLACK, _same(TEAL), "ponytail", "parted", "tee", SKY, SNOW, ("cap",), TAN),
    Design(
        "sakura_no_mai",
        "nine_lanterns",
        ROSE,
        _same(GREEN),
        "hime",
        "between",
        "kimono",
        PINK,
        VIOLET,
        ("flower",),
        tips=PINK,
    ),
    Design(
        "gin_tachibana",
        "iron_garden",
        GREY,
        _same(RED),
        "wavy",
        "cover",
        "turtleneck",
        BLACK,
        RED,
        ("scarf_clip",),
        boy=True,
    ),
    Design(
        "polaris_(astrolabe)",
        "astrolabe",
        NAVY,
        _same(GOLD),
        "twin_tails",
        "centre",
        "cape",
        NAVY,
        GOLD,
        ("star_clip",),
        tips=LILAC,
    ),
    Design("mitsuba_kiri", "leafside", LIME, _same(PLUM), "braid", "messy", "overalls", BROWN, LIME, ("leaf",)),
    Design(
        "yuzu_pepper", "sugar_parade", ORANGE, _same(GREEN), "twin_tails", "spiky", "hoodie", ORANGE, BLACK, ("cap",)
    ),
    Design(
        "tsukishiro_ao",
        "nine_lanterns",
        SILVER,
        (BLUE, GOLD),
        "long",
        "swept",
        "kimono",
        NAVY,
        SILVER,
        ("fox_ears",),
        PALE,
    ),
    Design("dahlia_(choir)", "choir", WINE, _same(PINK), "double_bun", "blunt", "dress", WINE, GOLD, ("bow",), TAN),
    Design("kumo_watanuki", "leafside", LILAC, _same(BROWN), "bob", "parted", "turtleneck", SNOW, LILAC, ("earmuffs",)),
    Design("zeno_arkwright", "choir", BLOND, _same(RED), "spiky", "swept", "armour", NAVY, GOLD, ("crown",), boy=True),
    Design(
        "fuyune_(mirror)", "choir", TEAL, (RED, BLUE), "side_tail", "blunt", "coat", PLUM, TEAL, ("hairpin",), tips=NAVY
    ),
)

BY_NAME = {design.name: design for design in CAST}
