"""The ELRAR state gateway: the daemon's main program, and what a router imports."""

from __future__ import annotations

import sys

if sys.version_info < (3, 10):  # noqa: UP036
    # Before the other modules are imported: an older Python cannot even parse them.
    _TOO_OLD = "the state gateway needs Python 3.10 or newer, and this is %s" % sys.version.split()[0]  # noqa: UP031
    if __name__ == "__main__":
        sys.exit(_TOO_OLD)
    raise RuntimeError(_TOO_OLD)

import errno
import os
import signal

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
if __name__ == "__main__":
    # Before the slow imports: one that comes during the start is kept until the daemon can stop in order.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    # A script's folder comes first on the path, except with -I, -P and PYTHONSAFEPATH.
    _FOLDER = os.path.dirname(os.path.realpath(__file__))
    if sys.path[:1] != [_FOLDER]:
        sys.path.insert(0, _FOLDER)

    def _end_with_a_sentence(kind: Any, error: BaseException, traceback: Any) -> None:
        """A limit may be reached while the modules are imported: that is no bug, and has no use for a traceback."""
        used_up = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in used_up:
            os.write(2, b"the state gateway ends, its limit on memory or open files is too low (ulimit -v, -n)\n")
        else:
            sys.__excepthook__(kind, error, traceback)

    sys.excepthook = _end_with_a_sentence

import argparse
import contextlib
import faulthandler
import http.client
import importlib
import logging
import queue
import select
import socket
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or not __package__ or __name__ == "__main__":
    from config import (
        PREFIX,
        Config,
        ConfigError,
        effective_settings,
        read_config,
        settings_help,
        unknown_variables,
    )
    from daemon_log import DaemonLog
    from embedded_gateway import get_state_gateway
    from engine_state import EngineState
    from reader_access import load_tokens
    from signing_keys import load_keys
    from sockets import format_address, listen_address
    from start_errors import StartError, cannot_have
    from state_gateway import VERSION, StateGateway
    from systemd_notify import SystemdNotify
    from table_room import share_one_arena
else:  # the folder is part of a router's package, which wants these only
    importlib.import_module(".package_imports", __package__).install(__package__)
    from .config import ConfigError
    from .embedded_gateway import get_state_gateway
    from .engine_state import EngineState
    from .start_errors import StartError
    from .state_gateway import VERSION, StateGateway

__all__ = ["VERSION", "ConfigError", "EngineState", "StartError", "StateGateway", "get_state_gateway"]

logger = logging.getLogger("elrar.gateway")


def main(arguments: Sequence[str]) -> int:
    """Run the daemon until it is told to stop; returns the exit status."""
    options = _parse_arguments(arguments)
    try:
        config = read_config(os.environ)
        if not options.health_check:
            _read_secrets(config, warn=options.check_config)
    except ConfigError as error:
        for line in error.errors:
            _complain(line)
        return 1 if options.health_check else 2  # 2 means something else to what asks for health
    if options.check_config:
        for line in unknown_variables(os.environ):
            _complain(line)
        return _print(effective_settings(config, os.environ))
    if options.health_check:
        return _health_check(config)
    return _run_daemon(config)


def _read_secrets(config: Config, *, warn: bool) -> None:
    """Read the files of tokens and keys; raises ConfigError with what is wrong with either."""
    errors = []
    for load, path in ((load_tokens, config.http_tokens_file), (load_keys, config.keys_file)):
        try:
            load(path, warn=warn)
        except ConfigError as error:
            errors += error.errors
    if errors:
        raise ConfigError(errors)


class _Exits:
    """The one thing that the main thread waits on: signals, and threads that died.

    Signals come through signal.set_wakeup_fd, whichever thread the kernel gives them to. A handler that puts into a
    queue is not enough: a signal that comes just before a `get` blocks is handled only when that returns.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._dead: queue.SimpleQueue[str] = queue.SimpleQueue()
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def thread_died(self, name: str) -> None:
        """Tell the main thread that a thread died; may be called from any thread."""
        self._dead.put(name)
        with contextlib.suppress(BlockingIOError):
            self._writer.send(b"\0")

    def wait(self, timeout_s: float | None) -> set[str]:
        """The names of the signals that came, or `thread ... died`; empty after `timeout_s`."""
        select.select([self._reader], [], [], timeout_s)
        came = set()
        with contextlib.suppress(BlockingIOError):
            came = {signal.Signals(number).name for number in self._reader.recv(4096) if number}
        while not self._dead.empty():
            came.add(f"thread {self._dead.get()} died")
        return came

    def close(self) -> None:
        """Ignore the signals from now on: when Python ends, one that still has a handler would kill the process."""
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        self._reader.close()
        self._writer.close()


def _run_daemon(config: Config) -> int:
    _occupy_standard_descriptors()
    faulthandler.enable(2)  # a crash, or systemd's watchdog, shows where every thread was
    share_one_arena()
    try:
        exits = _Exits()
        daemon_log = DaemonLog(config.log_level)
    except (OSError, RuntimeError, MemoryError) as error:
        _complain(cannot_have(error))
        return 1
    try:
        for line in unknown_variables(os.environ):
            logger.warning("%s", line)
        gateway = StateGateway(config, on_death=exits.thread_died, own_log_dropped=lambda: daemon_log.dropped)
        try:
            gateway.open()
            gateway.start()
        except StartError as error:
            logger.error("%s", error)
            return 1
        logger.info("ready: %s", gateway.describe())
        systemd = SystemdNotify(os.environ)
        systemd.ready(gateway.describe())
        try:
            reasons = _wait_for_exit(gateway, exits, systemd)
            why = " and ".join(sorted(reasons))
            logger.info("stopping reason=%s", why)
            systemd.stopping(f"stopping, {why}")
        finally:
            gateway.shutdown()
        with contextlib.suppress(MemoryError, OverflowError):  # after a thread that had no memory left half an engine
            logger.info("stopped %s", _summary(gateway.get_stats()))
        return 0 if gateway.died_of is None else 1
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # one that comes now must not change the exit status
        daemon_log.close()
        exits.close()


def _wait_for_exit(gateway: StateGateway, exits: _Exits, systemd: SystemdNotify) -> set[str]:
    """Wait for reasons to exit; log statistics now and then, and send systemd a sign of life if it wants one."""
    never = float("inf")
    summary_period_s = gateway.config.stats_interval_s or never
    alive_period_s = systemd.watchdog_period_s or never
    summary_at = time.monotonic() + summary_period_s
    alive_at = time.monotonic() if systemd.watchdog_period_s else never
    while True:
        wake_at = min(summary_at, alive_at)
        reasons = exits.wait(None if wake_at == never else max(0.0, wake_at - time.monotonic()))
        if "SIGHUP" in reasons:
            gateway.reopen_log()
            gateway.reload_tokens()
            gateway.reload_keys()
            systemd.reloading(gateway.describe())
            reasons.remove("SIGHUP")
        if reasons:
            return reasons
        now = time.monotonic()
        if now >= alive_at:
            alive_at = now + alive_period_s
            if all(gateway.threads().values()):
                systemd.alive()
        if now >= summary_at:
            summary_at += summary_period_s
            logger.info("summary %s", _summary(gateway.get_stats()))


def _summary(stats: dict[str, Any]) -> str:
    names = ("active_engines", "total_engines", "total_received", "valid_states", "invalid_states", "kernel_dropped")
    log = stats["log"]
    return (
        " ".join(f"{name}={stats[name]}" for name in names)
        + f" log_written={log['written']} log_dropped={log['dropped']}"
    )


def _parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gateway.py",
        description="Takes the states that vLLM engines push by UDP, says how fresh they are, logs and serves them.",
        epilog=settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"elrar-state-gateway {VERSION}")
    parser.add_argument(
        "--check-config",
        action="store_true",
        help="print the effective settings and exit: 0, or 2 if a setting cannot be used",
    )
    parser.add_argument(
        "--health-check",
        action="store_true",
        help="ask the running gateway's /livez and exit: 0 if it is alive, else 1",
    )
    return parser.parse_args(arguments)


def _health_check(config: Config) -> int:
    """Ask the gateway that runs with the same settings whether it is alive."""
    if not config.http_port:
        _complain(f"cannot ask: {PREFIX}HTTP_PORT is {'off' if config.http_port is None else 'any free one'}")
        return 1
    address = listen_address(config.network_mode, config.bind_address)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
    connection = http.client.HTTPConnection(host, config.http_port, timeout=3)
    try:
        connection.request("GET", "/livez")
        response = connection.getresponse()
        answer = response.read(4096).decode("utf-8", "replace").strip()
    except (OSError, http.client.HTTPException) as error:
        _complain(
            f"no answer from http://{format_address(host, config.http_port)}/livez: {error}; it is not running, or it"
            f" runs with another {PREFIX}BIND_ADDRESS, HTTP_PORT or UDP_PORT than this command sees"
        )
        return 1
    finally:
        connection.close()
    return _print(answer) if response.status == 200 else 1


def _print(text: str) -> int:
    """Print what was asked for; returns the exit status: 1 if stdout does not take it."""
    try:
        _write(1, text)
    except OSError:
        return 1
    return 0


def _complain(line: str) -> None:
    with contextlib.suppress(OSError):  # stderr may be full or closed
        _write(2, line)  # before there is a log


def _write(fd: int, text: str) -> None:
    """Write straight to the descriptor. A failed flush of sys.stdout at exit would turn the exit status into 120."""
    data = text.encode("utf-8", "backslashreplace") + b"\n"
    while data:
        data = data[os.write(fd, data) :]


def _occupy_standard_descriptors() -> None:
    """Open 0, 1 and 2 if they are closed: otherwise a socket would get such a number, and the log be written to it."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
