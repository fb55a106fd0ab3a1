"""The compiled pass over pixels: equal to the portable code to the bit, hard on bad arguments, and not needed."""

from __future__ import annotations

import importlib.util
import shutil
import struct
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from animesion.config.recipe import load
from animesion.images import codec, features, hashing, lanczos
from animesion.pipeline import inspect

ROOT = Path(__file__).parents[2]

needs_compiled = pytest.mark.skipif(hashing.compiled is None, reason="animesion/_pixels.c was not compiled here")


def drawn(kind: str, width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)

    def page() -> np.ndarray:
        pixels = np.full((height, width, 3), 255, dtype=np.uint8)
        for _ in range(6):
            top, left = int(rng.integers(0, height)), int(rng.integers(0, width))
            pixels[top : top + height // 4, left : left + width // 4] = rng.integers(0, 256, 3)
        return pixels

    def soft() -> np.ndarray:
        coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).copy()
        pixels[: height // 8] = 7
        return pixels

    kinds: dict[str, Callable[[], np.ndarray]] = {
        "noise": lambda: rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        "black and white": lambda: rng.integers(0, 2, (height, width, 3), dtype=np.uint8) * np.uint8(255),
        "soft with a bar": soft,
        "page": page,
        "plain": lambda: np.full((height, width, 3), seed, dtype=np.uint8),
    }
    return Image.fromarray(kinds[kind]())


def compiled_look(image: Image.Image) -> features.ImageFeatures | None:
    assert hashing.compiled is not None
    return features._compiled_look(hashing.compiled, image)


@needs_compiled
@given(
    width=st.integers(33, 700),
    height=st.integers(33, 700),
    kind=st.sampled_from(["noise", "black and white", "soft with a bar", "page", "plain"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
@example(width=1559, height=1096, kind="black and white", seed=0)  # the reduced copy ends within a block
@example(width=1024, height=1023, kind="noise", seed=1)
@example(width=1023, height=1024, kind="noise", seed=1)
@example(width=1030, height=300, kind="noise", seed=2)  # a strip, whose thumbnail is of the whole
@example(width=2300, height=2100, kind="soft with a bar", seed=3)  # Pillow keeps it in several pieces
@example(width=8192, height=40, kind="noise", seed=4)
@example(width=40, height=48, kind="black and white", seed=5)
def test_the_compiled_pass_gives_what_the_portable_code_gives(width: int, height: int, kind: str, seed: int) -> None:
    image = drawn(kind, width, height, seed)
    found = compiled_look(image)
    assert (found is None) == (not lanczos.columns_first(image.size, lanczos.SIDE))
    if found is not None:
        assert found == features._portable(image)


@needs_compiled
@pytest.mark.parametrize("size", [(1, 1), (32, 32), (33, 32), (100, 169), (8193, 50)])
def test_what_the_compiled_pass_leaves_to_the_portable_code(size: tuple[int, int]) -> None:
    image = drawn("noise", *size)
    assert compiled_look(image) is None
    assert features.compute_features(image) == features._portable(image)


@pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))) or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="there is no C compiler, or it lacks Python's headers",
)
def test_it_is_used_where_it_can_be_compiled() -> None:
    assert features.lacking() == ""
    assert features._compiled() is hashing.compiled


@needs_compiled
def test_another_pillow_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Image.Image.reduce

    def rounding_down(image: Image.Image, factor: int) -> Image.Image:
        return real(image, factor).point(lambda level: max(0, level - 1))

    monkeypatch.setattr(Image.Image, "reduce", rounding_down)
    features._compiled.cache_clear()
    try:
        image = drawn("noise", 1300, 1100)
        assert features.compute_features(image) == features._portable(image)
        assert "resamples differently" in features.lacking()
    finally:
        monkeypatch.undo()
        features._compiled.cache_clear()
    assert features.lacking() == ""


def without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "compiled", None)
    monkeypatch.setattr(features, "_compiled", lambda: None)


@needs_compiled
@pytest.mark.parametrize("size", [(640, 360), (1920, 1080), (2100, 2100)])
def test_features_are_the_same_without_a_compiler(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load("folder", ["source.path=x", "quality.trim=true"])
    image = codec.decode(codec.encode(drawn("soft with a bar", *size), "jpg", 90), codec.Limits())
    [here] = inspect.features(image, None, recipe)
    assert here["crop"] is not None
    without(monkeypatch)
    assert inspect.features(image, None, recipe) == [here]
    assert "not compiled" in features.lacking()


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (7, 5), (300, 221), (2100, 2100)])
@pytest.mark.parametrize("portable", [False, True])
def test_the_pixel_digest_is_of_rgb_bytes_and_size(
    size: tuple[int, int], portable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if portable:
        without(monkeypatch)
    image = drawn("noise", *size)
    assert hashing.of_pixels(image) == blake3(image.tobytes() + struct.pack("<II", *size)).digest()


@needs_compiled
@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 7, 8, 9, 2000])
def test_the_fourth_byte_of_a_pixel_is_not_looked_at(count: int) -> None:
    assert hashing.compiled is not None
    words = np.random.default_rng(7).integers(0, 256, (count, 4), dtype=np.uint8)
    assert hashing.compiled.rgb(words.tobytes()) == words[:, :3].tobytes()


@needs_compiled
def test_nor_by_the_pass() -> None:
    assert hashing.compiled is not None
    image, plan = drawn("noise", 200, 150), features._plan((200, 150))
    assert plan is not None
    words = np.random.default_rng(7).integers(0, 256, (150, 200, 4), dtype=np.uint8)
    words[..., :3] = np.asarray(image)
    found = hashing.compiled.look(words.tobytes(), 4, *plan)
    assert found == hashing.compiled.look(image.tobytes(), 3, *plan)
    assert found[:2] == hashing.phashes(image)


@needs_compiled
@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        ("width", 201, "size"),
        ("height", -1, "size"),
        ("width", 2**31 - 1, "size"),
        ("factor", 0, "size"),
        ("factor", 10**6, "size"),
        ("fine", -4, "size"),
        ("across", b"", "weights"),
        ("across", b"\xff" * 4, "weights"),
        ("down", struct.pack("<i", 5) + bytes(400), "weights"),
        ("wide", bytes(3), "weights"),
        ("tall", struct.pack("<3i", 149, 8, 1) * 16, "weights"),
        ("wide", struct.pack("<3i", 0, 200, 2**31 - 1) * 16, "weights"),
        ("wide", struct.pack("<3i", -1, 2, 9) * 16, "weights"),
    ],
)
def test_bad_arguments_are_refused(at: str, value: Any, message: str) -> None:
    assert hashing.compiled is not None
    plan = features._plan((200, 150))
    assert plan is not None
    pixels = bytes(200 * 150 * 4)
    assert len(hashing.compiled.look(pixels, 4, *plan)) == 10
    with pytest.raises(ValueError, match=message):
        hashing.compiled.look(pixels, 4, *plan._replace(**{at: value}))


@needs_compiled
def test_weights_of_overlapping_or_missing_pixels_are_refused() -> None:
    assert hashing.compiled is not None
    plan = features._plan((200, 150))
    assert plan is not None
    for change in ((1, 25), (1, -1), (2, 1), (3, 0), (3, 10**6)):  # the first run's result, first pixel, end
        numbers = np.frombuffer(plan.across, dtype=np.int32).copy()
        numbers[change[0]] = change[1]
        with pytest.raises(ValueError, match="weights"):
            hashing.compiled.look(bytes(200 * 150 * 4), 4, *plan._replace(across=numbers.tobytes()))
    with pytest.raises(ValueError, match="size"):
        hashing.compiled.look(bytes(200 * 150 * 3), 4, *plan)
    with pytest.raises(ValueError, match="four bytes"):
        hashing.compiled.rgb(bytes(7))


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("hatchling")
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "hatch_build", module)
    spec.loader.exec_module(module)
    return module


def test_an_installation_goes_on_without_a_compiler(
    hook: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = [hook.module_of(tmp_path / source) for source in hook.SOURCES]
    for module in modules:
        module.parent.mkdir(parents=True)
        module.write_bytes(b"of an earlier source")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    warned: list[str] = []
    app = SimpleNamespace(display_warning=warned.append)
    building = hook.CompiledPass(str(tmp_path), {}, None, None, "", "wheel", app)
    data: dict[str, object] = {"artifacts": [], "pure_python": True}
    building.initialize("editable", data)
    assert len(warned) == len(modules)
    assert all("no C compiler was found" in warning for warning in warned)
    assert data == {"artifacts": [], "pure_python": True}
    assert not any(module.exists() for module in modules)


@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no C compiler")
def test_what_the_compiler_says_is_told(hook: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    source, module = tmp_path / "_pixels.c", tmp_path / "_pixels.abi3.so"
    source.write_text("#error nothing goes here\n")
    assert "nothing goes here" in hook.compile_module(source, module)
    assert not list(tmp_path.glob("*.so*"))
    assert not list(tmp_path.glob("*.new"))
