"""The gateway of a router's own process: started from the environment at the first call, once."""

from __future__ import annotations

import atexit
import errno
import logging
import os
import threading
import time
from collections.abc import Mapping

from config import PREFIX, read_config, unknown_variables
from following_gateway import FollowingGateway, follow
from start_errors import StartError
from state_gateway import StateGateway

logger = logging.getLogger("elrar.gateway")

FAILURE_REMEMBERED_S = 1.0

_process_lock = threading.Lock()  # guards the two below; held for as long as a start takes
_process_gateway: StateGateway | FollowingGateway | None = None
_last_failure: tuple[StartError, Mapping[str, str], float] | None = None  # with which settings, and when (monotonic)


def get_state_gateway() -> StateGateway | FollowingGateway:
    """The one gateway of this process, started from the environment at the first call.

    If another gateway on this host has the port, it is one that follows that gateway, and takes its place when it is
    gone. Raises ConfigError or StartError if it cannot be started; a later call tries again, also after `shutdown`, but
    with the same settings not within FAILURE_REMEMBERED_S: a router may ask at each request. It waits for nobody, but
    100 ms to learn who has the port. No signal handler is installed, no logging is configured, any thread may call it.
    """
    global _process_gateway
    gateway = _process_gateway  # replaced as a whole: the usual call takes no lock
    if gateway is not None and not gateway.has_ended:
        return gateway
    with _process_lock:
        gateway = _process_gateway
        if gateway is None or gateway.has_ended:
            if gateway is not None:
                gateway.shutdown()  # lets go of the port, if that is still going on
            _process_gateway = gateway = _start_or_fail_again()
        return gateway


def _start_or_fail_again() -> StateGateway | FollowingGateway:
    global _last_failure
    # The router's own logging may know levels that the daemon does not.
    environ = {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}
    if _last_failure is not None:
        error, settings, failed_at = _last_failure
        if settings == environ and time.monotonic() - failed_at < FAILURE_REMEMBERED_S:
            raise error.with_traceback(None)
    try:
        gateway = _start(environ)
    except StartError as error:
        _last_failure = error, environ, time.monotonic()
        raise
    _last_failure = None
    return gateway


def _start(environ: Mapping[str, str]) -> StateGateway | FollowingGateway:
    config = read_config(environ)
    for line in unknown_variables(environ):
        logger.warning("%s", line)
    gateway = StateGateway(config, embedded=True)
    try:
        gateway.open()
    except StartError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE:
            return follow(config, error)
        raise
    gateway.start()
    logger.info("ready: %s", gateway.describe())
    if config.enable_log and PREFIX + "LOG_FILE" not in environ:
        most = (
            f"up to {(config.log_backups + 1) * config.log_max_bytes >> 20} MiB"
            if config.log_max_bytes
            else "without bound"
        )
        logger.warning(
            "every state is logged, in this process's working folder since %sLOG_FILE is not set, %s file=%s",
            PREFIX,
            most,
            gateway.log_path,
        )
    return gateway


def _shut_down_gateway_of_process() -> None:
    if _process_gateway is not None:
        _process_gateway.shutdown()


def _close_descriptors_of_parent() -> None:
    """In a forked child: its threads are not here, and its sockets must not stay open here when it closes them."""
    global _process_gateway, _process_lock, _last_failure
    _process_lock = threading.Lock()  # the parent's may be held by a thread that is not here
    _last_failure = None
    if _process_gateway is not None:
        _process_gateway.close_descriptors()
        _process_gateway = None


atexit.register(_shut_down_gateway_of_process)
os.register_at_fork(after_in_child=_close_descriptors_of_parent)
