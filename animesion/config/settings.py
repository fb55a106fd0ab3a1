"""Read and check settings: built-in TOML or a file, `--set key=value`, and one sentence for a mistake.

The models that use this define what settings mean: `animesion.config.recipe` for datasets, `animesion_training.recipe`
for training runs.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from animesion.errors import UsageError

_KEY_PARTS = 64
_PART = r"""(?:[A-Za-z0-9_-]{1,1000}|"[^"\n]{0,1000}"|'[^'\n]{0,1000}')[ \t]{0,100}"""
_DEEP_KEY = re.compile(
    rf"(?:^[ \t]{{0,100}}\[{{0,2}}|[{{,])[ \t]{{0,100}}{_PART}(?:\.[ \t]{{0,100}}{_PART}){{{_KEY_PARTS}}}", re.MULTILINE
)

ModelT = TypeVar("ModelT", bound=BaseModel)


class Section(BaseModel):
    """The base of every section: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def params_digest(params: Any) -> str:
    """SHA-256 of JSON-ready parameters in canonical form, as hex."""
    return hashlib.sha256(json.dumps(params, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def builtin_names(package: str) -> list[str]:
    """Names of the recipes in the folder `recipes` of a package."""
    folder = resources.files(package) / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def builtin_text(package: str, name: str) -> str:
    """The TOML text of a built-in recipe.

    Raises:
        UsageError: unknown name; the message suggests the most similar one.
    """
    names = builtin_names(package)
    if name not in names:
        if Path(f"{name}.toml").is_file():
            raise UsageError(f"no recipe named '{name}'; did you mean the file './{name}.toml'?")
        suggestion = nearest(name, names) or f"; recipes are {', '.join(names)}"
        raise UsageError(f"no recipe named '{name}'{suggestion}; a path to a TOML file works too")
    return (resources.files(package) / "recipes" / f"{name}.toml").read_text(encoding="utf-8")


def read(package: str, name_or_path: str) -> tuple[dict[str, Any], str]:
    """Read a built-in recipe, or a file if the text ends in `.toml` or has a slash.

    Returns:
        The data, with `name` filled in from the file's name, and the recipe's name for messages.

    Raises:
        UsageError: the recipe does not exist, is unreadable, or is not TOML.
    """
    if name_or_path.endswith(".toml") or "/" in name_or_path:
        path = Path(name_or_path)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot read the recipe {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UsageError(f"the recipe {path} is not UTF-8 text") from None
        where = str(path)
    else:
        text, where = builtin_text(package, name_or_path), f"recipe {name_or_path}"
    data = parse_toml(text, where)
    data.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name_or_path).stem).strip("-._") or "unnamed")
    return data, where


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """Parse TOML of a file.

    Args:
        text: of the file.
        where: the file, for the message.

    Raises:
        UsageError: it is not TOML, or nested too deeply.
    """
    # `tomllib` takes quadratic time and memory for a key of many parts: 400 KB of them take more than 20 GB.
    if _DEEP_KEY.search(text):
        raise UsageError(f"{where} is not valid TOML: a key of more than {_KEY_PARTS} parts")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        raise UsageError(f"{where} is not valid TOML: {error}") from None


def check(model: type[ModelT], data: Mapping[str, Any], where: str) -> ModelT:
    """Validate plain data against a model.

    Raises:
        UsageError: one sentence for the first mistake.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UsageError(f"{where}: {explain(error, model)}") from None


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """One sentence for the first mistake in a validation error, with the nearest valid name for an unknown key."""
    # A misspelt key also leaves the right key missing; the misspelling is the mistake to report.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    location = [str(part) for part in first["loc"]]
    key = ".".join([prefix, *location] if prefix else location)
    if first["type"] == "extra_forbidden":
        fields = list(_fields_at(model, location[:-1]))
        suggestion = nearest(location[-1], fields, key.removesuffix(location[-1]))
        known = f"; keys are {', '.join(sorted(fields))}"
        return f"unknown key '{key}'{suggestion or known}"
    if first["type"] == "missing":
        return f"'{key}' is missing"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if not key:
        return message
    if first["type"] == "value_error":
        return f"{key}: {message}"
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        values = re.findall(r"'([^']+)'", first["ctx"]["expected"])
        near = nearest(first["input"], values)
        return f"{key}: there is no '{first['input']:.80}'{near}; values are {', '.join(values)}"
    return f"{key}: {message}, got {first['input']!r:.80}"


def _fields_at(model: type[BaseModel], location: list[str]) -> Iterable[str]:
    for part in location:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return ()
        model = annotation
    return model.model_fields


def nearest(name: str, names: Iterable[str], prefix: str = "") -> str:
    """`; did you mean '...'?` with the name that was probably meant, or an empty string."""
    close = similar(name, names, 1)
    return f"; did you mean '{prefix}{close[0]}'?" if close else ""


def similar(name: str, names: Iterable[str], count: int) -> list[str]:
    """The names that were probably meant, at most `count`: those that begin with it, shortest first, then similar ones.

    Args:
        name: as it was given.
        names: the valid names, preferred ones first.
        count: how many to return.
    """
    known = {each.lower(): each for each in reversed(list(names))}
    given = name.lower()
    begun = sorted((each for each in known if given and each.startswith(given)), key=len)
    close = difflib.get_close_matches(given, list(reversed(known)), n=count, cutoff=0.5)
    return [known[each] for each in dict.fromkeys([*begun, *close])][:count]


def apply(data: dict[str, Any], override: str) -> None:
    """Set one value by `key.path=value`; key and value are TOML, and a value that is not valid TOML is text.

    Raises:
        UsageError: the override does not have this form, or a section of its key is a value.
    """
    key, equals, text = override.partition("=")
    # A line break in the key would make several lines of TOML out of it.
    if not override.isprintable() and "\n" in key:
        raise UsageError(f"--set {override!r} does not have the form section.key=value")
    try:
        override.encode()
    except UnicodeEncodeError:
        raise UsageError(f"--set {override!r} is not UTF-8 text") from None
    try:
        change = tomllib.loads(f"{key} = 0") if equals else {}
    except tomllib.TOMLDecodeError:
        change = {}
    if len(change) != 1:
        raise UsageError(f"--set {override!r} does not have the form section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    # `change` is a chain of one-key dicts, one per part of the key; walk down the data along it.
    target = data
    while True:
        [(name, inner)] = change.items()
        if not isinstance(inner, dict):
            target[name] = value
            return
        target, change = target.setdefault(name, {}), inner
        if not isinstance(target, dict):
            raise UsageError(f"--set {override!r}: '{name}' is a value, not a section")
