"""With KEYS_FILE: lets only those datagrams through that are signed, may be signed by that key, and are no replay.

Two steps, because the fields are not known before a datagram is parsed, and no stranger's datagram is to be parsed:
`verify` looks at signatures, and `admit` at what needs the fields. Without KEYS_FILE there is none of this.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from itertools import compress
from typing import cast

from boot_memory import COPY, LATE, TAKEN, BootMemory
from config import PREFIX
from datagram_signature import NOT_ITS_ENGINE, SignatureCheck
from engine_state import BOOT, unquote_json
from gateway_counters import REJECTED_CAPACITY
from log_throttle import LogThrottle
from rejected_samples import RejectedSamples
from signing_keys import Keys, SigningKey
from staleness import Freshness
from state_store import Batch

logger = logging.getLogger("elrar.listener")


class SignedIntake:
    """Belongs to the listener's thread, but for `set_keys`."""

    def __init__(
        self, keys: Keys, max_engines: int, freshness: Freshness, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._next_keys = keys  # of the next batch
        self.samples = RejectedSamples()
        # Of the batch between `verify` and `admit`: what was verified, and who signed it.
        self._datagrams: list[bytes] = []
        self._signatures: list[bytes] = []
        self._keys: list[SigningKey] = []
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
        if self._next_keys is not self._check.keys:
            self._check.keys = self._next_keys
        found, signatures = self._check.check(datagrams)
        if str in map(type, found):
            for reason, datagram, source in zip(found, datagrams, sources, strict=True):
                if isinstance(reason, str):
                    self._reject(batch, reason, source, "bytes=%d", len(datagram))
            kept = [not isinstance(one, str) for one in found]
            datagrams, sources = list(compress(datagrams, kept)), list(compress(sources, kept))
            signatures, found = list(compress(signatures, kept)), list(compress(found, kept))
        self._datagrams, self._signatures, self._keys = datagrams, signatures, cast("list[SigningKey]", found)
        return datagrams, sources

    def admit(self, batch: Batch, texts: list[bytes]) -> list[bytes]:
        """Leave in the batch the states that may be taken; returns their datagrams. `texts` are all that are valid."""
        if len(texts) < len(self._datagrams):
            self._forget_invalid(texts)
        if not all(key.speaks_for_all for key in set(self._keys)):
            may = [key.speaks_for(state[0]) for key, state in zip(self._keys, batch.states, strict=True)]
            if False in may:
                texts = self._leave(batch, texts, [TAKEN if spoken_for else NOT_ITS_ENGINE for spoken_for in may])
                self._signatures = list(compress(self._signatures, may))
        self._memory.begin(batch.received_at, batch.received_s)
        found = self._memory.judge_all(batch.states, self._signatures)
        return texts if found.count(TAKEN) == len(found) else self._leave(batch, texts, found)

    def _forget_invalid(self, texts: list[bytes]) -> None:
        """Keep the signatures of those datagrams that are left; they are the same objects, in the same order."""
        left = iter(texts)
        next_one = next(left, None)
        kept = []
        for datagram in self._datagrams:
            kept.append(datagram is next_one)
            if kept[-1]:
                next_one = next(left, None)
        self._signatures, self._keys = list(compress(self._signatures, kept)), list(compress(self._keys, kept))

    def _leave(self, batch: Batch, texts: list[bytes], found: list[str]) -> list[bytes]:
        """Leave what is TAKEN in the batch, and note the others in it."""
        for verdict, state, source, text in zip(found, batch.states, batch.sources, texts, strict=True):
            if verdict is LATE:
                batch.late.append((state, source, text))
            elif verdict is COPY:
                batch.copies += 1
            elif verdict is not TAKEN:
                self._reject(batch, verdict, source, "engine_id=%r", state[0])
        kept = [verdict is TAKEN for verdict in found]
        batch.states = list(compress(batch.states, kept))
        batch.sources = list(compress(batch.sources, kept))
        return list(compress(texts, kept))

    def take_back(self, batch: Batch, outcomes: list[str]) -> None:
        """What found no place in the table was not taken, and its boot is not remembered."""
        for state, outcome in zip(batch.states, outcomes, strict=True):
            if outcome is REJECTED_CAPACITY:
                self._memory.take_back(state[0], state[BOOT])

    def _reject(self, batch: Batch, reason: str, source: bytes, detail: str, argument: object) -> None:
        batch.rejected_signature.append(reason)
        self.notice.record(f"%s {detail} source=%s", reason, argument, source)
        self.samples.keep(reason, batch.received_s, source, detail, argument)
        if logger.isEnabledFor(logging.DEBUG):
            shown = detail % (unquote_json(argument) if isinstance(argument, bytes) else argument)
            logger.debug("datagram rejected_signature reason=%s %s source=%s", reason, shown, unquote_json(source))
