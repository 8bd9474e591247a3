"""Who may read: tokens, and web pages of other origins (CORS). Belongs to the query server's thread."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from config import ANY_ORIGIN, PREFIX, ConfigError
from http_message import METHODS, Answer, Request, error_answer
from secret_file import SecretFileError, read_secret_lines

logger = logging.getLogger("elrar.http")

MAX_GUESSES = 20  # wrong tokens of one network within GUESSES_S that are refused at once
GUESSES_S = 60.0
HELD_BACK_S = 1.0  # the answer to further ones
MAX_GUESSERS = 10_000  # networks whose guesses are remembered

_NO_TOKEN = b""  # something was brought that can be no token
_TOKEN = re.compile(rb"[!-~]{16,256}")
_CHALLENGES = tuple(
    f'WWW-Authenticate: {scheme} realm="elrar state gateway"{more}'
    for scheme, more in (("Bearer", ""), ("Basic", ', charset="UTF-8"'))
)
_PREFLIGHT = (
    f"Access-Control-Allow-Methods: {', '.join(METHODS)}",
    "Access-Control-Allow-Headers: Authorization, Last-Event-ID",
    "Access-Control-Max-Age: 600",
)


class TokensError(Exception):
    """A file of tokens that cannot be used; the text names the line and the fault, and never a token."""


def load_tokens(path: str | None, *, warn: bool = True) -> list[bytes] | None:
    """The tokens in the file of HTTP_TOKENS_FILE, if it is set; raises ConfigError."""
    if path is None:
        return None
    try:
        tokens, warning = read_tokens(path)
    except TokensError as error:
        raise ConfigError([f"{PREFIX}HTTP_TOKENS_FILE={path!r} cannot be used: {error}"]) from error
    if warning and warn:
        logger.warning("%s", warning)
    return tokens


def read_tokens(path: str) -> tuple[list[bytes], str]:
    """The tokens in a file, one a line, and a warning or nothing; raises TokensError.

    A line that begins with # is a comment, and an empty one is passed over.
    """
    try:
        lines, warning = read_secret_lines(path)
    except SecretFileError as error:
        raise TokensError(str(error)) from error
    tokens: list[bytes] = []
    for number, line in lines:
        if not _TOKEN.fullmatch(line):
            raise TokensError(f"{path} line {number}: {_what_is_wrong(line)}")
        tokens.append(line)
    if not tokens:
        raise TokensError(f"{path} has no token")
    return tokens, warning


def _what_is_wrong(line: bytes) -> str:
    if not 16 <= len(line) <= 256:
        return f"a token has 16 to 256 characters, and this one has {len(line)}"
    return "a token has no spaces, and nothing else but ! to ~"


class ReaderAccess:
    """Lets readers in, or says what they need."""

    def __init__(
        self,
        tokens: Iterable[bytes] | None = None,
        allowed_origins: Sequence[str] = (),
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """No `tokens` at all means that none is asked for."""
        self._key = secrets.token_bytes(32)
        self._digests: frozenset[bytes] | None = None
        self.set_tokens(tokens)
        self._origins = frozenset(allowed_origins)
        self._clock = clock
        # By network: when it last sent wrong tokens. Those that were quiet for longest come first.
        self._guesses: OrderedDict[str, deque[float]] = OrderedDict()

    @property
    def needs_token(self) -> bool:
        """Whether readers need a token at all."""
        return self._digests is not None

    def set_tokens(self, tokens: Iterable[bytes] | None) -> None:
        """Replace the tokens; from any thread."""
        self._digests = None if tokens is None else frozenset(map(self._digest, tokens))

    def _digest(self, token: bytes) -> bytes:
        """What is looked up instead of a token: nobody else can make one that is nearly right, so that the time that
        looking takes tells nothing, however many tokens there are.
        """
        return hmac.new(self._key, token, hashlib.sha256).digest()

    def may_read(self, request: Request) -> bool:
        """Whether a request has one of the tokens of now, or none is asked for; counts nothing."""
        digests = self._digests
        if digests is None:
            return True
        token = _token_of(request)
        return token is not None and self._digest(token) in digests

    def refusal(self, request: Request, network: str) -> Answer | None:
        """Why a request of that network is not answered, or None if it may be."""
        if self.may_read(request):
            return None
        token = _token_of(request)
        what = "a token is needed" if token is None else "this token is none of those that may read"
        answer = error_answer(401, f"{what}: Authorization: Bearer <token>, or Basic with the token as password")
        held_back_s = 0.0 if token is None else self._count_guess(network)
        return replace(answer, headers=_CHALLENGES, held_back_s=held_back_s)

    def _count_guess(self, network: str) -> float:
        """Note a wrong token, and say for how long its answer is held back."""
        now = self._clock()
        guesses = self._guesses.setdefault(network, deque(maxlen=MAX_GUESSES))
        self._guesses.move_to_end(network)
        if len(self._guesses) > MAX_GUESSERS:
            self._guesses.popitem(last=False)
        is_guessing = len(guesses) == MAX_GUESSES and now - guesses[0] <= GUESSES_S
        guesses.append(now)
        return HELD_BACK_S if is_guessing else 0.0

    def headers_for(self, request: Request) -> tuple[str, ...]:
        """The header lines that any answer to this request has, for a web page of another origin."""
        if not self._origins:
            return ()
        lines = ["Vary: Origin"]
        origin = request.header("origin")
        if ANY_ORIGIN in self._origins and origin:
            lines.append("Access-Control-Allow-Origin: *")
        elif origin in self._origins:
            lines.append(f"Access-Control-Allow-Origin: {origin}")
        else:
            return tuple(lines)
        return (*lines, *(_PREFLIGHT if request.method == "OPTIONS" else ()))


def _token_of(request: Request) -> bytes | None:
    """The token that a request brings, or None if it brings none; what a proxy may read otherwise is no token."""
    if len(request.headers.get(b"authorization", ())) > 1:
        return _NO_TOKEN
    scheme, _, credentials = request.header("authorization").strip().partition(" ")
    credentials = credentials.strip()
    if not credentials:
        return None
    if scheme.lower() == "bearer":
        return credentials.encode("latin-1")
    if scheme.lower() != "basic":
        return _NO_TOKEN
    try:
        _, colon, password = base64.b64decode(credentials, validate=True).partition(b":")
    except (binascii.Error, ValueError):
        return _NO_TOKEN
    return (password or None) if colon else _NO_TOKEN
