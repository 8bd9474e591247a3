"""What every component of the gateway obeys, and the thread that it runs in.

Components have loops; only the gateway has threads.
"""

from __future__ import annotations

import logging
import mmap
import threading
from collections.abc import Callable
from typing import Protocol

from config import PREFIX
from pause_meter import PauseMeter
from sockets import SocketLost

MEMORY_RESERVE_BYTES = 16 * 1024 * 1024

logger = logging.getLogger("elrar.gateway")


class MemoryReserve:
    """Address space that is given back when there is no more memory, so that the gateway can still stop in order.

    It is never written to, and so takes no memory but the permission for it.
    """

    def __init__(self) -> None:
        self._held: mmap.mmap | None
        try:
            self._held = mmap.mmap(-1, MEMORY_RESERVE_BYTES)
        except OSError:  # then the gateway has not even that much
            self._held = None

    def release(self) -> None:
        """Give it back; from any thread, twice is harmless."""
        if self._held is not None:
            self._held.close()


class Component(Protocol):
    """A part of the gateway that has a loop. `run` has a thread; the rest may be called from any."""

    @property
    def last_progress_at(self) -> float:
        """When the loop was last got round to, monotonic; reading it needs no lock."""

    def run(self) -> None:
        """Do the work until `stop` is called; an exception ends the whole gateway."""

    def stop(self) -> None:
        """Make `run` finish what was begun, and return; twice is harmless."""

    def close(self) -> None:
        """Let go of everything; only after `run` has returned."""

    def close_descriptors(self) -> None:
        """Close the descriptors and do nothing else: in a forked child, or when the start has failed."""


class ComponentThread:
    """A component and its thread."""

    def __init__(
        self,
        name: str,
        component: Component,
        on_end: Callable[[str, bool], None],
        stuck_after_s: float,
        memory_reserve: MemoryReserve,
    ) -> None:
        self.name = name
        self.component = component
        self._on_end = on_end
        self._stuck_after_s = stuck_after_s
        self._memory_reserve = memory_reserve
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    def _run(self) -> None:
        failed = False
        try:
            self.component.run()
        except MemoryError:
            failed = True
            self._memory_reserve.release()
            logger.critical(
                "no more memory, so the gateway ends: raise the limit on it (`ulimit -v`, MemoryMax= of systemd, that"
                " of a container), or lower %sMAX_ENGINES and %sHISTORY thread=%s",
                PREFIX,
                PREFIX,
                self.name,
            )
        except SocketLost as error:
            failed = True
            logger.critical("%s thread=%s", error, self.name)
        except BaseException:
            failed = True
            logger.critical("thread died of an error that nobody expected thread=%s", self.name, exc_info=True)
        self._on_end(self.name, failed)

    def is_making_progress(self, clock: PauseMeter) -> bool:
        """Whether the thread is alive and has lately got round to its loop, pauses of the whole process aside."""
        return self.thread.is_alive() and clock.running_s_since(self.component.last_progress_at) < self._stuck_after_s

    def stop(self, timeout_s: float) -> bool:
        """Stop the component and wait for its thread; False if it has not ended in time."""
        self.component.stop()
        if self.thread.ident is not None and self.thread is not threading.current_thread():
            self.thread.join(timeout_s)
            return not self.thread.is_alive()
        return True
