"""Circuit breakers, one a host: a host that fails again and again is left alone, then tried with a single request.

Source of the pattern: M. Nygard, "Release It!", 2nd ed., 2018, section 5.3. What counts as a failure of the host is the
clients' business; how often a healthy host is asked is that of `limits`.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from animesion_scrapers.errors import HostDownError

_POLL = 0.25
"""Seconds after which a caller asks again while another one's probe is under way."""


@dataclass(slots=True)
class _Circuit:
    failures: int = 0
    opened: int = 0
    failed_probes: int = 0
    cooldown: float = 0.0
    closed_at: float = 0.0
    is_open: bool = False
    probing: bool = False


class Breakers:
    """Says when a host may be asked; safe to share between threads and event loops."""

    def __init__(
        self, failures: int = 10, cooldown: float = 5.0, longest_cooldown: float = 120.0, probes: int = 5
    ) -> None:
        """Start with every circuit closed, that is, every host asked freely.

        Args:
            failures: Failures in a row that open a circuit.
            cooldown: Seconds that it then stays open, doubled after each probe that fails.
            longest_cooldown: Bound on that.
            probes: Failed probes in a row after which the host is given up permanently, so that every run ends.

        Raises:
            ValueError: A number is not above zero.
        """
        if min(failures, probes) < 1 or not min(cooldown, longest_cooldown) > 0:
            raise ValueError("Failures, probes and cooldowns of a circuit breaker must be above zero.")
        self._failures = failures
        self._cooldown = cooldown
        self._longest = longest_cooldown
        self._probes = probes
        self._circuits: dict[str, _Circuit] = {}
        self._lock = threading.Lock()

    def delay(self, host: str) -> float:
        """Seconds to wait before asking again whether `host` may be asked; 0 when it may.

        Whoever gets 0 must end with `report`: when the circuit was open, that request is the probe.

        Raises:
            HostDownError: The host has been given up.
        """
        with self._lock:
            circuit = self._circuits.setdefault(host, _Circuit())
            if not circuit.is_open:
                return 0.0
            if circuit.failed_probes >= self._probes:
                raise HostDownError("the host failed too often in a row and is not asked again in this run")
            if circuit.probing:
                return _POLL
            left = circuit.closed_at - time.monotonic()
            if left > 0:
                return left
            circuit.probing = True
            return 0.0

    def report(self, host: str, well: bool) -> None:
        """Say how a request ended: `well` when the host did its part, whatever it answered."""
        with self._lock:
            circuit = self._circuits.get(host)
            if circuit is None:
                circuit = self._circuits[host] = _Circuit()
            if well:
                if circuit.failures or circuit.is_open:
                    self._circuits[host] = _Circuit(opened=circuit.opened)
            elif circuit.probing:
                circuit.probing = False
                circuit.failed_probes += 1
                self._open(circuit, circuit.cooldown * 2)
            elif not circuit.is_open:
                circuit.failures += 1
                if circuit.failures >= self._failures:
                    circuit.opened += 1
                    self._open(circuit, self._cooldown)

    def state(self, host: str) -> str:
        """`closed`, `open`, `half-open` (a probe is under way or due) or `given up`."""
        with self._lock:
            circuit = self._circuits.get(host)
            if circuit is None or not circuit.is_open:
                return "closed"
            if circuit.failed_probes >= self._probes:
                return "given up"
            return "half-open" if circuit.probing or circuit.closed_at <= time.monotonic() else "open"

    def opened(self) -> dict[str, int]:
        """How often each host's circuit has opened; hosts where it never did are left out."""
        with self._lock:
            return {host: circuit.opened for host, circuit in self._circuits.items() if circuit.opened}

    def _open(self, circuit: _Circuit, cooldown: float) -> None:
        circuit.is_open = True
        circuit.cooldown = min(cooldown, self._longest)
        circuit.closed_at = time.monotonic() + circuit.cooldown
