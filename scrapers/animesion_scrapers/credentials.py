"""Credentials of sites, from the environment, a keyring or a netrc file; never from a recipe.

They are looked up at the start of a crawl, sent only to their own site and never logged: `repr` omits the key.
"""

from __future__ import annotations

import contextlib
import netrc
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from animesion_scrapers.errors import ScraperError


@dataclass(frozen=True, slots=True)
class CredentialSpec:
    """The credentials that a site accepts.

    Attributes:
        host: Their host; also the machine in netrc and the service in the keyring.
        user: Environment variable with the user's name or id.
        key: Environment variable with the API key.
        required: Whether the site rejects requests without them.
        where: Where users find them, in one phrase.
        parameters: Names of the query parameters for user and key; None for HTTP Basic.
    """

    host: str
    user: str
    key: str
    required: bool = False
    where: str = ""
    parameters: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user and a key.

    Attributes:
        user: Name or id of the user.
        key: The API key; not in `repr`.
    """

    user: str
    key: str = field(repr=False)


def find(
    spec: CredentialSpec, environment: Mapping[str, str] | None = None, netrc_file: Path | None = None
) -> Credentials | None:
    """Look for a site's credentials: in the environment, then the keyring if one is installed, then netrc.

    Args:
        spec: The credentials to find.
        environment: Environment variables; by default those of the process.
        netrc_file: The netrc file; by default `$NETRC`, else `~/.netrc`.

    Returns:
        The first match, or None if there is none and the site does not require credentials.

    Raises:
        ScraperError: Only one of user and key is set, the netrc file cannot be parsed, or required ones are missing.
    """
    environment = os.environ if environment is None else environment
    user, key = environment.get(spec.user, ""), environment.get(spec.key, "")
    if bool(user) != bool(key):
        present, absent = (spec.user, spec.key) if user else (spec.key, spec.user)
        raise ScraperError(f"{present} is set and {absent} is not: {spec.host} needs both or neither.")
    if user:
        return Credentials(user, key)
    found = _keyring(spec.host) or _netrc(spec.host, netrc_file or Path(environment.get("NETRC", "~/.netrc")))
    if found is None and spec.required:
        where = f" ({spec.where})" if spec.where else ""
        raise ScraperError(
            f"{spec.host} requires an API key{where}: set {spec.user} and {spec.key}, "
            f"or add the machine {spec.host} to ~/.netrc."
        )
    return found


def _keyring(host: str) -> Credentials | None:
    try:
        keyring = import_module("keyring")
    except ImportError:
        return None
    # Back ends raise various errors when there is no session to unlock; they all mean no credentials.
    with contextlib.suppress(Exception):
        found = keyring.get_credential(host, None)
        if found and found.username and found.password:
            return Credentials(found.username, found.password)
    return None


def _netrc(host: str, path: Path) -> Credentials | None:
    try:
        entry = netrc.netrc(str(path.expanduser())).hosts.get(host)
    except FileNotFoundError:
        return None
    except (netrc.NetrcParseError, OSError, UnicodeDecodeError) as error:
        # The parser's own message may quote the line with the secret.
        at = f" at line {error.lineno}" if isinstance(error, netrc.NetrcParseError) else ""
        raise ScraperError(f"{path} cannot be read{at}: correct it, or set NETRC to another file.") from None
    return Credentials(entry[0], entry[2]) if entry and entry[0] and entry[2] else None
