"""A file of secrets, one a line: keys that sign datagrams, or readers' tokens."""

from __future__ import annotations

import os
import stat

MAX_BYTES = 16 * 1024 * 1024


class SecretFileError(Exception):
    """A file of secrets that cannot be read; the text names it and the reason, and nothing of what it has."""


def read_secret_lines(path: str) -> tuple[list[tuple[int, bytes]], str]:
    """The lines of a file with their numbers, and a warning or nothing; raises SecretFileError.

    A line that begins with # is a comment; comments and empty lines are left out.
    """
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise SecretFileError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(text) > MAX_BYTES:
        raise SecretFileError(f"{path} is larger than {MAX_BYTES} bytes")
    numbered = [(number, raw.removesuffix(b"\r")) for number, raw in enumerate(text.split(b"\n"), 1)]
    lines = [(number, line) for number, line in numbered if line and not line.startswith(b"#")]
    others_can_read = stat.S_ISREG(mode) and mode & stat.S_IRWXO
    warning = f"others than its owner and group can read {path}: `chmod o= {path}`" if others_can_read else ""
    return lines, warning
