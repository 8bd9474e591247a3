"""The gateway of a router's own process: started from the environment at the first call, once."""

from __future__ import annotations

import atexit
import logging
import os
import threading

from config import LOG_LEVEL_VARIABLE, read_config, unknown_variables
from state_gateway import StateGateway

logger = logging.getLogger("elrar.gateway")

_process_lock = threading.Lock()  # guards the one below
_process_gateway: StateGateway | None = None


def get_state_gateway() -> StateGateway:
    """The one gateway of this process, started from the environment at the first call.

    Raises ConfigError or StartError where it cannot be started; a later call tries again, also after `shutdown`.
    No signal handler is installed and no logging is configured. Any thread may call it.
    """
    global _process_gateway
    with _process_lock:
        if _process_gateway is None or _process_gateway._stopping or _process_gateway._died_of is not None:
            if _process_gateway is not None:
                _process_gateway.shutdown()  # lets go of the port, where that is still going on
            # The router's own logging may know levels that the daemon does not.
            environ = {name: value for name, value in os.environ.items() if name != LOG_LEVEL_VARIABLE}
            gateway = StateGateway(read_config(environ))
            for line in unknown_variables(environ):
                logger.warning("%s", line)
            gateway.open()
            gateway.start()
            logger.info("ready: %s", gateway.describe())
            _process_gateway = gateway
        return _process_gateway


def _shut_down_gateway_of_process() -> None:
    if _process_gateway is not None:
        _process_gateway.shutdown()


def _abandon_gateway_of_parent() -> None:
    """In a forked child: its threads are not here, and its sockets must not stay open here when it closes them."""
    global _process_gateway, _process_lock
    _process_lock = threading.Lock()  # the parent's may be held by a thread that is not here
    if _process_gateway is not None:
        _process_gateway.abandon()
        _process_gateway = None


atexit.register(_shut_down_gateway_of_process)
os.register_at_fork(after_in_child=_abandon_gateway_of_parent)
