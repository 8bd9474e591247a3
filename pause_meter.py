"""The gateway's clock, which notices by itself that the whole process was paused.

Every loop of the gateway asks for the time several times a second. If nobody has asked for PAUSED_AFTER_S, no thread
was running: the process was stopped (SIGSTOP, a frozen container), its machine was, or it got no CPU. Whoever asks
first afterwards notices it. Two things follow.

A thread is not stuck because it made no progress in a pause: who judges it subtracts the pauses (`running_s_since`).

Silence in a pause is the gateway's own, not the engines'. Their datagrams waited in the receive buffers, or were
dropped there. So nobody is called stale before what waited has been taken (`note_taken`) and SETTLE_S more have passed,
in which every engine has pushed again. Until then staleness is judged as of the beginning of the pause (`judged_at`).
Ages are never touched: they say how old a state is, whoever is to blame.
Of each engine many states waited, and each looks new when it is taken. So readers are told of none before the last has
been (`is_catching_up`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from log_throttle import LogThrottle

logger = logging.getLogger("elrar.pause")

PAUSED_AFTER_S = 1.0
SETTLE_S = 0.5
CATCH_UP_S = 1.0  # at most, in which what waited is not told to readers yet
MAX_PAUSES = 64  # remembered


class PauseMeter:
    """A monotonic clock in seconds, to be called from any thread; it remembers the last pauses of the process.

    Pauses are noticed between `start` and `stop`, while there are loops that ask for the time.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        on_pause: Callable[[float], object] = lambda length_s: None,
    ) -> None:
        """`on_pause` is told how many seconds each pause took, in the thread that noticed it."""
        self._on_pause = on_pause
        self._clock = clock
        self._is_started = False
        self._asked_at = clock()  # without the lock: threads may set it back by the moment that they lag behind
        self._lock = threading.Lock()  # guards all below; readers need none, because values are replaced as a whole
        self._resumed_at = float("-inf")
        self._pauses: deque[tuple[float, float]] = deque(maxlen=MAX_PAUSES)  # when each ended, and its length
        # After a pause: its beginning, its end, and when what had waited was taken, or None before that.
        self._settling: tuple[float, float, float | None] | None = None
        self._notice = LogThrottle(
            logger,
            logging.WARNING,
            "the gateway was held up: it was stopped, its machine was, or others had the CPU; no engine is called stale"
            " for that time;",
            clock=clock,
        )
        self.held_up_s = 0.0  # in all

    def __call__(self) -> float:
        """The time."""
        now = self._clock()
        if now - self._asked_at > PAUSED_AFTER_S and self._is_started:
            self._note_pause(now)
        self._asked_at = now
        return now

    def start(self) -> None:
        """The loops begin; what opening everything took was no pause."""
        self._asked_at = self._clock()
        self._is_started = True

    def stop(self) -> None:
        """The loops end, and nobody asks for the time several times a second any more."""
        self._is_started = False

    def _note_pause(self, now: float) -> None:
        with self._lock:
            length = now - max(self._asked_at, self._resumed_at)  # another thread may have noted it just now
            if length <= PAUSED_AFTER_S:
                return
            began_at = now - length
            self._pauses.append((now, length))
            self._resumed_at = now
            self._settling = (min(began_at, self.judged_at(began_at)), now, None)
            self.held_up_s += length
            self._notice.record("seconds=%.1f", length)
            line = self._notice.take_due()
        self._on_pause(length)
        if line is not None:
            logger.warning("%s", line)

    def running_s_since(self, then: float) -> float:
        """Seconds since `then` in which the process was running."""
        now = self()
        with self._lock:
            return now - then - sum(length for resumed_at, length in self._pauses if resumed_at > then)

    def note_taken(self, at: float) -> None:
        """The listener says that everything that had arrived by `at` has been taken."""
        if self._settling is None:
            return
        with self._lock:
            if self._settling is None:
                return
            began_at, resumed_at, caught_up_at = self._settling
            if caught_up_at is None:
                if at >= resumed_at:
                    self._settling = (began_at, resumed_at, self._clock())
            elif at >= caught_up_at + SETTLE_S:
                self._settling = None

    def is_catching_up(self, now: float) -> bool:
        """Whether what waited during a pause is still being taken."""
        settling = self._settling
        return settling is not None and settling[2] is None and now - settling[1] < CATCH_UP_S

    def judged_at(self, now: float) -> float:
        """The moment as of which staleness is judged: `now`, or the beginning of a pause that has not settled yet."""
        settling = self._settling
        if settling is None:
            return now
        began_at, _, caught_up_at = settling
        if caught_up_at is not None and now >= caught_up_at + SETTLE_S:
            return now
        return min(now, began_at)
