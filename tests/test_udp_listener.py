"""From the socket to the store and the log: real datagrams on loopback, the listener's step called by hand."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import re
import socket
import struct
import sys
import tempfile
import threading
import unittest
from pathlib import Path
from unittest import mock

from engine_state import MAX_DATAGRAM_BYTES, REASONS
from sockets import SocketLost, open_udp_sockets
from state_log import StateLog
from state_store import Batch, DatagramCounters, StateStore
from tests.harness import DEADLINE_S, FakeClock, datagram, heartbeat, ipv6_works, logged_states, wait_until
from tests.test_engine_state import INVALID, VALID
from udp_listener import (
    BATCHES_A_STEP,
    LARGEST_CHARGE,
    LONGEST_NAP_S,
    PROMPT_NAP_S,
    RAPID_PER_S,
    RATE_WINDOW_S,
    SHORTEST_NAP_S,
    UdpListener,
    gathering_nap_s,
    is_allowed,
)
from udp_receiver import BATCH_DATAGRAMS, BatchReceiver, PortableReceiver, make_receiver, unpack_address


class ListenerCase(unittest.TestCase):
    log: StateLog
    portable = False  # every test here runs twice: see the end of this file

    def setUp(self) -> None:
        if self.portable:
            patched = mock.patch("udp_listener.make_receiver", PortableReceiver)
            patched.start()
            self.addCleanup(patched.stop)
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.log_path = Path(folder.name) / "states.jsonl"
        self.clock = FakeClock()
        self.store = StateStore(2000, 6000, 1000, 10, clock=self.clock)

    def listen(
        self, address: str = "127.0.0.1", *allowed: str, receive_buffer: int = 1 << 20, prompt: bool = False
    ) -> UdpListener:
        sockets = open_udp_sockets(address, 0, receive_buffer)
        self.port = sockets[0].getsockname()[1]
        if hasattr(self, "log"):
            self.log.abandon()  # as a gateway that has stopped
        self.log = StateLog(str(self.log_path), 0, 1)
        self.log.open("gateway_started", "network mode: unicast, test")
        self.addCleanup(self.log.abandon)
        listener = UdpListener(
            sockets,
            self.store,
            self.log,
            allowed_sources=[ipaddress.ip_network(network) for network in allowed],
            prompt=prompt,
            clock=self.clock,
        )
        self.addCleanup(listener.close)
        return listener

    def send(self, *datagrams: bytes, host: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            for one in datagrams:
                sock.sendto(one, (host, self.port))

    def take_all(self, listener: UdpListener) -> DatagramCounters:
        """Take what waits in the sockets; loopback delivers before `sendto` returns."""
        while listener.step(0):
            pass
        self.log.step()
        return self.store.counters()

    def assert_adds_up(self, counters: DatagramCounters) -> None:
        rejected = counters.invalid_states + counters.rejected_capacity + counters.rejected_source
        self.assertEqual(counters.received, counters.valid_states + rejected)
        self.assertEqual(len(logged_states(self.log_path)), counters.valid_states - counters.duplicates)


class Datagrams(ListenerCase):
    """Whatever arrives is counted once, and a good datagram right after it is taken."""

    def test_every_invalid_datagram_is_counted_by_its_reason(self) -> None:
        listener = self.listen()
        expected = dict.fromkeys(REASONS, 0)
        with self.assertLogs("elrar.listener", "WARNING") as logged:
            for number, (name, (reason, one)) in enumerate(INVALID.items()):
                self.send(one, datagram(engine_id="good", timestamp_ms=number))
                expected[reason] += 1
                with self.subTest(name):
                    counters = self.take_all(listener)
                    self.assertEqual(counters.invalid, expected)
                    self.assertEqual(counters.accepted, number + 1)
                    self.assert_adds_up(counters)
        self.assertEqual(len(logged.records), 1, "more than one line in a minute of the clock")
        self.assertEqual([view.state.engine_id for view in self.store.views()], ["good"])

    def test_how_many_were_not_shown_is_said_though_no_more_come(self) -> None:
        listener = self.listen()
        with self.assertLogs("elrar.listener", "WARNING") as logged:
            self.send(b"junk")
            self.take_all(listener)
            self.send(*[b"junk"] * 200)
            self.take_all(listener)
            self.clock.move(61)
            self.take_all(listener)
        said = [re.search("count=([0-9]+)", record.getMessage()) for record in logged.records]
        self.assertEqual([match and match[1] for match in said], ["1", "200"])

    def test_every_valid_datagram_is_taken_and_logged(self) -> None:
        listener = self.listen()
        for one in VALID.values():
            self.send(one)
            self.clock.move(2.5)
        counters = self.take_all(listener)
        self.assertEqual(counters.received, len(VALID))
        self.assertEqual(counters.invalid_states, 0)
        self.assert_adds_up(counters)

    def test_a_longer_datagram_is_never_taken_for_its_beginning(self) -> None:
        listener = self.listen()
        whole = datagram()
        for size in (MAX_DATAGRAM_BYTES + 1, 20_000, 65_507):
            self.send(whole + b" " * (size - len(whole)))
        self.send(whole + b" " * (MAX_DATAGRAM_BYTES - len(whole)))
        with self.assertLogs("elrar.listener"):
            counters = self.take_all(listener)
        self.assertEqual((counters.invalid["too_large"], counters.accepted), (3, 1))

    def test_a_log_line_for_each_state_but_not_for_its_copies(self) -> None:
        listener = self.listen()
        self.send(*[datagram(timestamp_ms=1000)] * 3, datagram(timestamp_ms=900), heartbeat(timestamp_ms=1100))
        counters = self.take_all(listener)
        self.assertEqual(
            (counters.accepted, counters.duplicates, counters.out_of_order, counters.heartbeats), (1, 2, 1, 1)
        )
        self.assertEqual([state["timestamp_ms"] for state in logged_states(self.log_path)], [1000, 900, 1100])

    def test_more_than_a_batch_is_taken_in_order(self) -> None:
        listener = self.listen(receive_buffer=8 << 20)
        count = 3 * BATCH_DATAGRAMS + 5
        self.send(*(datagram(timestamp_ms=number) for number in range(count)))
        self.assertEqual(listener.step(0), count)
        counters = self.take_all(listener)
        self.assertEqual(counters.accepted, count)
        self.assertEqual([state["timestamp_ms"] for state in logged_states(self.log_path)], list(range(count)))

    def test_debug_says_what_became_of_each(self) -> None:
        listener = self.listen()
        with self.assertLogs("elrar.listener", "DEBUG") as logged:
            self.send(datagram(), datagram(), b"junk", b"[]")
            self.take_all(listener)
        said = [record.getMessage() for record in logged.records if record.levelno == logging.DEBUG]
        self.assertEqual(len(said), 4)
        for line, pattern in zip(
            sorted(said),
            (
                r"datagram accepted engine_id='test' source=127\.0\.0\.1:\d+",
                r"datagram duplicate engine_id='test' source=127\.0\.0\.1:\d+",
                r"datagram invalid reason=not_an_object source=127\.0\.0\.1:\d+",
                r"datagram invalid reason=not_json source=127\.0\.0\.1:\d+",
            ),
            strict=True,
        ):
            self.assertRegex(line, f"^{pattern}$")

    def test_debug_says_who_was_refused(self) -> None:
        listener = self.listen("127.0.0.1", "10.0.0.0/8")
        with self.assertLogs("elrar.listener", "DEBUG") as logged:
            self.send(datagram(), datagram())
            self.take_all(listener)
        said = [record.getMessage() for record in logged.records if record.levelno == logging.DEBUG]
        self.assertEqual(len(said), 2)
        self.assertRegex(said[0], r"^datagram rejected_source source=127\.0\.0\.1:\d+$")

    def test_nothing_is_said_for_a_good_datagram_above_debug(self) -> None:
        listener = self.listen()
        with self.assertNoLogs("elrar.listener", logging.INFO):
            self.send(datagram())
            self.take_all(listener)


class Sources(ListenerCase):
    """ALLOWED_SOURCES: who is not in it is counted and not heard, before anything is looked at."""

    def test_who_is_allowed_is_taken(self) -> None:
        listener = self.listen("127.0.0.1", "10.0.0.0/8", "127.0.0.0/8")
        self.send(datagram())
        self.assertEqual(self.take_all(listener).accepted, 1)

    def test_who_is_not_is_rejected_whatever_was_sent(self) -> None:
        listener = self.listen("127.0.0.1", "10.0.0.0/8")
        with self.assertLogs("elrar.listener", "WARNING"):
            self.send(datagram(), b"junk")
            counters = self.take_all(listener)
        self.assertEqual((counters.rejected_source, counters.invalid_states, counters.accepted), (2, 0, 0))
        self.assertEqual(self.store.views(), [])

    def test_an_ipv4_sender_on_an_ipv6_socket_is_in_its_ipv4_network(self) -> None:
        networks = [ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fe80::/10")]
        allowed = ("10.0.0.1", "10.255.0.1", "fe80::1%eth0")
        refused = ("11.0.0.1", "::1", "2001:db8::1", "::10.0.0.1")
        self.assertEqual([host for host in allowed + refused if is_allowed(host, networks)], list(allowed))

    @unittest.skipUnless(ipv6_works(), "no IPv6 on this machine")
    def test_the_dual_stack_socket_asks_the_same(self) -> None:
        listener = self.listen("::", "127.0.0.0/8")
        with self.assertLogs("elrar.listener", "WARNING"):
            self.send(datagram(), host="127.0.0.1")
            self.send(datagram(engine_id="six"), host="::1")
            counters = self.take_all(listener)
        self.assertEqual((counters.accepted, counters.rejected_source), (1, 1))
        self.assertEqual([view.source.rpartition(":")[0] for view in self.store.views()], ["127.0.0.1"])


class Addresses(ListenerCase):
    """What is listened on, and how a sender is written."""

    @unittest.skipUnless(ipv6_works(), "no IPv6 on this machine")
    def test_localhost_reaches_it_whichever_family_that_is(self) -> None:
        for address in ("0.0.0.0", "127.0.0.1", "::"):
            with self.subTest(address):
                listener = self.listen(address)
                before = self.store.counters().received
                self.send(datagram(engine_id=address + "4"), host="127.0.0.1")
                self.send(datagram(engine_id=address + "6"), host="::1")
                self.assertEqual(self.take_all(listener).received - before, 2)

    @unittest.skipUnless(ipv6_works(), "no IPv6 on this machine")
    def test_an_ipv6_address_takes_ipv6(self) -> None:
        listener = self.listen("::1")
        self.send(datagram(), host="::1")
        self.assertEqual(self.take_all(listener).accepted, 1)
        self.assertRegex(self.store.views()[0].source, r"^\[::1\]:\d+$")


class Errors(ListenerCase):
    """What receiving meets besides datagrams ends nothing that can go on, and never in a traceback."""

    def failing(self, listener: UdpListener, *errors: int) -> contextlib.AbstractContextManager[object]:
        effects = [OSError(number, os.strerror(number)) for number in errors]
        receiver = next(iter(listener._receivers.values()))
        return mock.patch.object(receiver, "receive", side_effect=effects)

    def test_an_error_that_passes_loses_nothing(self) -> None:
        listener = self.listen()
        self.send(datagram())
        with self.failing(listener, errno.ENOBUFS), self.assertLogs("elrar.listener", "WARNING") as logged:
            self.assertEqual(listener.step(0), 0)
            listener._say()
        self.assertIn("No buffer space", logged.output[0])
        self.assertEqual(self.take_all(listener).received, 1)

    def test_errors_now_and_then_are_no_end(self) -> None:
        listener = self.listen()
        with mock.patch("udp_listener.MEND_TIMEOUT_S", 0.0), self.assertLogs("elrar.listener", "WARNING"):
            for number in range(3):
                self.send(datagram(timestamp_ms=number))
                with self.failing(listener, errno.ENOMEM):
                    listener.step(0)
                self.assertEqual(listener.step(0), 1)

    def test_errors_that_last_end_it_with_a_sentence(self) -> None:
        listener = self.listen()
        self.send(datagram())
        with (
            mock.patch("udp_listener.MEND_TIMEOUT_S", 0.0),
            self.failing(listener, errno.ENOMEM, errno.ENOMEM),
            self.assertLogs("elrar.listener", "WARNING"),
            self.assertRaisesRegex(SocketLost, "Cannot allocate memory"),
        ):
            listener.step(0)
            listener.step(0)

    def test_a_destroyed_socket_is_bound_anew_and_counts_on(self) -> None:
        listener = self.listen(receive_buffer=2304)
        self.send(*(datagram(timestamp_ms=number) for number in range(200)))
        with self.assertLogs("elrar.listener", "WARNING"):
            self.take_all(listener)
        dropped = listener.kernel_dropped()
        fd, sock = next(iter(listener._sockets.items()))
        with mock.patch.dict(listener._bound, {fd: sock.getsockname()}):
            with socket.socket(sock.family, sock.type) as unbound:  # what a destroyed socket without a set port is
                os.dup2(unbound.fileno(), fd)
            listener._drops_seen[fd] = 0
            with self.failing(listener, errno.ECONNABORTED):
                listener._mend(fd, OSError(errno.ECONNABORTED, "aborted"))
        self.send(datagram(engine_id="after"))
        self.take_all(listener)
        self.assertIsNotNone(self.store.view("after"))
        self.assertEqual(listener.kernel_dropped(), dropped)


class KernelBuffer(ListenerCase):
    """What the kernel drops shows, and what it grants is read back."""

    def test_what_the_kernel_drops_is_counted(self) -> None:
        listener = self.listen(receive_buffer=2304)
        if listener.kernel_dropped() is None:
            self.skipTest("this kernel has no account of it")
        self.assertEqual(listener.kernel_dropped(), 0)
        sent = 500
        self.send(*(datagram(timestamp_ms=number) for number in range(sent)))
        with self.assertLogs("elrar.listener", "WARNING") as logged:
            counters = self.take_all(listener)
        self.assertIn("the kernel dropped datagrams", logged.output[0])
        self.assertIn("RECEIVE_BUFFER", logged.output[0])
        self.assertLess(counters.received, sent)
        self.assertEqual(counters.received + (listener.kernel_dropped() or 0), sent)


class Draining(ListenerCase):
    """The reaper learns how far the listener has come, so that nobody is removed while its datagrams wait."""

    def test_an_emptied_socket_is_said_with_the_time_of_the_look(self) -> None:
        listener = self.listen()
        self.send(datagram())
        self.take_all(listener)
        self.clock.move(6.1)
        self.assertEqual(self.store.sweep(), 0)
        listener.step(0)
        self.assertEqual(self.store.sweep(), 1)

    def test_while_datagrams_wait_nobody_is_removed(self) -> None:
        listener = self.listen(receive_buffer=8 << 20)
        self.send(datagram(engine_id="patient"))
        self.take_all(listener)
        self.send(*(datagram(timestamp_ms=number) for number in range(BATCHES_A_STEP * BATCH_DATAGRAMS)))
        self.send(datagram(engine_id="patient", timestamp_ms=1234568000))
        self.clock.move(10)
        listener.step(0)
        self.assertEqual(self.store.sweep(), 0)
        self.take_all(listener)
        self.assertEqual(self.store.sweep(), 0)
        self.assertEqual(self.store.counts(), (2, 2))

    def test_a_socket_that_is_never_empty_does_not_keep_the_dead_for_ever(self) -> None:
        listener = self.listen(receive_buffer=2304)
        self.send(datagram(engine_id="gone"))
        self.take_all(listener)
        listener._buffered_at_most = 3 * BATCH_DATAGRAMS
        removed = 0
        for turn in range(8):
            listener._say_how_far(False, self.clock(), BATCH_DATAGRAMS)
            removed += self.store.sweep()
            self.clock.move(10)
            if turn < 3:
                self.assertEqual(removed, 0)
        self.assertEqual(removed, 1)


class Gathering(unittest.TestCase):
    """States that come in rapid succession are left to gather, and never for long."""

    def test_what_comes_now_and_then_is_not_waited_with(self) -> None:
        for rate in (0.0, 1.0, RAPID_PER_S - 1):
            self.assertEqual(gathering_nap_s(rate, LONGEST_NAP_S, float("inf")), 0.0)

    def test_a_nap_is_the_shorter_the_more_comes_and_is_bounded(self) -> None:
        for longest_s in (LONGEST_NAP_S, PROMPT_NAP_S):
            rates = (RAPID_PER_S, 5000, 10_000, 30_000, 100_000, 1_000_000)
            naps = [gathering_nap_s(rate, longest_s, float("inf")) for rate in rates]
            self.assertEqual(naps, sorted(naps, reverse=True))
            self.assertEqual((naps[0], naps[-1]), (longest_s, SHORTEST_NAP_S))
        self.assertLess(PROMPT_NAP_S, LONGEST_NAP_S)

    def test_what_gathers_has_room_in_the_receive_buffer_however_large_it_is(self) -> None:
        for rate in (RAPID_PER_S, 5000, 100_000, 1_000_000):
            for granted in (2304, 65_536, 212_992, 8 << 20):
                nap_s = gathering_nap_s(rate, LONGEST_NAP_S, granted * 2 / 4 / LARGEST_CHARGE)
                self.assertLessEqual(nap_s * rate * LARGEST_CHARGE, granted * 2 / 4 + 1)


class MovingClock(FakeClock):
    """A clock that has moved on whenever it is looked at."""

    def __call__(self) -> float:
        self.move(2 * RATE_WINDOW_S)
        return self.now


class CatchingUp(ListenerCase):
    """Who asks is shown everything that had arrived before the question, however much the listener gathers."""

    def run_napping(self, listener: UdpListener) -> mock.Mock:
        """Have the listener run, and nap for an hour after whatever it takes; returns what it asks how long."""
        patched = mock.patch("udp_listener.gathering_nap_s", return_value=3600.0)
        how_long = patched.start()
        self.addCleanup(patched.stop)
        thread = threading.Thread(target=listener.run)
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(listener.stop)
        return how_long

    def test_what_has_arrived_is_taken_before_the_answer(self) -> None:
        self.clock = MovingClock()
        listener = self.listen(receive_buffer=8 << 20)
        self.run_napping(listener)
        sent = 0
        for count in (1, 1, BATCH_DATAGRAMS, 3 * BATCHES_A_STEP * BATCH_DATAGRAMS, 1):
            self.send(*(datagram(timestamp_ms=number) for number in range(sent, sent + count)))
            sent += count
            listener.catch_up(DEADLINE_S)
            self.assertEqual(self.store.counters().received, sent)

    def test_naps_are_short_where_somebody_looks_who_does_not_ask_for_that(self) -> None:
        self.clock = MovingClock()
        for prompt, watched, longest_s in (
            (False, False, LONGEST_NAP_S),
            (True, False, PROMPT_NAP_S),
            (False, True, PROMPT_NAP_S),
        ):
            with self.subTest(prompt=prompt, watched=watched):
                if watched:
                    self.store.collect_changes()
                listener = self.listen(prompt=prompt)
                how_long = self.run_napping(listener)
                self.send(datagram())
                wait_until("it to take a nap", lambda asked=how_long: asked.called)  # type: ignore[misc]
                self.assertEqual(how_long.call_args.args[1], longest_s)

    def test_where_nothing_waits_nobody_does(self) -> None:
        listener = self.listen()
        self.send(datagram())
        self.take_all(listener)
        with mock.patch.object(listener, "_caught_up") as waited_for:
            listener.catch_up(DEADLINE_S)
        waited_for.wait.assert_not_called()

    def test_what_is_just_being_taken_is_waited_for(self) -> None:
        listener = self.listen()
        self.send(datagram())
        taken: list[float] = []

        def ask_meanwhile(batch: Batch) -> list[str]:
            self.assertEqual(listener._arrived.poll(0), [], "it has left the socket")
            with mock.patch.object(listener, "_caught_up") as waited_for:
                listener.catch_up(0.001)
            waited_for.wait.assert_called()
            taken.append(batch.received_at)
            return []

        with mock.patch.object(self.store, "apply", ask_meanwhile):
            listener.step(0)
        self.assertEqual(len(taken), 1)

    def test_what_leaves_the_socket_during_the_look_is_waited_for(self) -> None:
        listener = self.listen()

        def take_out(timeout_ms: int) -> list[tuple[int, int]]:
            listener._taking = True
            return []

        with mock.patch.object(listener, "_arrived") as arrived:
            arrived.poll.side_effect = take_out
            self.assertFalse(listener._has_taken_all())

    def test_a_listener_that_has_gone_to_wait_meanwhile_is_not_waited_for(self) -> None:
        listener = self.listen()
        with (
            mock.patch.object(listener, "_has_taken_all", side_effect=[False, True]),
            mock.patch.object(listener, "_caught_up") as waited_for,
        ):
            listener.catch_up(DEADLINE_S)
        waited_for.wait.assert_not_called()

    def test_a_listener_that_has_stopped_is_not_waited_for(self) -> None:
        listener = self.listen()
        self.send(datagram())
        listener.stop()
        with mock.patch.object(listener, "_caught_up") as waited_for:
            listener.catch_up(DEADLINE_S)
        waited_for.wait.assert_not_called()

    def test_an_intake_that_cannot_keep_up_is_not_waited_for_for_long(self) -> None:
        listener = self.listen()  # nobody runs it
        self.send(datagram())
        listener.catch_up(0.001)
        self.assertEqual(self.store.counters().received, 0)
        self.assertEqual(self.take_all(listener).received, 1)


for _case in (Datagrams, Sources, Addresses, Errors, KernelBuffer, Draining, CatchingUp):
    _name = f"{_case.__name__}WithThePortableReceiver"
    globals()[_name] = type(_name, (_case,), {"portable": True, "__doc__": _case.__doc__, "__module__": __name__})


class Receivers(unittest.TestCase):
    """Both ways of receiving give the same datagrams with the same addresses."""

    def test_both_take_the_same(self) -> None:
        sizes = [0, 1, 270, MAX_DATAGRAM_BYTES, MAX_DATAGRAM_BYTES + 1, 30_000, *range(BATCH_DATAGRAMS)]
        hosts = {"127.0.0.1": ("127.0.0.1",), "::1": ("::1",), "::": ("::1", "127.0.0.1")}
        for address in hosts if ipv6_works() else ("127.0.0.1",):
            for host in hosts[address]:
                with self.subTest(address=address, host=host), contextlib.ExitStack() as stack:
                    sock = (
                        open_udp_sockets(address, 0, 8 << 20)[0] if address != "127.0.0.1" else self.ipv4_alone(stack)
                    )
                    stack.enter_context(sock)
                    fast = make_receiver(sock)
                    self.assertIsInstance(fast, BatchReceiver if sys.platform == "linux" else PortableReceiver)
                    sender = stack.enter_context(
                        socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
                    )
                    taken = []
                    for receiver in (fast, PortableReceiver(sock)):
                        for size in sizes:
                            sender.sendto(bytes([size % 256]) * size, (host, sock.getsockname()[1]))
                        batches = [receiver.receive() for _ in range(3)]
                        self.assertEqual([len(datagrams) for datagrams, _ in batches], [BATCH_DATAGRAMS, 6, 0])
                        self.assertEqual([len(addresses) for _, addresses in batches], [BATCH_DATAGRAMS, 6, 0])
                        taken.append([(datagrams, list(addresses)) for datagrams, addresses in batches])
                    self.assertEqual(taken[0], taken[1])
                    datagrams, addresses = taken[0][0]
                    self.assertEqual([len(one) for one in datagrams][:6], [0, 1, 270, 8192, 8193, 8193])
                    self.assertEqual(unpack_address(addresses[0]), (host, sender.getsockname()[1]))

    def ipv4_alone(self, stack: contextlib.ExitStack) -> socket.socket:
        sock, *others = open_udp_sockets("127.0.0.1", 0, 8 << 20)
        for other in others:
            stack.enter_context(other)
        return sock

    def test_a_link_local_sender_keeps_its_scope(self) -> None:
        packed = struct.pack("=H", socket.AF_INET6) + struct.pack("!HI16s", 5000, 0, b"\xfe\x80" + bytes(13) + b"\x01")
        host, port = unpack_address(packed + struct.pack("=I", 1))
        self.assertEqual((host, port), (f"fe80::1%{socket.if_indextoname(1)}", 5000))
        self.assertEqual(unpack_address(packed + struct.pack("=I", 99999))[0], "fe80::1%99999")

    def test_without_recvmmsg_the_portable_one_is_made(self) -> None:
        with contextlib.ExitStack() as stack:
            sock = stack.enter_context(self.ipv4_alone(stack))
            with mock.patch("udp_receiver.ctypes", None):
                self.assertIsInstance(make_receiver(sock), PortableReceiver)
            with mock.patch("udp_receiver.sys.platform", "darwin"):
                self.assertIsInstance(make_receiver(sock), PortableReceiver)
            with mock.patch.object(BatchReceiver, "is_allowed", return_value=False):
                self.assertIsInstance(make_receiver(sock), PortableReceiver)

    @unittest.skipUnless(sys.platform == "linux", "recvmmsg is Linux's")
    def test_asking_whether_recvmmsg_is_allowed_takes_nothing(self) -> None:
        with contextlib.ExitStack() as stack:
            sock = stack.enter_context(self.ipv4_alone(stack))
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sending:
                sending.sendto(b"waits", sock.getsockname())
            receiver = BatchReceiver(sock)
            self.assertTrue(receiver.is_allowed())
            self.assertEqual(receiver.receive()[0], [b"waits"])
            with mock.patch.object(receiver, "_recvmmsg", return_value=-1):
                self.assertFalse(receiver.is_allowed())


if __name__ == "__main__":
    unittest.main()
