"""How the counters and the fleet were over the last two hours: a sample every 10 s, for /samples.

They are kept in memory only, for as long as the process lives, compressed and with a bound on each, so that all of them
take less than 550 KiB whatever engines are called. The counters' names are in all of them: they are compressed by the
first sample, so that each costs its numbers only.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable
from typing import Any

SAMPLE_INTERVAL_S = 10.0
MAX_SAMPLES = 720
MAX_SAMPLE_BYTES = 600  # of a compressed sample; a usual one takes 200
MAX_NAMES = 4  # of modes and phases each in a sample that is larger; the most frequent
_NO_COUNTERS = (
    "version", "instance", "network_mode", "bind_address", "udp_port", "http_port", "stale_threshold_ms",
    "receive_buffer_bytes", "rejected_samples", "last_received",
)  # fmt: skip


class FleetSamples:
    """The last samples. One thread takes them, any may read them."""

    def __init__(
        self,
        get_stats: Callable[[], dict[str, Any]],
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._get_stats = get_stats
        self._clock = clock
        self._wall_clock = wall_clock
        self._due_at = float("-inf")
        self._lock = threading.Lock()  # guards the samples
        self._samples: deque[tuple[int, bytes]] = deque(maxlen=MAX_SAMPLES)  # time_ms, and the compressed JSON text
        self._like = b""  # the first sample's text without names that strangers chose; set before there is a sample

    def take_due(self) -> bool:
        """Take a sample if it is time for one; returns whether it was taken. Ask often."""
        now = self._clock()
        if now < self._due_at:
            return False
        self._due_at += SAMPLE_INTERVAL_S
        if self._due_at <= now:  # no sample is made up for a time in which the gateway stood still
            self._due_at = now + SAMPLE_INTERVAL_S
        time_ms = int(self._wall_clock() * 1000)
        sample = _sample(time_ms, self._get_stats())
        if not self._like:
            self._like = _json_text(sample, 0)
        text = self._compressed(sample)
        with self._lock:
            self._samples.append((time_ms, text))
        return True

    def json_text(self, since_ms: int = 0) -> bytes:
        """The samples from a time on, the oldest first, as a JSON array."""
        with self._lock:
            kept = [sample for time_ms, sample in self._samples if time_ms >= since_ms]
        return b"[%b]" % b",\n".join([zlib.decompressobj(zdict=self._like).decompress(sample) for sample in kept])

    def _compressed(self, sample: dict[str, Any]) -> bytes:
        for most_names in (sys.maxsize, MAX_NAMES, 0):
            compressing = zlib.compressobj(zdict=self._like)
            text = compressing.compress(_json_text(sample, most_names)) + compressing.flush()
            if len(text) <= MAX_SAMPLE_BYTES:
                break
        return text


def _sample(time_ms: int, stats: dict[str, Any]) -> dict[str, Any]:
    counters = {name: value for name, value in stats.items() if name not in _NO_COUNTERS}
    for section, names in counters.items():
        if isinstance(names, dict) and section != "fleet":
            counters[section] = {name: value for name, value in names.items() if not isinstance(value, str)}
    return {"time_ms": time_ms, **counters}


def _json_text(sample: dict[str, Any], most_names: int) -> bytes:
    """With so many modes and phases each, which strangers chose: the most frequent."""
    if "fleet" in sample:
        fleet = dict(sample["fleet"])
        for names in ("scheduling_modes", "phases"):
            counted = fleet.get(names, {})
            if len(counted) > most_names:
                fleet[names] = dict(sorted(counted.items(), key=lambda item: -item[1])[:most_names])
        sample = {**sample, "fleet": fleet}
    return json.dumps(sample, ensure_ascii=False).encode()
