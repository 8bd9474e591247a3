"""A datagram's signature: whether it is there, of which key, and whether it is right.

A signed datagram ends with `, "sig": "<key id>:<32 lower-case hex digits>"}`, the first half of HMAC-SHA256 over every
byte before that. It is checked before anything else is made of the datagram, so that a stranger reaches no parser.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from hmac import compare_digest

from signing_keys import Keys, SigningKey

# Why a signature is refused. The same words are the counters and docs/engines.md's rows. First those for which only the
# datagram's end is looked at, then those that need its fields; in the order in which they are asked.
UNSIGNED = "unsigned"
UNKNOWN_KEY = "unknown_key"
BAD_SIGNATURE = "bad_signature"
NOT_ITS_ENGINE = "not_its_engine"
NO_SEQUENCE = "no_sequence"
CLOCK = "clock"
REPLAYED = "replayed"
TOO_MANY_BOOTS = "too_many_boots"
SIGNATURE_REASONS = {
    UNSIGNED: "it does not end with a signature as it has to be written, or has a line break in it",
    UNKNOWN_KEY: "its key is not in `KEYS_FILE`",
    BAD_SIGNATURE: "it was changed, or signed with another key of that name",
    NOT_ITS_ENGINE: "its key does not speak for that engine_id",
    NO_SEQUENCE: "it has no `boot` and `seq`",
    CLOCK: "its `timestamp_ms` is further than 300 s from the gateway's clock",
    REPLAYED: "its `seq` was reached before in that `boot`, or its `boot` is older than the engine's live one",
    TOO_MANY_BOOTS: "a new `boot` of an engine that had 16, or one too many in all, within 300 s",
}

_BEGINS = b', "sig": "'
_TAIL = re.compile(_BEGINS + rb'([A-Za-z0-9_-]{1,32}):[0-9a-f]{32}"\}')
_BEGINS_BYTES = len(_BEGINS)
_CODE_BYTES = 1 + 32  # a colon and the digits
_MAX_TAIL_BYTES = len(_BEGINS) + 32 + 1 + 32 + 2


class SignatureCheck:
    """Finds out who signed a datagram. For the listener's thread; `keys` are replaced as a whole, and never changed."""

    def __init__(self, keys: Keys) -> None:
        self.keys = keys

    def check(self, datagrams: Sequence[bytes]) -> tuple[list[SigningKey | str], list[bytes]]:
        """For each datagram the key that signed it, or the reason why it is refused; and its signature."""
        # One loop with all in it: of what it takes, two thirds are the codes.
        keys, begins_with, longest = self.keys, _BEGINS, -_MAX_TAIL_BYTES
        text = b"".join(datagrams)
        in_one_line = b"\n" not in text and b"\r" not in text
        found: list[SigningKey | str] = []
        signatures = []
        for datagram in datagrams:
            begins = datagram.rfind(begins_with, longest)
            signature = datagram[begins + _BEGINS_BYTES : -2]
            signatures.append(signature)
            key = keys.get(signature[:-_CODE_BYTES])
            # These let pass what the pattern of the whole tail would: a key that is known has a name of the right form,
            # and the code is compared with how it has to be written, in a time that tells nothing.
            if (
                key is not None
                and begins >= 0
                and datagram.endswith(b'"}')
                and compare_digest(key.code(datagram[:begins]), signature[-_CODE_BYTES:])
                and (in_one_line or _is_in_one_line(datagram))
            ):
                found.append(key)
            else:
                found.append(_why(keys, datagram, begins))
        return found, signatures


def _is_in_one_line(datagram: bytes) -> bool:
    return b"\n" not in datagram and b"\r" not in datagram


def _why(keys: Keys, datagram: bytes, begins: int) -> str:
    tail = _TAIL.fullmatch(datagram, begins) if begins >= 0 else None
    if tail is None or not _is_in_one_line(datagram):  # the log has a line a datagram
        return UNSIGNED
    return BAD_SIGNATURE if tail[1] in keys else UNKNOWN_KEY
