"""The keys that sign datagrams: the file of KEYS_FILE, and which engines a key speaks for."""

from __future__ import annotations

import hashlib
import logging
import re
from binascii import hexlify
from collections.abc import Mapping

from config import PREFIX, ConfigError
from engine_state import unquote_json
from secret_file import SecretFileError, read_secret_lines

logger = logging.getLogger("elrar.keys")

MAX_CACHED_IDS = 65536  # engine ids of one key for which it is known whether it speaks for them
MAX_PATTERN_PLACES = 256  # characters of a pattern besides `*`: no engine_id is longer
CODE_BYTES = 16  # of the HMAC that a signature has

_LINE = re.compile(rb"([^ \t]+)(?:[ \t]+([^ \t]*)(?:[ \t]+(.*))?)?", re.DOTALL)
_KEY_ID = re.compile(rb"[A-Za-z0-9_-]{1,32}")
_HEX_DIGITS = re.compile(rb"[0-9A-Fa-f]+")
_SHA256_BLOCK = 64
_INNER = bytes(byte ^ 0x36 for byte in range(256))  # HMAC's two pads, as tables for bytes.translate
_OUTER = bytes(byte ^ 0x5C for byte in range(256))


class KeysError(Exception):
    """A file of keys that cannot be used; the text names the line and the fault, and never what the line has."""


class IdPattern:
    """A pattern of engine ids: `*` stands for any characters or none, `?` for one; nothing else is special.

    Safe in any thread.
    """

    def __init__(self, pattern: str) -> None:
        """Raises ValueError, with the fault, for one that can fit no engine_id."""
        if pattern.strip(" ") != pattern:
            raise ValueError("the pattern has a space at an end, and no engine_id has")
        if not pattern:
            raise ValueError("the pattern is empty, which fits no engine_id")
        if not pattern.isprintable():
            raise ValueError("the pattern has a character that is not printable, and no engine_id has")
        # All places at which the text may stand in the pattern, as bits of one number: bit n says that what came so far
        # fits the first n characters of the pattern, its stars left out. One step for each character of the text,
        # whatever the pattern is.
        places = pattern.replace("*", "")
        if len(places) > MAX_PATTERN_PLACES:
            raise ValueError(f"the pattern is longer than an engine_id can be: {MAX_PATTERN_PLACES} characters")
        any_one = 0
        self._fits: dict[str, int] = {}  # for each character of the pattern, before which places it may stand
        for place, character in enumerate(places):
            if character == "?":
                any_one |= 1 << place
            else:
                self._fits[character] = self._fits.get(character, 0) | 1 << place
        for character in self._fits:
            self._fits[character] |= any_one
        self._any_one = any_one
        self._stars = 0  # places with a star, which a character does not leave
        place = 0
        for character in pattern:
            if character == "*":
                self._stars |= 1 << place
            else:
                place += 1
        self._end = 1 << place

    def matches(self, text: str) -> bool:
        """Whether the whole text fits."""
        at, fits, any_one, stars = 1, self._fits, self._any_one, self._stars
        for character in text:
            at = (at & fits.get(character, any_one)) << 1 | at & stars
            if not at:
                return False
        return at & self._end != 0


class SigningKey:
    """A key, and the engines that it speaks for. `code` and `speaks_for` belong to the listener's thread."""

    __slots__ = ("_inner", "_outer", "_pattern", "_speaks_for", "key_id", "speaks_for_all")

    def __init__(self, key_id: bytes, secret: bytes, pattern: IdPattern | None) -> None:
        """`secret`: 16 to 64 bytes. It is not kept, so that nothing can show it."""
        self.key_id = key_id
        # HMAC's two halves, each with the key in it already: half as dear as hmac.digest, which begins with the key.
        padded = secret.ljust(_SHA256_BLOCK, b"\0")
        self._inner = hashlib.sha256(padded.translate(_INNER))
        self._outer = hashlib.sha256(padded.translate(_OUTER))
        self._pattern = pattern
        self.speaks_for_all = pattern is None
        self._speaks_for: dict[bytes, bool] = {}

    def code(self, text: bytes) -> bytes:
        """A colon, and the first half of HMAC-SHA256 over a text as 32 lower-case hex digits."""
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(text)
        outer.update(inner.digest())
        return b":" + hexlify(outer.digest()[:CODE_BYTES])

    def speaks_for(self, quoted_id: bytes) -> bool:
        """Whether it may sign for an engine; the id is JSON text."""
        if self._pattern is None:
            return True
        known = self._speaks_for.get(quoted_id)
        if known is None:
            if len(self._speaks_for) >= MAX_CACHED_IDS:
                self._speaks_for.clear()
            known = self._speaks_for[quoted_id] = self._pattern.matches(unquote_json(quoted_id))
        return known


Keys = Mapping[bytes, SigningKey]  # by key id


def load_keys(path: str | None, *, warn: bool = True) -> Keys | None:
    """The keys in the file of KEYS_FILE, if it is set; raises ConfigError."""
    if path is None:
        return None
    try:
        keys, warnings = read_keys(path)
    except KeysError as error:
        raise ConfigError([f"{PREFIX}KEYS_FILE={path!r} cannot be used: {error}"]) from error
    for warning in warnings if warn else ():
        logger.warning("%s", warning)
    return keys


def read_keys(path: str) -> tuple[Keys, list[str]]:
    """The keys in a file, one a line, and what is to be warned about; raises KeysError.

    A line that begins with # is a comment, and an empty one is passed over.
    """
    try:
        lines, warning = read_secret_lines(path)
    except SecretFileError as error:
        raise KeysError(str(error)) from error
    keys: dict[bytes, SigningKey] = {}
    lines_of_ids: dict[bytes, int] = {}
    lines_of_codes: dict[bytes, int] = {}  # what each key makes of nothing tells keys apart
    warnings = []
    for number, line in lines:
        if not line.strip(b" \t"):
            continue
        try:
            key = _read_line(line)
            if key.key_id in keys:
                raise ValueError(f"its key id is that of line {lines_of_ids[key.key_id]} already")
        except ValueError as error:
            raise KeysError(f"{path} line {number}: {error}") from None
        keys[key.key_id] = key
        lines_of_ids[key.key_id] = number
        same = lines_of_codes.setdefault(key.code(b""), number)
        if same != number:
            warnings.append(f"{path}: lines {same} and {number} have the same key, so that who has one has both")
    if not keys:
        raise KeysError(f"{path} has no key")
    if warning:
        warnings.append(warning)
    return keys, warnings


def _read_line(line: bytes) -> SigningKey:
    """The key of a line; raises ValueError with the fault. Nothing of the line is told: it may be a key anywhere."""
    if line.startswith(b"\xef\xbb\xbf"):
        raise ValueError("it begins with a byte-order mark: save the file as UTF-8 without one")
    if line[:1] in (b" ", b"\t"):
        raise ValueError("it begins with a space")
    found = _LINE.fullmatch(line)
    assert found is not None  # whatever does not begin with a space
    key_id, digits, pattern = found.groups()
    if not _KEY_ID.fullmatch(key_id):
        raise ValueError("a key id is 1 to 32 of A-Za-z0-9_-")
    if not digits:
        raise ValueError("the key is missing: <key id> <key> [<pattern of engine ids>]")
    if not _HEX_DIGITS.fullmatch(digits):
        raise ValueError("the key has something else than hex digits")
    if not 32 <= len(digits) <= 128:
        raise ValueError(f"a key has 32 to 128 hex digits, and this one has {len(digits)}")
    if len(digits) % 2:
        raise ValueError(f"a key has an even number of hex digits, and this one has {len(digits)}")
    secret = bytes.fromhex(digits.decode())
    if pattern is None:
        return SigningKey(key_id, secret, None)
    try:
        text = pattern.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("the pattern is not UTF-8") from None
    return SigningKey(key_id, secret, IdPattern(text))
