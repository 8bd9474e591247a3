"""What every component of the gateway obeys, and the thread that it runs in.

Components have loops; only the gateway has threads.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable
from typing import Protocol

from config import PREFIX
from pause_meter import PauseMeter
from sockets import SocketLost

MEMORY_RESERVE_PIECE_BYTES = 4 * 1024 * 1024
MEMORY_RESERVE_PIECES = 6  # one for each thread, and one for the end

STOP_S = 4.6  # that all threads have for their end together, of the 5 s that a supervisor is promised

logger = logging.getLogger("elrar.gateway")


class MemoryReserve:
    """Address space that is given back when there is no more memory, so that the gateway can still stop in order.

    It is never written to, and so takes no memory but the permission for it. It is given back in pieces: while one
    thread ends for want of memory, another may take what was given back.
    """

    def __init__(self) -> None:
        self._held: list[mmap.mmap] = []
        with contextlib.suppress(OSError):  # if the gateway has not even that much
            for _ in range(MEMORY_RESERVE_PIECES):
                self._held.append(mmap.mmap(-1, MEMORY_RESERVE_PIECE_BYTES))

    def release(self) -> None:
        """Give one piece back, if there is one left; from any thread."""
        with contextlib.suppress(IndexError):
            self._held.pop().close()


memory_reserve = MemoryReserve()  # one for the process: that is who has too little


class Component(Protocol):
    """A part of the gateway that has a loop. `run` has a thread; the rest may be called from any."""

    @property
    def last_progress_at(self) -> float:
        """When the loop last began a turn, monotonic s; reading it needs no lock."""

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
        *,
        stuck_after_s: float,
        stop_timeout_s: float | None,
    ) -> None:
        """`on_end` is called in the thread with the name, and whether it failed.

        `stop_timeout_s`: how long its end is waited for; None: for as long as the others leave.
        """
        self.name = name
        self.component = component
        self.stop_timeout_s = stop_timeout_s
        self._on_end = on_end
        self._stuck_after_s = stuck_after_s
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    def _run(self) -> None:
        failed = True
        try:
            self.component.run()
            failed = False
        except SocketLost as error:
            logger.critical("%s thread=%s", error, self.name)
        except BaseException as error:
            if not _is_for_want_of_memory(error):
                logger.critical("thread died of an error that nobody expected thread=%s", self.name, exc_info=True)
            else:
                memory_reserve.release()
                with contextlib.suppress(MemoryError):
                    self._log_no_memory()
        try:
            self._on_end(self.name, failed)
        except MemoryError:  # a gateway whose thread has died must not stay
            memory_reserve.release()
            self._on_end(self.name, failed)

    def _log_no_memory(self) -> None:
        logger.critical(
            "no more memory, so the gateway ends: raise the limit on it (`ulimit -v`, MemoryMax= of systemd, that of a"
            " container), or lower %sMAX_ENGINES and %sHISTORY thread=%s",
            PREFIX,
            PREFIX,
            self.name,
        )

    def is_making_progress(self, clock: PauseMeter) -> bool:
        """Whether the thread is alive and its loop has turned lately; pauses of the whole process do not count."""
        return self.thread.is_alive() and clock.running_s_since(self.component.last_progress_at) < self._stuck_after_s

    def stop(self, timeout_s: float) -> bool:
        """Stop the component and wait for its thread; False if it has not ended in time."""
        self.component.stop()
        if self.thread.ident is not None and self.thread is not threading.current_thread():
            self.thread.join(timeout_s)
            return not self.thread.is_alive()
        return True


def _is_for_want_of_memory(error: BaseException | None) -> bool:
    """Whether there was no memory, of which not every part of Python makes a MemoryError."""
    while error is not None:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError) and "can't allocate" in str(error):  # a lock
            return True
        error = error.__context__
    return False


class ThreadGroup:
    """The threads of one gateway: started together, ended together if one dies, and stopped one after the other."""

    def __init__(self, on_death: Callable[[str], None]) -> None:
        """`on_death` is called with the name of a thread that ended without being told to."""
        self._on_death = on_death
        self._pid = os.getpid()
        self._is_started = False
        self._is_stopped = False
        self._stop_lock = threading.Lock()  # held for the whole of a stop, so that a second one waits for it
        self.threads: list[ComponentThread] = []
        self.is_stopping = False
        self.died_of: str | None = None  # the name of the thread that died first

    @property
    def is_running(self) -> bool:
        """Whether all are started, none has died, and none is stopping."""
        return self._is_started and not self.is_stopping and self.died_of is None

    @property
    def is_inherited(self) -> bool:
        """Whether this is a forked child: the threads, and the files' contents, are its parent's."""
        return os.getpid() != self._pid

    def add(
        self, name: str, component: Component, *, stuck_after_s: float, stop_timeout_s: float | None = None
    ) -> None:
        """Add a component, in the order in which they are stopped: that in which the data flows."""
        thread = ComponentThread(
            name, component, self._ended, stuck_after_s=stuck_after_s, stop_timeout_s=stop_timeout_s
        )
        self.threads.append(thread)

    def start(self) -> None:
        """Start them all; raises what Thread.start does, RuntimeError or MemoryError, with some of them running."""
        self._is_started = True  # first: a thread may die at once
        for thread in self.threads:
            thread.thread.start()

    def _ended(self, name: str, failed: bool) -> None:
        if failed or not self.is_stopping:
            self.died_of = self.died_of or name
        if not self.is_stopping:
            self._on_death(name)

    def stop(self, begin: Callable[[], None], end: Callable[[Component, bool], None]) -> None:
        """Stop them one after the other, within STOP_S; from any thread, twice is harmless, and a child stops nothing.

        `begin` is called before the first; `end` after each, with the component and whether its thread has ended.
        """
        if self.is_inherited:
            return
        with self._stop_lock:
            if self._is_stopped or not self.threads:
                return
            self.is_stopping = True
            begin()
            reserved_s = sum(thread.stop_timeout_s or 0 for thread in self.threads[self._patient_one() + 1 :])
            patient_until = time.monotonic() + STOP_S - reserved_s
            for thread in self.threads:
                timeout_s = thread.stop_timeout_s
                ended = thread.stop(max(0.1, patient_until - time.monotonic()) if timeout_s is None else timeout_s)
                if not ended:
                    logger.error("gave up waiting for a thread thread=%s", thread.name)
                end(thread.component, ended)
            self._is_stopped = True

    def _patient_one(self) -> int:
        """The number of the thread that may take as long as the others leave."""
        return next((n for n, thread in enumerate(self.threads) if thread.stop_timeout_s is None), len(self.threads))

    def progress(self, clock: PauseMeter) -> dict[str, bool]:
        """For each thread, by name, whether it is alive and making progress."""
        return {thread.name: thread.is_making_progress(clock) for thread in self.threads}

    def close_descriptors(self) -> None:
        """Close the descriptors that a forked child has of its parent's components; takes no lock, writes nothing."""
        for thread in self.threads:
            thread.component.close_descriptors()
