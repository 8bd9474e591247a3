"""Log lines that are written at most once a minute, however often there is something to say."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable

PERIOD_S = 60.0
MAX_EXAMPLES = 3


class LogThrottle:
    """One kind of line: what happens between two lines is counted, and said with the next.

    Not locked: each belongs to one thread, or is used under its owner's lock.
    """

    def __init__(
        self, logger: logging.Logger, level: int, what: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._logger = logger
        self._level = level
        self._what = what
        self._clock = clock
        self._quiet_until = float("-inf")
        self._count = 0
        self._examples: list[str] = []

    def record(self, example: str = "", *arguments: object, count: int = 1) -> None:
        """Count occurrences; `example` is kept if it is one of the first.

        It is put together only then, as by logging. Arguments of bytes are JSON texts, and are shown as what they say.
        """
        self._count += count
        if example and len(self._examples) < MAX_EXAMPLES:
            shown = tuple(json.loads(one) if isinstance(one, bytes) else one for one in arguments)
            self._examples.append(example % shown if shown else example)

    def take_due(self) -> str | None:
        """The line that is to be written now, or None if there is none or it is too early; then it counts anew.

        For an owner that must not log while it holds its lock; others call `flush`.
        """
        if not self._count or self._clock() < self._quiet_until:
            return None
        line = f"{self._what} count={self._count}"
        if self._examples:
            line += f", such as {'; '.join(self._examples)}"
        self._quiet_until = self._clock() + PERIOD_S
        self._count = 0
        self._examples = []
        return line

    def flush(self) -> bool:
        """Write the line that is due, if there is one; returns whether it was written."""
        line = self.take_due()
        if line is None:
            return False
        self._logger.log(self._level, "%s", line)
        return True
