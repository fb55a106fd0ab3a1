"""Legacy encodings of tables and of names in zips are recognised, or refused where two are about equally likely."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import animesion
from animesion import sources
from animesion.dataset import label_files
from animesion.errors import UsageError
from animesion.sources.urls import UrlsOptions, UrlsSource
from animesion_scrapers.url_tables import legacy

#: Language -> encodings in use, and names of people, characters, plants and animals.
NAMES: dict[str, tuple[list[str], str]] = {
    "Korean": (
        ["cp949"],
        "하츠네 미쿠|카가미네 린|카가미네 렌|메구리네 루카|카무이 가쿠포|박보검|김연아|이순신|세종대왕|"
        "아이유|사쿠라바 네네|호시노 아이|나루토|우즈마키 보루토|에렌 예거|미카사 아커만|아르민|레비|"
        "탄지로|네즈코|젠이츠|이노스케|고죠 사토루|이타도리 유지|후시구로 메구미|쿠기사키 노바라|장미|"
        "무궁화|벚꽃|진달래|개나리|소나무|은행나무|단풍나무|해바라기|튤립|국화|백합|연꽃|철쭉",
    ),
    "Chinese, traditional": (
        ["big5"],
        "初音未來|鏡音鈴|鏡音連|巡音流歌|漩渦鳴人|宇智波佐助|春野櫻|旗木卡卡西|孫悟空|魯夫|索隆|娜美|"
        "騙人布|香吉士|喬巴|羅賓|佛朗基|布魯克|吉翁|夏亞|阿姆羅|碇真嗣|綾波零|明日香|渚薰|炭治郎|禰豆子|"
        "我妻善逸|嘴平伊之助|五條悟|玫瑰|櫻花|杜鵑|百合|蘭花|菊花|梅花|荷花|牡丹|茶花",
    ),
    "Chinese, simplified": (
        ["gbk"],
        "初音未来|镜音铃|镜音连|巡音流歌|漩涡鸣人|宇智波佐助|春野樱|旗木卡卡西|孙悟空|路飞|索隆|娜美|"
        "乌索普|山治|乔巴|罗宾|弗兰奇|布鲁克|夏亚|阿姆罗|碇真嗣|绫波丽|明日香|渚薰|灶门炭治郎|祢豆子|"
        "我妻善逸|嘴平伊之助|五条悟|玫瑰|樱花|杜鹃|百合|兰花|菊花|梅花|荷花|牡丹|茶花|凤凰木",
    ),
    "Japanese": (
        ["cp932", "euc_jp"],
        "初音ミク|鏡音リン|鏡音レン|巡音ルカ|神威がくぽ|うずまきナルト|うちはサスケ|春野サクラ|"
        "はたけカカシ|孫悟空|モンキー・D・ルフィ|ロロノア・ゾロ|ナミ|ウソップ|サンジ|"
        "トニートニー・チョッパー|ニコ・ロビン|碇シンジ|綾波レイ|惣流・アスカ・ラングレー|渚カヲル|"
        "竈門炭治郎|竈門禰豆子|我妻善逸|嘴平伊之助|五条悟|虎杖悠仁|伏黒恵|釘崎野薔薇|薔薇|桜|百合|菊|梅|"
        "牡丹|椿|紅葉|銀杏|向日葵|蘭",
    ),
    "Russian": (
        ["cp1251", "koi8_r", "cp866"],
        "Иван Петров|Мария Иванова|Алексей Смирнов|Ольга Кузнецова|Роза чайная|Берёза повислая|"
        "Дуб черешчатый|Клён остролистный|Ель обыкновенная|Сосна|Ландыш|Ромашка|Василёк|Подсолнечник|"
        "Тюльпан|Пион|Сирень|Яблоня|Груша|Вишня|Слива|Малина|Смородина|Крыжовник|Хацунэ Мику|"
        "Кагаминэ Рин|Наруто Удзумаки|Саскэ Утиха|Сакура Харуно|Какаси Хатакэ|Эрен Йегер|Микаса Аккерман|"
        "Леви|Армин|Жук-олень|Щука|Ёрш|Окунь|Карась|Налим",
    ),
    "Ukrainian": (
        ["cp1251"],
        "Київ|Троянда|Соняшник|Їжак|Єнот|Ґава|Калина|Верба|Тополя|Мальва|Барвінок|Волошка|Ялина|Горобина|"
        "Ведмідь|Лисиця|Заєць|Вовк|Синиця|Горобець",
    ),
    "French": (
        ["cp1252", "mac_roman"],
        "Hélène|Geneviève|Chloé|Zoé|François|Benoît|Noël|Éléonore|Rosé de Provence|Érable à sucre|Chêne|"
        "Châtaignier|Frêne|Hêtre|Mélèze|Cèdre|Épicéa|Géranium|Pensée|Œillet|Bégonia|Cerisier|Pêcher|"
        "Mûrier|Noisetier à fruits|Astérix|Obélix|Idéfix|Panoramix|Agecanonix",
    ),
    "German": (
        ["cp1252"],
        "Müller|Schröder|Jäger|Weiß|Köhler|Krüger|Größe|Grünspecht|Bärlauch|Löwenzahn|Gänseblümchen|"
        "Märzenbecher|Schneeglöckchen|Ährengras|Übeltäter|Straußgras|Käfer|Kröte|Eichhörnchen|Füchse",
    ),
    "Spanish": (
        ["cp1252"],
        "José|María|Muñoz|Peña|Ibáñez|García|Rodríguez|Álvarez|Núñez|Martín|Sofía|Andrés|Ramón|Inés|"
        "Jesús|Niño|Árbol|Maíz|Jazmín|Plátano",
    ),
    "Portuguese": (
        ["cp1252"],
        "João|São Paulo|Conceição|Antônio|Gonçalves|Magalhães|Luís|Inês|Açaí|Maçã|Pêssego|Limão|Mamão|"
        "Coração|Pão|Avó|Órgão|Feijão|Girassol|Hortênsia",
    ),
    "Swedish": (
        ["cp1252"],
        "Åsa|Göran|Björn|Sjöberg|Lindström|Höök|Älg|Räv|Örn|Blåbär|Björk|Tjäder|Smörblomma|Blåsippa|Häst|"
        "Sparv|Kråka|Måne|Träd|Fågel",
    ),
    "Italian": (
        ["cp1252"],
        "Nicolò|Città di Castello|Perché|Libertà|Lucà|Cefalù|Giosuè|Caffè|Università|Più|Ragù|Tiramisù|"
        "Virtù|Bambù|Pietà",
    ),
    "Polish": (
        ["cp1250"],
        "Łukasz|Małgorzata|Paweł|Żaneta|Święty|Dąb|Brzoza|Świerk|Jabłoń|Grusza|Śliwa|Wiśnia|Jodła|Róża|"
        "Słonecznik|Chrząszcz|Żuk|Jeż|Łoś|Ryś|Źrebię|Ćma",
    ),
    "Czech": (
        ["cp1250"],
        "Dvořák|Černý|Novák|Svoboda|Růže|Bříza|Javor|Třešeň|Hruška|Švestka|Žižka|Jiří|Tomáš|Lukáš|"
        "Kateřina|Ondřej|Kůň|Pěnkava|Čáp|Žába|Ještěrka|Mravenec",
    ),
    "Hungarian": (
        ["cp1250"],
        "Gergő|László|Zoltán|Zsófia|Ágnes|Katalin|Bükk|Tölgy|Körte|Szőlő|Őszibarack|Barack|Meggy|Dió|"
        "Mogyoró|Fűzfa|Rózsa|Tulipán|Liliom|Szegfű|Ibolya|Gyöngyvirág",
    ),
    "Turkish": (
        ["cp1254"],
        "Işıl|Gülşen|Çağla|Öykü|Şebnem|Ayşe|İbrahim|Oğuz|Yağmur|Ümit|Gül|Karanfil|Papatya|Çınar|Meşe|"
        "Kestane|Söğüt|Kiraz|Vişne|Kayısı|Şeftali|Üzüm",
    ),
    "Greek": (
        ["cp1253"],
        "Ελένη|Γιώργος|Μαρία|Τριαντάφυλλο|Ελιά|Πεύκο|Δρυς|Λεμονιά|Πορτοκαλιά|Μηλιά|Γάτα|Σκύλος|Αλεπού|Λύκος",
    ),
    "Hebrew": (
        ["cp1255"],
        "ורד|נרקיס|חמנית|כלב|חתול|אריה|דוב|נמר|תפוח|אגס|ענבים|זית|רימון|תאנה",
    ),
    "Arabic": (
        ["cp1256"],
        "وردة|ياسمين|زنبق|نرجس|أسد|نمر|فهد|كلب|قطة|تفاح|عنب|موز|رمان|تين|زيتون|نخلة|محمد|فاطمة|عائشة|يوسف",
    ),
    "Thai": (
        ["cp874"],
        "กุหลาบ|มะลิ|กล้วยไม้|ดาวเรือง|บัว|ทานตะวัน|ชบา|ลีลาวดี|แมว|สุนัข|ช้าง|เสือ|นก|ปลา",
    ),
}
CASES = [(language, encoding) for language, (encodings, _) in NAMES.items() for encoding in encodings]


def table(names: list[str]) -> str:
    return "".join(f"{number},{name}\n" for number, name in enumerate(names))


@pytest.mark.parametrize(("language", "encoding"), CASES)
def test_a_list_of_names_is_recognised(language: str, encoding: str) -> None:
    content = table(NAMES[language][1].split("|")).encode(encoding)
    found = legacy.guess(content)
    assert found.rival == ""
    assert content.decode(found.encoding) == content.decode(encoding)


@given(case=st.sampled_from(CASES), data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_few_names_are_recognised_or_refused(case: tuple[str, str], data: st.DataObject) -> None:
    language, encoding = case
    names = data.draw(st.lists(st.sampled_from(NAMES[language][1].split("|")), min_size=1, max_size=8, unique=True))
    content = table(names).encode(encoding)
    found = legacy.guess(content)
    if found.encoding and not found.rival:
        assert content.decode(found.encoding) == content.decode(encoding)


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_bytes_get_an_answer_that_decodes(content: bytes) -> None:
    found = legacy.guess(content)
    if found.encoding:
        lines = b"\n".join(line for line in content.split(b"\n") if not line.isascii())
        assert lines.decode(found.encoding)


AMBIGUOUS = "루카".encode("cp949")  # two characters of Chinese, too


def folder(root: Path, content: bytes) -> Path:
    for number in range(2):
        (root / f"{number}.png").write_bytes(b"x")
    (root / "metadata.csv").write_bytes(b"file_name,label\n" + content)
    return root


def listed(path: Path, *overrides: str) -> tuple[list[tuple[str, ...]], list[str]]:
    source = sources.make(animesion.load_recipe("folder", [f"source.path={json.dumps(str(path))}", *overrides]))
    return [item.labels for item in source.items()], source.notes


def test_tables_beside_images(tmp_path: Path) -> None:
    names = NAMES["Korean"][1].split("|")[:10]
    rows = "".join(f"{number}.png,{name}\n" for number, name in enumerate(names)).encode("cp949")
    labels, notes = listed(folder(tmp_path, rows))
    assert labels == [(names[0],), (names[1],)]
    assert "metadata.csv is read as cp949, not UTF-8; source.encoding sets another" in notes[0]
    folder(tmp_path, b"0.png," + AMBIGUOUS + b"\n")
    with pytest.raises(UsageError, match=r"metadata\.csv, line 2: the text may be .* or .*: save the file as"):
        listed(tmp_path)
    labels, notes = listed(tmp_path, "source.encoding=cp949")
    assert labels == [("루카",), ()]
    assert "read as" not in notes[0]
    with pytest.raises(UsageError, match=r"line 2: the text is not ascii: correct source\.encoding"):
        listed(tmp_path, "source.encoding=ascii")
    with pytest.raises(UsageError, match="there is no encoding 'cp0'"):
        listed(tmp_path, "source.encoding=cp0")


def test_label_files(tmp_path: Path) -> None:
    names = NAMES["Russian"][1].split("|")[:10]
    (tmp_path / "train.csv").write_text("".join(f"{number},{number}.png\n" for number in range(10)))
    (tmp_path / "classid_classname.csv").write_bytes(table(names).encode("koi8_r"))
    settings = ["source.kind=labels", f"source.labels={json.dumps(str(tmp_path))}", f"source.images={tmp_path}"]
    source = sources.make(animesion.load_recipe("folder", settings))
    assert [item.labels[0] for item in source.items()] == names
    assert "classid_classname.csv is read as koi8_r, not UTF-8; source.encoding sets another encoding" in source.notes
    (tmp_path / "classid_classname.csv").write_bytes(b"0," + AMBIGUOUS + b"\n")
    with pytest.raises(UsageError, match=r"line 1: the text may be"):
        label_files.read_class_names(tmp_path / "classid_classname.csv")
    assert label_files.read_class_names(tmp_path / "classid_classname.csv", "cp949") == {0: "루카"}


def test_tables_of_urls(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"url,label\nhttps://a.example/1.jpg,x\nhttps://a.example/2.jpg," + AMBIGUOUS + b"\n")
    with pytest.raises(UsageError, match=r"t\.csv, line 3: the text may be .* or .*: .* or set source\.encoding"):
        list(UrlsSource(UrlsOptions(path=str(path), contact="a@example.org")).items())
    source = UrlsSource(UrlsOptions(path=str(path), contact="a@example.org", encoding="cp949"))
    assert [item.labels for item in source.items()] == [("x",), ("루카",)]


class Unflagged(zipfile.ZipInfo):
    """A member whose name is in a legacy encoding, as old programs write it."""

    encoding = "cp949"

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:  # noqa: N802 (of the standard library)
        return self.filename.encode(self.encoding), self.flag_bits & ~0x800


def test_names_in_a_zip(tmp_path: Path) -> None:
    names = NAMES["Korean"][1].split("|")[:8]
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        for name in names:
            archive.writestr(Unflagged(f"{name}/1.png"), b"x")
    labels, notes = listed(tmp_path / "many.zip")
    assert sorted(labels) == sorted((name,) for name in names)
    assert any("read as cp949" in note for note in notes)
    with zipfile.ZipFile(tmp_path / "few.zip", "w") as archive:
        archive.writestr(Unflagged("루카/1.png"), b"x")
        archive.writestr(Unflagged("린/2.png"), b"x")
    with pytest.raises(UsageError, match=r"source\.encoding: .* one may be .* as .* or .* as .*: set it"):
        listed(tmp_path / "few.zip")
    assert sorted(listed(tmp_path / "few.zip", "source.encoding=cp949")[0]) == [("루카",), ("린",)]
