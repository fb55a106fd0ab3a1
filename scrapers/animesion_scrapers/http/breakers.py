"""Circuit breakers, one per host: requests to a failing host stop, then a single probe decides whether they resume.

Source of the pattern: M. Nygard, "Release It!", 2nd ed., 2018, section 5.3. Clients decide what counts as a failure of
the host; healthy hosts are paced in `limits`.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from animesion_scrapers.errors import HostDownError

_POLL = 0.25
"""Seconds between a caller's checks while another caller's probe is in flight."""


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
    """Circuit breakers by host, safe to share between threads and event loops."""

    def __init__(
        self, failures: int = 10, cooldown: float = 5.0, longest_cooldown: float = 120.0, probes: int = 5
    ) -> None:
        """Start with all circuits closed: requests are allowed.

        Args:
            failures: Consecutive failures that open a circuit.
            cooldown: Seconds that it stays open, doubled after each failed probe.
            longest_cooldown: Upper bound of the doubled cooldown.
            probes: Consecutive failed probes after which the host is given up, so that every run ends.

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
        """Seconds until the caller should check again; 0 when `host` may be requested now.

        After 0 the caller must call `report`: if the circuit was open, its request is the probe.

        Raises:
            HostDownError: The host has been given up.
        """
        with self._lock:
            circuit = self._circuits.setdefault(host, _Circuit())
            if not circuit.is_open:
                return 0.0
            if circuit.failed_probes >= self._probes:
                raise HostDownError("the host failed too often in a row and gets no more requests in this run")
            if circuit.probing:  # its end is unknown, so callers poll
                return _POLL
            left = circuit.closed_at - time.monotonic()
            if left > 0:
                return left
            circuit.probing = True
            return 0.0

    def report(self, host: str, healthy: bool) -> None:
        """Report the end of a request: `healthy` if the host answered properly, with any status of its own choice."""
        with self._lock:
            circuit = self._circuits.get(host)
            if circuit is None:
                circuit = self._circuits[host] = _Circuit()
            if healthy:
                if circuit.failures or circuit.is_open:  # close; only the count of openings stays
                    self._circuits[host] = _Circuit(opened=circuit.opened)
            elif circuit.probing:
                circuit.probing = False
                circuit.failed_probes += 1
                self._open(circuit, circuit.cooldown * 2)
            elif not circuit.is_open:  # requests that were in flight when it opened do not count again
                circuit.failures += 1
                if circuit.failures >= self._failures:
                    circuit.opened += 1
                    self._open(circuit, self._cooldown)

    def state(self, host: str) -> str:
        """`closed`, `open`, `half-open` (a probe is in flight or due) or `given up`."""
        with self._lock:
            circuit = self._circuits.get(host)
            if circuit is None or not circuit.is_open:
                return "closed"
            if circuit.failed_probes >= self._probes:
                return "given up"
            return "half-open" if circuit.probing or circuit.closed_at <= time.monotonic() else "open"

    def opened(self) -> dict[str, int]:
        """How often each host's circuit has opened, without those that never did."""
        with self._lock:
            return {host: circuit.opened for host, circuit in self._circuits.items() if circuit.opened}

    def _open(self, circuit: _Circuit, cooldown: float) -> None:
        circuit.is_open = True
        circuit.cooldown = min(cooldown, self._longest)
        circuit.closed_at = time.monotonic() + circuit.cooldown
