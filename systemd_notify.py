"""Tells systemd that the daemon is ready, alive and stopping (`Type=notify`, `WatchdogSec=`); else it does nothing.

The protocol is sd_notify's: lines of NAME=value in one datagram to the socket that the environment names.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping

logger = logging.getLogger("elrar.systemd")


class SystemdNotify:
    """The way to the service manager; for one thread at a time. No failure here stops the daemon."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):
            self._address = "\0" + self._address[1:]  # an abstract one
        watchdog_us = environ.get("WATCHDOG_USEC", "")
        for_us = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        is_number = watchdog_us.isascii() and watchdog_us.isdigit() and len(watchdog_us) < 20
        # A third of what is allowed, so that a late sign of life does no harm; None if nobody watches.
        self.watchdog_period_s = (
            int(watchdog_us) / 3e6 if self._address and for_us and is_number and int(watchdog_us) else None
        )

    def ready(self, status: str) -> None:
        """Everything is open; `status` is what `systemctl status` shows."""
        self._tell(f"READY=1\nSTATUS={status}", logging.WARNING)  # without it systemd ends a daemon that works

    def reloading(self, status: str) -> None:
        """SIGHUP has been done; `Type=notify-reload` waits for both."""
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
        self.ready(status)

    def alive(self) -> None:
        """Every thread is alive and moving; said every `watchdog_period_s`, or systemd ends and restarts the daemon."""
        self._tell("WATCHDOG=1")

    def stopping(self, status: str) -> None:
        """The daemon has begun to stop."""
        self._tell(f"STOPPING=1\nSTATUS={status}")

    def _tell(self, message: str, level_of_failure: int = logging.DEBUG) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(1.0)  # its queue may be full for a moment, and READY=1 must not be lost
                sock.sendto(message.encode(), self._address)
        except OSError as error:
            logger.log(level_of_failure, "cannot tell systemd %r error=%s", message, error)
