"""The listener: takes datagrams from the socket, parses them, and hands them to the store and to the state log.

Unicast and broadcast differ in what is bound only: see `listen_address` in sockets.py.
"""

from __future__ import annotations

import ipaddress
import logging
import select
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, cast

from config import PREFIX, Network
from engine_state import (
    DatagramTexts,
    InvalidDatagram,
    datagram_json,
    match_all_canonical,
    match_labelled,
    parse,
    quote_json,
    unquote_json,
)
from fleet_events import KERNEL_DROPS, FleetEvents
from gateway_counters import ACCEPTED, REJECTED_CAPACITY, REJECTED_SOURCE, UNLOGGED
from intake_progress import Pacing, ReadBarrier, Watermark
from kernel_drops import KernelDrops
from log_throttle import LogThrottle
from rejected_samples import RejectedSamples
from signed_intake import SignedIntake
from sockets import SocketLost, bind_anew, format_address, granted_receive_buffer
from state_log import StateLog
from state_store import Batch, StateStore
from udp_receiver import MAX_BATCH_DATAGRAMS, Receiver, make_receiver, unpack_address
from wake_up import WakeUp

logger = logging.getLogger("elrar.listener")

MAX_BATCHES_PER_STEP = 16  # between two checks of the stop flag
POLL_TIMEOUT_MS = 200  # a silent socket is polled this often, which shows that the listener makes progress
STOP_DRAIN_S = 1.0  # at stop, what waits in the socket is taken for at most this long
MAX_CACHED_SOURCES = 16384
MEND_TIMEOUT_S = 1.0  # for a socket that gives nothing but errors to be good again
MEND_INTERVAL_S = 0.02
MIN_CHARGE_BYTES = 512  # of receive buffer that the kernel charges for the smallest datagram
MAX_CHARGE_BYTES = 17_408  # the same for the largest that is taken

_REFUSED = b""  # what stands for the source of a sender that is not in ALLOWED_SOURCES


def is_allowed(host: str, allowed: Sequence[Network]) -> bool:
    """Whether `host`, as unpack_address gives it, is in one of the networks."""
    address = ipaddress.ip_address(host.partition("%")[0])
    return any(address in network for network in allowed)


class _Sources(dict[bytes, bytes]):
    """The source of each socket address: `<ip>:<port>` as JSON text, or _REFUSED if it is not in `allowed`."""

    def __init__(self, allowed: Sequence[Network]) -> None:
        super().__init__()
        self._allowed = allowed

    def __missing__(self, address: bytes) -> bytes:
        if len(self) >= MAX_CACHED_SOURCES:
            self.clear()
        host, port = unpack_address(address)
        allowed = not self._allowed or is_allowed(host, self._allowed)
        source = self[address] = quote_json(format_address(host, port)).encode() if allowed else _REFUSED
        return source


@dataclass
class _Inlet:
    """One socket, what it is bound to, and how it is received from."""

    sock: socket.socket
    name: Any
    receiver: Receiver
    failing_since: float | None = None  # monotonic; since when it has given nothing but errors


class _Notices:
    """What the listener says of datagrams that were not taken, and of trouble with the sockets."""

    def __init__(self, events: FleetEvents, clock: Callable[[], float]) -> None:
        def warn_of(what: str) -> LogThrottle:
            return LogThrottle(logger, logging.WARNING, what, clock=clock)

        self.invalid = warn_of("rejected invalid datagrams")
        self.source = warn_of(f"rejected datagrams whose source is not in {PREFIX}ALLOWED_SOURCES")
        self.capacity = warn_of(
            f"rejected datagrams of new engines: {PREFIX}MAX_ENGINES are known, or `ulimit -v` leaves no memory;"
        )
        self.kernel_drops = warn_of(
            "the kernel dropped datagrams, its receive buffer being full: give the gateway a core of its own, or raise"
            f" {PREFIX}RECEIVE_BUFFER and net.core.rmem_max;"
        )
        self.errors = warn_of("receiving met errors, and goes on;")
        self._kernel_drops_noted = 0
        self.samples = RejectedSamples()  # the last datagram of each kind of rejection
        self._events = events

    def flush(self, kernel_dropped: int) -> None:
        """Write the lines that are due; `kernel_dropped` in all."""
        if kernel_dropped > self._kernel_drops_noted:
            dropped = kernel_dropped - self._kernel_drops_noted
            self.kernel_drops.record(count=dropped)
            self._events.record(KERNEL_DROPS, message=f"the kernel dropped {dropped} datagrams")
            self._kernel_drops_noted = kernel_dropped
        for notice in (self.invalid, self.source, self.capacity, self.kernel_drops, self.errors):
            notice.flush()


class UdpListener:
    """Takes datagrams until it is stopped; the gateway gives it its thread.

    `run` and `step` belong to that thread, everything else may be called from any. How far it has come, and how long
    it lets datagrams wait, is in intake_progress.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        store: StateStore,
        log: StateLog | None,
        *,
        allowed_sources: Sequence[Network] = (),
        signed: SignedIntake | None = None,
        low_latency: bool = False,
        watermark_readers: Sequence[Callable[[float], None]] = (),
        events: FleetEvents | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`low_latency`: the store is read without `catch_up`, so that datagrams must not wait for long.

        `watermark_readers`, besides the store, are told up to when everything that had arrived has been taken.
        `events` is where dropped datagrams are told.
        """
        self._inlets = {sock.fileno(): _Inlet(sock, sock.getsockname(), make_receiver(sock)) for sock in sockets}
        self._store = store
        self._log = log
        self._sources = _Sources(tuple(allowed_sources))
        self._signed = signed
        self._clock = clock
        self._wall_clock = wall_clock
        self._stopping = False
        self._wakeup = WakeUp()  # to stop, and for a reader that waits
        self._poll = select.poll()
        self._poll.register(self._wakeup, select.POLLIN)
        for sock in sockets:
            self._poll.register(sock, select.POLLIN)
        self._barrier = ReadBarrier(sockets, self._wakeup)
        granted = [granted_receive_buffer(sock) * 2 for sock in sockets]
        max_buffered = 1 + sum(granted) // MIN_CHARGE_BYTES
        self._watermark = Watermark(max_buffered, clock(), store.advance_watermark, *watermark_readers)
        room = min(granted) / 4 / MAX_CHARGE_BYTES  # a quarter of what certainly fits
        self._pacing = Pacing(room, clock(), lambda: low_latency or store.has_impatient_subscriber)
        self._drops = KernelDrops(sockets)
        self._notices = _Notices(FleetEvents(clock=clock) if events is None else events, clock)
        self.last_progress_at = clock()  # monotonic; written by the listener's thread only

    def run(self) -> None:
        """Take datagrams until `stop` is called, and then what waits in the socket."""
        flush_at = self._clock()
        while not self._stopping:
            taken = self.step(0 if self._barrier.is_requested else POLL_TIMEOUT_MS)
            now = self.last_progress_at
            delay_s = self._pacing.delay_s(taken, now)
            # More than a batch is a socket that has been filling up meanwhile.
            if delay_s and taken < MAX_BATCH_DATAGRAMS and not self._barrier.is_requested:
                self._wakeup.wait(delay_s)
            if now >= flush_at:
                flush_at = now + 1.0  # so that no count stays unsaid
                self.flush_notices()
        deadline = self._clock() + STOP_DRAIN_S
        while self.step(0) and self._clock() < deadline:
            pass
        self.flush_notices()

    def step(self, wait_ms: int) -> int:
        """Wait for datagrams, for `wait_ms` at most, and take what waits then; returns how many it was.

        It takes batch after batch without waiting in between: a wait gives the interpreter's lock away, and beside a
        CPU-bound thread that costs 5 ms.
        """
        barrier = self._barrier
        ticket = barrier.ticket()
        began_at = self._clock()
        ready = self._poll.poll(wait_ms)
        if not ready:
            self.last_progress_at = self._clock()  # else it follows below
        taken, emptied = 0, True
        barrier.begin()
        for fd, _ in ready:
            inlet = self._inlets.get(fd)
            if inlet is None:
                self._wakeup.clear()
                self.last_progress_at = self._clock()
                continue
            from_it, it_is_empty = self._empty(inlet)
            taken += from_it
            emptied &= it_is_empty
        barrier.end(ticket, emptied=emptied)
        self._watermark.advance(began_at, taken, emptied=emptied)
        return taken

    def _empty(self, inlet: _Inlet) -> tuple[int, bool]:
        """Take what waits in a socket, MAX_BATCHES_PER_STEP at most; returns how many, and whether it is empty now."""
        taken = 0
        for _ in range(MAX_BATCHES_PER_STEP):
            try:
                datagrams, addresses = inlet.receiver.receive()
            except OSError as error:
                self._mend(inlet, error)
                return taken, False
            self.last_progress_at = self._clock()
            if datagrams:
                taken += len(datagrams)
                self._take(datagrams, addresses)
            if len(datagrams) < MAX_BATCH_DATAGRAMS:
                inlet.failing_since = None
                return taken, True
        return taken, False

    def _mend(self, inlet: _Inlet, error: OSError) -> None:
        """Go on after an error of receiving; raises SocketLost if it lasts for MEND_TIMEOUT_S.

        A socket that was destroyed (`ss -K`) has told so by an error, and may have lost its port. Any other is left as
        it is, for what waits in it.
        """
        now = time.monotonic()
        if inlet.failing_since is None:
            inlet.failing_since = now
        try:
            if inlet.sock.getsockname() != inlet.name:
                self._drops.total()
                bind_anew(inlet.sock, inlet.name)
                self._drops.forget(inlet.sock)
                inlet.failing_since = None
        except OSError as failed:
            error = failed
        if inlet.failing_since is not None and now - inlet.failing_since > MEND_TIMEOUT_S:
            raise SocketLost("UDP", inlet.name, error) from error
        self._notices.errors.record("UDP %s: %s", format_address(*inlet.name[:2]), error.strerror)
        self._wakeup.wait(MEND_INTERVAL_S)

    def catch_up(self, timeout_s: float) -> None:
        """Return once everything that has arrived by now is taken, or after `timeout_s`; for one other thread.

        Once the listener is told to stop, nobody waits for it any more.
        """
        self._barrier.wait(timeout_s)

    def _take(self, datagrams: list[bytes], addresses: Sequence[bytes]) -> None:
        batch = Batch(self.last_progress_at, self._wall_clock())
        sources = list(map(self._sources.__getitem__, addresses))
        if _REFUSED in sources:
            datagrams, sources = self._without_refused(batch, datagrams, addresses)
        signed = self._signed
        if signed is not None:
            datagrams, sources = signed.verify(batch, datagrams, sources)
        matched = match_all_canonical(datagrams)
        if all(matched):
            batch.states, texts, batch.sources = cast("list[DatagramTexts]", matched), datagrams, sources
        else:
            batch.states, texts, batch.sources = self._parse(batch, matched, datagrams, sources)
        if signed is not None:
            texts = signed.admit(batch, texts)
        outcomes = self._store.apply(batch)
        all_accepted = outcomes.count(ACCEPTED) == len(outcomes)
        if self._log is not None:
            logged_sources = batch.sources
            if not all_accepted:
                kept = [outcome not in UNLOGGED for outcome in outcomes]
                texts, logged_sources = list(compress(texts, kept)), list(compress(batch.sources, kept))
            if batch.late:
                texts = [*texts, *(text for _, _, text in batch.late)]
                logged_sources = [*logged_sources, *(source for _, source, _ in batch.late)]
            self._log.append(batch.received_s, texts, logged_sources)
        if not all_accepted and REJECTED_CAPACITY in outcomes:
            self._note_rejected_capacity(batch, outcomes)
        if logger.isEnabledFor(logging.DEBUG):
            for number, outcome in enumerate(outcomes):
                logger.debug("datagram %s %s", outcome, _who(batch, number))

    def _without_refused(
        self, batch: Batch, datagrams: list[bytes], addresses: Sequence[bytes]
    ) -> tuple[list[bytes], list[bytes]]:
        """The datagrams whose senders are in ALLOWED_SOURCES, and their sources; the others are counted."""
        taken, sources, refused = [], [], []
        for datagram, address in zip(datagrams, addresses, strict=True):
            source = self._sources[address]
            if source is _REFUSED:
                refused.append(address)
            else:
                taken.append(datagram)
                sources.append(source)
        batch.rejected_source += len(refused)
        stranger = format_address(*unpack_address(refused[-1]))
        self._notices.source.record("%s", stranger, count=len(refused))
        self._notices.samples.keep(REJECTED_SOURCE, batch.received_s, quote_json(stranger).encode())
        if logger.isEnabledFor(logging.DEBUG):
            for address in refused:
                logger.debug("datagram rejected_source source=%s", format_address(*unpack_address(address)))
        return taken, sources

    def _parse(
        self, batch: Batch, matched: Sequence[DatagramTexts | None], datagrams: list[bytes], sources: list[bytes]
    ) -> tuple[list[DatagramTexts], list[bytes], list[bytes]]:
        """Parse what is not canonical; returns the valid states, each as its log line has it too, and their sources."""
        states, texts, valid_sources = [], [], []
        debug = logger.isEnabledFor(logging.DEBUG)
        for canonical, datagram, source in zip(matched, datagrams, sources, strict=True):
            state, text = canonical or match_labelled(datagram), datagram
            if state is None:
                try:
                    parsed = parse(datagram)
                except InvalidDatagram as error:
                    batch.invalid.append(error.reason)
                    self._notices.invalid.record("%s bytes=%d source=%s", error, len(datagram), source)
                    self._notices.samples.keep(
                        error.reason, batch.received_s, source, "%s, in %d bytes", error, len(datagram)
                    )
                    if debug:
                        logger.debug("datagram invalid reason=%s source=%s", error, unquote_json(source))
                    continue
                state = parsed.texts()
                if self._signed is None:  # what is signed is kept as it came, so that it can be checked later
                    text = datagram_json(state)
                batch.ignored_fields += parsed.passed_over
            states.append(state)
            texts.append(text)
            valid_sources.append(source)
        return states, texts, valid_sources

    def _note_rejected_capacity(self, batch: Batch, outcomes: list[str]) -> None:
        if self._signed is not None:
            self._signed.take_back(batch, outcomes)
        for (quoted_id, *_), source, outcome in zip(batch.states, batch.sources, outcomes, strict=True):
            if outcome is REJECTED_CAPACITY:
                self._notices.capacity.record("engine_id=%r source=%s", quoted_id, source)
                self._notices.samples.keep(REJECTED_CAPACITY, batch.received_s, source, "engine_id=%r", quoted_id)

    def flush_notices(self) -> None:
        """Write the lines of the log that are due; for the listener's thread."""
        self._notices.flush(self._drops.total() or 0)
        if self._signed is not None:
            self._signed.notice.flush()

    def rejected_samples(self) -> dict[str, dict[str, Any]]:
        """For each reason the last datagram that was rejected."""
        return {**self._notices.samples.document(), **(self._signed.samples.document() if self._signed else {})}

    def kernel_dropped(self) -> int | None:
        """Datagrams that the kernel dropped because its buffer was full; None if it keeps no account."""
        return self._drops.total()

    def stop(self) -> None:
        """Make `run` take what waits and return; from any thread, twice is harmless."""
        self._stopping = True
        self._barrier.close()
        self._wakeup.set()

    def close(self) -> None:
        """Close the sockets; only after `run` has returned."""
        self._drops.total()
        self.close_descriptors()

    def close_descriptors(self) -> None:
        """Close the descriptors and do nothing else."""
        for inlet in self._inlets.values():
            inlet.sock.close()
        self._barrier.close_descriptors()
        self._wakeup.close()


def _who(batch: Batch, number: int) -> str:
    """The engine and the source of a state of a batch."""
    return f"engine_id={unquote_json(batch.states[number][0])!r} source={unquote_json(batch.sources[number])}"
