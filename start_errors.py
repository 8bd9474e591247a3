"""Why the gateway cannot start: what could not be had, and what to do."""

from __future__ import annotations

import errno
import os

from config import PREFIX
from log_file import LogInUse
from sockets import format_address


class StartError(Exception):
    """Something could not be opened; the text says what, why, and what to do."""


# The system has, or grants, no more of something, whatever was asked for.
_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


def cannot_have(error: OSError | RuntimeError | MemoryError) -> str:
    """A text for what the system refused while the gateway started: files, memory, threads, or anything else."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, RuntimeError):
        return (
            f"cannot start a thread: {error}; it needs six: raise the limit on processes (`ulimit -u`, TasksMax= of"
            " systemd, the pids limit of a container), or that on memory (`ulimit -v`), of which a thread's stack takes"
            " 8 MiB"
        )
    if isinstance(error, MemoryError) or number in (errno.ENOMEM, errno.ENOBUFS):
        return (
            f"cannot start: {_text(error)}; raise the limit on memory (`ulimit -v`, MemoryMax= of systemd, that of a"
            f" container), or lower {PREFIX}MAX_ENGINES and {PREFIX}HISTORY"
        )
    if number == errno.EMFILE:
        return f"cannot start: {_text(error)}; raise the limit on open files (`ulimit -n`, LimitNOFILE= of systemd)"
    if number == errno.ENFILE:
        return f"cannot start: {_text(error)}; raise this host's limit on open files with `sysctl -w fs.file-max=...`"
    return f"cannot start: {error}"


def _text(error: OSError | MemoryError) -> str:
    reason = error.strerror if isinstance(error, OSError) else None
    return reason or "out of memory"


def cannot_listen(protocol: str, address: str, port: int, error: OSError) -> str:
    """A text for a socket that could not be bound; `protocol` is UDP or TCP."""
    if error.errno in _RESOURCES:
        return cannot_have(error)
    variable = PREFIX + ("UDP_PORT" if protocol == "UDP" else "HTTP_PORT")
    problem = f"cannot listen on {protocol} {format_address(address, port)}: {error.strerror}"
    if error.errno == errno.EADDRINUSE:
        flag = "u" if protocol == "UDP" else "t"
        return (
            f"{problem}; another process has the port, perhaps another gateway: see which with"
            f" `ss -l{flag}np 'sport = :{port}'` or `lsof -i :{port}` as root, stop it, or set another {variable}."
            " A gateway that has it can be read over HTTP: get_state_gateway() in a router follows it by itself, others"
            " use engine_table.py or GET /engines"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return (
            f"{problem}; no interface of this host has that address: `ip addr` shows those that there are, and"
            f" {PREFIX}BIND_ADDRESS=0.0.0.0 listens on all of them"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{problem}; a port below 1024 needs root or CAP_NET_BIND_SERVICE: set {variable} to 1024 or above"
    return f"{problem}; see {PREFIX}BIND_ADDRESS and {variable}"


def cannot_log(path: str, error: OSError) -> str:
    """A text for a state log that could not be opened."""
    if error.errno in _RESOURCES:
        return cannot_have(error)
    problem = f"cannot open the state log {path}: {error.strerror}"
    if isinstance(error, LogInUse):
        return (
            f"{problem}; two that write to one log would lose lines: see which process it is with `fuser -v {path}` or"
            f" `lsof {path}`, stop it, or set another {PREFIX}LOG_FILE"
        )
    if error.errno == errno.ENXIO:
        problem += " (a FIFO that nobody reads, or a socket)"
    if not os.path.isabs(path):
        problem += " (the working folder is gone)"
    return (
        f"{problem}; set {PREFIX}LOG_FILE to a file that this user can write, with room on its disk, or"
        f" {PREFIX}ENABLE_LOG=false"
    )
