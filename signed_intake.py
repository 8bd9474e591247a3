"""With KEYS_FILE: lets only those datagrams through that are signed, may be signed by that key, and are no replay.

Two steps, because the fields are not known before a datagram is parsed, and no stranger's datagram is to be parsed:
`verify` looks at signatures, and `admit` at what needs the fields. Without KEYS_FILE there is none of this.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from itertools import compress

from boot_memory import COPY, LATE, TAKEN, BootMemory
from config import PREFIX
from datagram_signature import NO_SEQUENCE, NOT_ITS_ENGINE, SignatureCheck, signature_of
from engine_state import BOOT, GONE, PHASE, SEQ, DatagramTexts, unquote_json
from gateway_counters import REJECTED_CAPACITY
from log_throttle import LogThrottle
from signing_keys import Keys
from staleness import Freshness
from state_store import Batch

logger = logging.getLogger("elrar.listener")

_CODE_CHARS = 1 + 32  # the colon behind a key id, and the code


class SignedIntake:
    """Belongs to the listener's thread, but for `set_keys`."""

    def __init__(
        self, keys: Keys, max_engines: int, freshness: Freshness, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._keys = keys  # of this batch
        self._next_keys = keys
        self._check = SignatureCheck(keys)
        self._memory = BootMemory(max_engines, freshness)
        self.notice = LogThrottle(
            logger, logging.WARNING, f"rejected datagrams that are not signed as {PREFIX}KEYS_FILE asks", clock=clock
        )

    def set_keys(self, keys: Keys) -> None:
        """Replace the keys, from the next batch on; from any thread. What was taken stays remembered."""
        self._next_keys = keys

    def verify(self, batch: Batch, datagrams: list[bytes], sources: list[bytes]) -> tuple[list[bytes], list[bytes]]:
        """Those that a known key signed, and their sources; the others are noted in the batch."""
        if self._next_keys is not self._keys:
            self._keys = self._check.keys = self._next_keys
        check = self._check.check
        found = [check(datagram) for datagram in datagrams]
        if str not in map(type, found):
            return datagrams, sources
        for reason, datagram, source in zip(found, datagrams, sources, strict=True):
            if type(reason) is str:
                self._reject(batch, reason, f"bytes={len(datagram)}", source)
        kept = [type(one) is not str for one in found]
        return list(compress(datagrams, kept)), list(compress(sources, kept))

    def admit(self, batch: Batch, texts: list[bytes]) -> list[bytes]:
        """Leave in the batch the states that may be taken; returns their datagrams. `texts` are all of them."""
        self._memory.begin(batch.received_at, batch.received_s)
        found = list(map(self._judge, batch.states, texts))
        if found.count(TAKEN) == len(found):
            return texts
        for verdict, state, source, text in zip(found, batch.states, batch.sources, texts, strict=True):
            if verdict is LATE:
                batch.late.append((state, source, text))
            elif verdict is COPY:
                batch.copies += 1
            elif verdict is not TAKEN:
                self._reject(batch, verdict, f"engine_id={unquote_json(state[0])!r}", source)
        kept = [verdict is TAKEN for verdict in found]
        batch.states = list(compress(batch.states, kept))
        batch.sources = list(compress(batch.sources, kept))
        return list(compress(texts, kept))

    def _judge(self, state: DatagramTexts, text: bytes) -> str:
        signature = signature_of(text)
        boot = state[BOOT]
        if not self._keys[signature[:-_CODE_CHARS]].speaks_for(state[0]):
            return NOT_ITS_ENGINE
        if boot is None:
            return NO_SEQUENCE
        return self._memory.judge(state[0], boot, int(state[SEQ]), int(state[1]), signature, state[PHASE] == GONE)

    def take_back(self, batch: Batch, outcomes: list[str]) -> None:
        """What found no place in the table was not taken, and its boot is not remembered."""
        for state, outcome in zip(batch.states, outcomes, strict=True):
            if outcome is REJECTED_CAPACITY:
                self._memory.take_back(state[0], state[BOOT])

    def _reject(self, batch: Batch, reason: str, what: str, source: bytes) -> None:
        batch.rejected_signature.append(reason)
        self.notice.record("%s %s source=%s", reason, what, source)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("datagram rejected_signature reason=%s %s source=%s", reason, what, unquote_json(source))
