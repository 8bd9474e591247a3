"""The query server of a router's process whose TCP port something else held at the start."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from typing import Any

from query_server import QueryServer, counters_document
from wake_up import WakeUp

RETRY_S = 1.0

logger = logging.getLogger("elrar.http")


class LateQueryServer:
    """Tries again and again to bind the port, and is the query server as soon as it has it. See QueryServer."""

    def __init__(
        self,
        bind: Callable[[], list[socket.socket]],
        make_server: Callable[[list[socket.socket]], QueryServer],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bind = bind
        self._make_server = make_server
        self._clock = clock
        self._wakeup = WakeUp()
        self._stopping = False
        self._server: QueryServer | None = None
        self._tried_at = clock()

    def run(self) -> None:
        """Bind, then serve, until `stop` is called."""
        while not self._stopping:
            self._tried_at = self._clock()
            if self._try_to_bind():
                break
            self._wakeup.wait(RETRY_S)
        if self._server is not None:
            if self._stopping:  # by one who did not see the server yet
                self._server.stop()
            self._server.run()

    def _try_to_bind(self) -> bool:
        try:
            listeners = self._bind()
        except OSError:
            return False
        try:
            self._server = self._make_server(listeners)
        except OSError:
            for listener in listeners:
                listener.close()
            return False
        logger.warning("the TCP port is free now, answering on port=%d", listeners[0].getsockname()[1])
        return True

    @property
    def last_progress_at(self) -> float:
        """When the thread last made progress, monotonic."""
        return self._tried_at if self._server is None else self._server.last_progress_at

    def counters(self) -> dict[str, Any]:
        """See QueryServer."""
        return counters_document() if self._server is None else self._server.counters()

    def refuse_new(self) -> None:
        """See QueryServer."""
        if self._server is not None:
            self._server.refuse_new()

    def stop(self) -> None:
        """Make `run` return; from any thread, twice is harmless."""
        self._stopping = True
        self._wakeup.set()
        if self._server is not None:
            self._server.stop()

    def close(self) -> None:
        """Close every socket; only after `run` has returned."""
        self._wakeup.close()
        if self._server is not None:
            self._server.close()

    def close_descriptors(self) -> None:
        """See QueryServer."""
        self._wakeup.close()
        if self._server is not None:
            self._server.close_descriptors()
