"""A file of secrets, one a line: keys that sign datagrams, or readers' tokens."""

from __future__ import annotations

import os
import select
import stat
import time

MAX_BYTES = 16 * 1024 * 1024
PIPE_TIMEOUT_S = 2.0  # for whoever writes into a pipe (`<(a command)`): signals wait while the file is read


class SecretFileError(Exception):
    """A file of secrets that cannot be read; the text names it and the reason, and nothing of what it has."""


def read_secret_lines(path: str) -> tuple[list[tuple[int, bytes]], str]:
    """The lines of a file with their numbers, and a warning or nothing; raises SecretFileError.

    A line that begins with # is a comment; comments and empty lines are left out.
    """
    try:
        # Without O_NONBLOCK a pipe into which nobody writes would never be opened.
        with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            mode = os.fstat(file.fileno()).st_mode
            text = _read_all(file.fileno())
    except (OSError, ValueError) as error:
        raise SecretFileError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(text) > MAX_BYTES:
        raise SecretFileError(f"{path} is larger than {MAX_BYTES} bytes")
    numbered = [(number, raw.removesuffix(b"\r")) for number, raw in enumerate(text.split(b"\n"), 1)]
    lines = [(number, line) for number, line in numbered if line and not line.startswith(b"#")]
    others_can_read = stat.S_ISREG(mode) and mode & stat.S_IRWXO
    warning = f"others than its owner and group can read {path}: `chmod o= {path}`" if others_can_read else ""
    return lines, warning


def _read_all(descriptor: int) -> bytes:
    """What a file has, up to a byte more than MAX_BYTES; raises OSError, TimeoutError too if a pipe does not end."""
    give_up_at = time.monotonic() + PIPE_TIMEOUT_S
    text = bytearray()
    while len(text) <= MAX_BYTES:
        try:
            piece = os.read(descriptor, MAX_BYTES + 1 - len(text))
        except BlockingIOError:
            left = give_up_at - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise TimeoutError(f"it is a pipe that did not end within {PIPE_TIMEOUT_S:g} s") from None
            continue
        if not piece:
            break
        text += piece
    return bytes(text)
