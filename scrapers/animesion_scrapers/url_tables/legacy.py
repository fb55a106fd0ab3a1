"""The likeliest legacy encoding of a text, by how common its characters are in the languages of each encoding.

Each language is a model of independent characters. A text gets an encoding only if its best reading is made of common
characters and much likelier than any other reading. Standard library only.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

_CLEAR = math.log(5000)
"""Log-likelihood by which the best reading must be ahead of every other one."""

_COMMON = 0.85
"""Least share of common characters among those outside ASCII."""

_ENOUGH = 1 << 16
"""Bytes of lines with characters outside ASCII that are looked at."""

_PENALTY = 4.0
"""Log-likelihood that a capital after a small letter costs, and letters of two alphabets side by side."""

_MIXED = re.compile(r"(?<=[A-Za-z])(?=[^\W\d_A-Za-z])|(?<=[^\W\d_A-Za-z])(?=[A-Za-z])")

_ASCII = -math.log(60)
_RARE = -math.log(40_000)
_UNREADABLE = re.compile("[\x80-\x9f\ue000-\uf8ff\ufffd]")


@dataclass(frozen=True)
class Guess:
    """Encodings of a text.

    Attributes:
        encoding: The likeliest one; empty if none is likely.
        rival: Another one that is about as likely, in which case neither should be used; empty if there is none.
    """

    encoding: str
    rival: str = ""


@dataclass(frozen=True)
class _Language:
    """Log-probabilities of characters, of which those that are not listed are rare; whether ASCII letters join them."""

    encoding: str
    letters: Mapping[str, float]
    latin: bool = False


def guess(sample: bytes, among: Collection[str] = ()) -> Guess:
    """Guess the encoding of text that is neither ASCII, UTF-8 nor UTF-16.

    Args:
        sample: Whole lines; the first that are not ASCII are looked at.
        among: Names of the encodings that are possible; empty for all that are known.
    """
    sample = _first_lines(sample)
    readings: dict[str, str] = {}
    best: dict[str, float] = {}
    common: dict[str, float] = {}
    for language in _languages():
        encoding = language.encoding
        if among and encoding not in among:
            continue
        if encoding not in readings:
            readings[encoding] = _decoded(sample, encoding)
        if not readings[encoding]:
            continue
        likelihood, share = _rated(readings[encoding], language)
        if likelihood > best.get(encoding, -math.inf):
            best[encoding], common[encoding] = likelihood, share
    order = sorted(best, key=lambda encoding: -best[encoding])
    if not order or common[order[0]] < _COMMON:
        return Guess("")
    first = order[0]
    others = (other for other in order if readings[other] != readings[first])
    rival = next(others, "")
    return Guess(first, rival if rival and best[first] - best[rival] < _CLEAR else "")


def _first_lines(sample: bytes) -> bytes:
    chosen, size = [], 0
    for line in sample.split(b"\n"):
        if line.isascii():
            continue
        chosen.append(line)
        size += len(line)
        if size >= _ENOUGH:
            break
    return b"\n".join(chosen)


def _decoded(sample: bytes, encoding: str) -> str:
    """The text; empty if it cannot be decoded, or has control characters or characters of private use."""
    try:
        text = sample.decode(encoding)
    except UnicodeDecodeError:
        return ""
    return "" if _UNREADABLE.search(text) else text


def _rated(text: str, language: _Language) -> tuple[float, float]:
    """Log-likelihood of a text, and the share of common characters among those outside ASCII."""
    letters = language.letters
    counts = Counter(text)
    total = common = 0
    likelihood = 0.0
    for letter, count in counts.items():
        if letter.isascii():
            likelihood += count * _ASCII
            continue
        total += count
        common += count * (letter in letters)
        likelihood += count * letters.get(letter, _RARE)
    if not language.latin:
        likelihood -= _PENALTY * len(_MIXED.findall(text))
    likelihood -= _PENALTY * sum(a.islower() and b.isupper() for a, b in itertools.pairwise(text))
    return likelihood, common / max(total, 1)


def _letters(*groups: tuple[float, Iterable[str]]) -> dict[str, float]:
    """Log-probabilities from groups of equally likely characters; the first group of a character counts."""
    found: dict[str, float] = {}
    for share, group in groups:
        members = [letter for letter in dict.fromkeys(group) if letter and letter not in found]
        for letter in members:
            found[letter] = math.log(share / len(members))
    return found


def _by_frequency(text: str) -> dict[str, float]:
    """Log-probabilities from a text such as `é30è10`: letters with their frequencies, capitals a tenth of these."""
    parts = {letter: float(number) for letter, number in re.findall(r"([^\d.])([\d.]+)", text + _QUOTES)}
    for letter, number in list(parts.items()):
        if len(letter.upper()) == 1 and letter.upper() not in parts:
            parts[letter.upper()] = number / 10
    total = sum(parts.values())
    return {letter: math.log(number / total) for letter, number in parts.items()}


def _rows(codec: str, first: int, last: int, trails: Iterable[int] = range(0xA1, 0xFF)) -> list[str]:
    """The characters of a codec whose first byte is in [first, last]."""
    return [bytes([lead, trail]).decode(codec, "ignore") for lead in range(first, last + 1) for trail in trails]


# frequent characters of texts and names, and of plants, animals and colours
_SIMPLIFIED = (
    "的一是不了在人有我他这中大来上个国到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后小么心多天"
    "而能好都然没日于起还发成事只作当想看文无开手十用主行方又如前所本见经头面公同三已老从动两长知民样现分将外但身些"
    "与高意进把法此实回二理美点月明其种声全工己话儿者向情部正名定女问力机给等几很业最间新什打便位因重被走电四第门相"
    "次东政海口使教西再平真听世气信北少关并内加化由却代军产入先山五太水万市眼体别处总才场师书比住员九笑性通目华报立"
    "马命张活难神数件安表原车白应路期叫死常提感金何更反合放做系计或司利受光王果亲界京今务制解各任至清物台象记边共风"
    "战干接它许八特觉望直服毛林题建南度统色字请交爱让认算论百吃义科怎元社术结六功指思非流每青管夫连远资队跟带花快条"
    "院变联言权往展该领传近留红治决周保达办运武半候七必城父强步完革深区即求品士转量空甚众技轻程告江语英基派满式李息"
    "写呢识极令黄德收脸钱党倒未持取设始版双历越史商千片容研像找友孩站广改议形委早房音火际则首单据导影失拿网香似斯专"
    "石若兵弟谁校读志飞观争究包组造落视济喜离虽坏谈刘陈杨赵吴徐孙胡朱郭罗梁宋郑谢韩唐冯董萧曹袁邓傅沈曾彭吕苏卢蒋蔡"
    "贾丁魏薛叶阎余潘杜戴夏钟汪田姜范姚谭廖邹熊陆郝孔崔康邱秦顾侯邵孟龙段雷汤尹黎易乔贺赖龚初镜铃歌阿樱桃梅兰菊竹莲"
    "荷牡丹茶桂枫松柏杉银杏榆槐桑柳草树木瓜豆麦米鱼鸟虫虎豹狼狐兔猫狗羊牛猪鸡鸭鹅鹰燕鹤雪星云雨冰土川河湖春秋冬橙绿"
    "蓝紫黑灰粉玉珠宝剑刀枪弓魔骑勇娜丽"
)
_TRADITIONAL = (
    "的一是不了在人有我他這中大來上個國到說們為子和你地出道也時年得就那要下以生會自著去之過家學對可她裡後小麼心多天"
    "而能好都然沒日於起還發成事只作當想看文無開手十用主行方又如前所本見經頭面公同三已老從動兩長知民樣現分將外但身些"
    "與高意進把法此實回二理美點月明其種聲全工己話兒者向情部正名定女問力機給等幾很業最間新打便位因重被走電四第門相次"
    "東政海口使教西再平真聽世氣信北少關內加化由卻代軍產入先山五太水萬市眼體別處總才場師書比住員九笑性通目華報立馬命"
    "張活難神數件安表原車白應路期叫死常提感金何更反合放做系計或司利受光王果親界京今務制解各任至清物台象記邊共風戰接"
    "許八特覺望直服毛林題建南度統色字請交愛讓認算論百吃義科元社術結六功指思非流每青管夫連遠資隊跟帶花快條院變聯言權"
    "往展該領傳近留紅治決周保達辦運武半候七必城父強步完革深區即求品士轉量空眾技輕程告江語英基派滿式李息寫識極令黃德"
    "收臉錢黨未持取設始版雙歷史商千片容研像找友孩站廣改議形委早房音火際則首單據導影失拿網香似斯石若兵弟誰校讀志飛觀"
    "爭究包組造落視濟喜離雖壞談劉陳楊趙吳徐孫胡朱郭羅梁宋鄭謝韓唐馮董蕭曹袁鄧傅沈曾彭呂蘇盧蔣蔡賈丁魏薛葉潘杜戴夏鍾"
    "汪田姜范姚譚廖鄒熊陸郝孔崔康邱秦顧侯邵孟龍段雷湯尹黎易喬賀賴龔初鏡鈴歌櫻桃梅蘭菊竹蓮荷牡丹茶桂楓松柏杉銀杏榆槐"
    "桑柳草樹木瓜豆麥米魚鳥蟲虎豹狼狐兔貓狗羊牛豬雞鴨鵝鷹燕鶴雪星雲雨冰土川河湖春秋冬橙綠藍紫黑灰粉玉珠寶劍刀槍弓魔"
    "騎勇娜麗"
)
_KANJI = (
    "日一国人年大十二本中長出三時行見月分後前生五間上東四今金九入学高円子外八六下来気小七山話女北午百書先名川千水半"
    "男西電校語土木聞食車何南万毎白天母火右読友左休父雨会同事自社発者地業方新場員立開手力問代明動京目通言理体田主題"
    "意不作用度強公持野以思家世多正安院心界教文元重近考画海売知道集別物使品計死特私始朝運終台広住真有口少町料工建空"
    "急止送切転研足究楽起着店病質待試族銀早映親験英医仕去味写字答夜音注帰古歌買悪図週室歩風紙黒花春赤青館屋色走秋夏"
    "習駅洋旅服夕借曜飲肉貸堂鳥飯勉冬昼茶弟牛魚兄犬妹姉漢佐藤鈴橋渡辺伊村加吉々松井林清斎崎坂森池石岡福太竹原島谷内"
    "宮寺美咲菜陽翔蓮葵凛結愛桜優奈莉香織恵由紀絵里沙亜麻彩華姫星夢希望光輝龍虎鬼炎氷雷影闇魔神王剣刀霊狐猫狼兎鶴亀"
    "鷹鯨桃梅菊椿蘭合杉楓柳葉草樹河湖城市郎助之介吾悟司誠健翼隼剛猛哲"
)
_KOREAN = (
    "이가다는하을에의지고기사리어자나도아서로시인한대해스라수정그일들미전부제주오공보유장동상구무여원적세성안국과소"
    "위비만은조신관실물선화생회진경내면모학우마당계방연설문개간차현영등추통금식민트니드르레루토타카츠네쿠린렌메야노"
    "코치후키히호와요즈바버파페포피프터테크클글김박최강윤임송홍권황류배백남심곽허양손엄채천변함표명왕옥육맹탁편용예"
    "봉꽃풀숲달별눈람산새말닭돼끼랑곰늑벚합난초철쭉래행풍밤귤숭딸참외"
)

_QUOTES = "’4‘2“2”2–2—2…1«1»1°1·1×1"

_RUSSIAN = "о110е84а80и74н67т63с55р47в45л44к35м32д30п28у26я20ы19ь17г17з16б16ч14й12х10ж9ш7ю6ц5щ4э3ф3ъ0.4ё4і1ї0.5є0.5ґ0.1"
_GREEK = "α100ο90ι80ε75τ80σ50ν65η45υ40ρ45π40κ40μ33λ28ς40δ17γ17ω20χ12θ12φ10β8ξ5ζ4ψ2ά20έ20ή15ί30ό30ύ15ώ12"
_HEBREW = "י110ו105ה90ל75א63ר56ת50ב47ש45מ45נ29ם27ד25ק21ע31ח25פ17כ17ט13ג12ז13ס15ן11צ10ך8ף3ץ2"
_THAI = "".join(f"{chr(code)}1" for code in (*range(0x0E01, 0x0E3B), *range(0x0E40, 0x0E4F)))
_ARABIC = "ا120ل95ي65م60و55ن50ر48ت45ب40ة35ع33د32س30ف25ه25ك22ق20أ18ح18ج13ش13ص11ط10خ9ى8ض7ز7ث6إ6ذ5غ5ء4ظ2ئ3ؤ2آ3"

_WESTERN = (
    "é60è12ê5à6ç6ô4î3ï2ë3â3û2ù1œ1ü2ö1",  # French
    "ä25ö25ü35ß15é4",  # German
    "á20é18í22ó22ñ15ú10ü1",  # Spanish
    "ã25á14é10í8ó10ç20õ7ê6â4ú4à2ô2",  # Portuguese
    "å25ä20ö20ø20æ12é3ü2",  # Danish, Norwegian, Swedish, Finnish
    "à20è25é15ì12ò15ù12",  # Italian
    "á20ð15é8í15ó10ö10ú8þ5ý4æ8",  # Icelandic
)
_CENTRAL = (
    "ł25ą14ę14ó15ś11ż12ć6ń6ź3",  # Polish
    "á18í18é12ě10č10ř9š9ž9ý8ů5ú4ň2ť1ď1ľ1ô1ä1",  # Czech, Slovak
    "á32é30ö11ó10ő9í6ü6ú4ű3",  # Hungarian
    "š30č30ž20ć15đ8",  # Croatian, Slovene
    "ă30î15â10ş20ţ20",  # Romanian
)
_LATIN = {
    ("cp1252", "mac_roman", "cp850", "cp437"): _WESTERN,
    ("cp1250", "cp852"): _CENTRAL,
    ("cp1254",): ("ı30ü17ş16ç11ğ10ö9İ5â1",),
}


@functools.cache
def _languages() -> tuple[_Language, ...]:
    hiragana = [chr(code) for code in range(0x3041, 0x3094)]
    katakana = [*map(chr, range(0x30A1, 0x30F5)), "ー"]
    marks = list("　、。・「」『』（）！？～〜★☆♪々×＆")
    full_width = [chr(code) for code in range(0xFF01, 0xFF5F)]
    small = ("ァ", "ィ", "ゥ", "ェ", "ォ", "ッ", "ャ", "ュ", "ョ")
    kana = [letter for letter in (*hiragana, *katakana) if letter not in small]

    def of_japan(kana_share: float, kanji_share: float) -> dict[str, float]:
        return _letters(
            (0.03, marks),
            (kana_share, kana),
            (kana_share / 14, small),
            (kanji_share / 2, _KANJI),
            (kanji_share / 2, _rows("euc_jp", 0xB0, 0xCF)),
            (0.01, _rows("euc_jp", 0xD0, 0xF4)),
            (0.005, full_width),
            (0.005, map(chr, range(0xFF61, 0xFFA0))),
        )

    japanese, kanji = of_japan(0.55, 0.36), of_japan(0.14, 0.8)
    simplified = _letters(
        (0.02, marks),
        (0.5, _SIMPLIFIED),
        (0.44, _rows("gb2312", 0xB0, 0xD7)),
        (0.03, _rows("gb2312", 0xD8, 0xF7)),
        (0.005, full_width),
    )
    traditional = _letters(
        (0.02, marks),
        (0.5, _TRADITIONAL),
        (0.45, _rows("big5", 0xA4, 0xC6, [*range(0x40, 0x7F), *range(0xA1, 0xFF)])),
        (0.02, _rows("big5", 0xC9, 0xF9, [*range(0x40, 0x7F), *range(0xA1, 0xFF)])),
        (0.005, full_width),
    )
    korean = _letters(
        (0.02, marks),
        (0.6, _KOREAN),
        (0.37, _rows("euc_kr", 0xB0, 0xC8)),
        (0.005, full_width),
    )
    return (
        *(_Language(encoding, each) for encoding in ("cp932", "euc_jp") for each in (japanese, kanji)),
        _Language("gb18030", simplified),
        _Language("cp950", traditional),
        _Language("cp949", korean),
        *(_Language(encoding, _by_frequency(_RUSSIAN)) for encoding in ("cp1251", "koi8_r", "cp866")),
        _Language("cp1253", _by_frequency(_GREEK)),
        _Language("cp1255", _by_frequency(_HEBREW)),
        _Language("cp1256", _by_frequency(_ARABIC)),
        _Language("cp874", _by_frequency(_THAI)),
        *(
            _Language(encoding, _by_frequency(text), latin=True)
            for encodings, texts in _LATIN.items()
            for encoding in encodings
            for text in texts
        ),
    )
