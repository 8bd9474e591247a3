"""The gateway's clock, which notices by itself that the whole process was paused.

Every loop of the gateway asks for the time several times a second. If nobody has asked for PAUSED_AFTER_S, no thread
was running: the process was stopped (SIGSTOP, a frozen container), its machine was, or it got no CPU. Who judges a
thread by its silence subtracts that, for no thread could have made progress then.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

PAUSED_AFTER_S = 2.0
MAX_PAUSES = 64  # remembered


class PauseMeter:
    """A monotonic clock in seconds, to be called from any thread; it remembers the last pauses of the process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asked_at = clock()  # without the lock: threads may set it back by the moment that they lag behind
        self._lock = threading.Lock()  # guards the two below
        self._resumed_at = float("-inf")
        self._pauses: deque[tuple[float, float]] = deque(maxlen=MAX_PAUSES)  # when each ended, and its length

    def __call__(self) -> float:
        """The time."""
        now = self._clock()
        if now - self._asked_at > PAUSED_AFTER_S:
            self._note_pause(now)
        self._asked_at = now
        return now

    def _note_pause(self, now: float) -> None:
        with self._lock:
            length = now - max(self._asked_at, self._resumed_at)  # another thread may have noted it just now
            if length > PAUSED_AFTER_S:
                self._pauses.append((now, length))
                self._resumed_at = now

    def running_s_since(self, then: float) -> float:
        """Seconds since `then` in which the process was running."""
        now = self()
        with self._lock:
            return now - then - sum(length for resumed_at, length in self._pauses if resumed_at > then)
