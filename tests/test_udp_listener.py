"""From the socket to the store and the log: real datagrams on loopback, the listener's step called by hand."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import re
import socket
import threading
import unittest
from typing import Any
from unittest import mock

from engine_state import MAX_DATAGRAM_BYTES, REASONS
from intake_progress import LOW_LATENCY_DELAY_S, MAX_DELAY_S, RATE_WINDOW_S
from sockets import SocketLost, open_udp_sockets
from state_log import StateLog
from state_store import Batch, StateStore
from tests.harness import DEADLINE_S, FakeClock, FolderCase, datagram, heartbeat, ipv6_works, logged_states, wait_until
from tests.test_engine_state import INVALID, VALID
from udp_listener import MAX_BATCHES_PER_STEP, UdpListener, is_allowed
from udp_receiver import MAX_BATCH_DATAGRAMS, PortableReceiver


class ListenerCase(FolderCase):
    log: StateLog
    portable = False

    def setUp(self) -> None:
        super().setUp()
        if self.portable:
            patched = mock.patch("udp_listener.make_receiver", PortableReceiver)
            patched.start()
            self.addCleanup(patched.stop)
        self.log_path = self.folder / "states.jsonl"
        self.clock = FakeClock()
        self.store = StateStore(2000, 6000, 1000, 10, clock=self.clock)

    def listen(
        self, address: str = "127.0.0.1", *allowed: str, receive_buffer: int = 1 << 20, low_latency: bool = False
    ) -> UdpListener:
        sockets = open_udp_sockets(address, 0, receive_buffer)
        self.port = sockets[0].getsockname()[1]
        if hasattr(self, "log"):
            self.log.close_descriptors()  # as a gateway that has stopped
        self.log = StateLog(str(self.log_path), 0, 1)
        self.log.open("gateway_started", "network mode: unicast, test")
        self.addCleanup(self.log.close_descriptors)
        listener = UdpListener(
            sockets,
            self.store,
            self.log,
            allowed_sources=[ipaddress.ip_network(network) for network in allowed],
            low_latency=low_latency,
            clock=self.clock,
        )
        self.addCleanup(listener.close)
        return listener

    def send(self, *datagrams: bytes, host: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            for one in datagrams:
                sock.sendto(one, (host, self.port))

    def take_all(self, listener: UdpListener) -> dict[str, Any]:
        """Take what waits in the sockets; loopback delivers before `sendto` returns."""
        while listener.step(0):
            pass
        listener.flush_notices()
        self.log.step()
        return self.store.counters()

    def assert_adds_up(self, counters: dict[str, Any]) -> None:
        rejected = counters["invalid_states"] + counters["rejected_capacity"] + counters["rejected_source"]
        self.assertEqual(counters["total_received"], counters["valid_states"] + rejected)
        self.assertEqual(len(logged_states(self.log_path)), counters["valid_states"] - counters["duplicates"])


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
                    self.assertEqual(counters["invalid_reasons"], expected)
                    self.assertEqual(counters["accepted"], number + 1)
                    self.assert_adds_up(counters)
        self.assertEqual(len(logged.records), 1, "more than one line in a minute of the clock")
        self.assertEqual([view.state.engine_id for view in self.store.views()], ["good"])

    def test_count_of_unshown(self) -> None:
        """How many were not shown is said, though no more come."""
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
        self.assertEqual(counters["total_received"], len(VALID))
        self.assertEqual(counters["invalid_states"], 0)
        self.assert_adds_up(counters)

    def test_a_longer_datagram_is_never_taken_for_its_beginning(self) -> None:
        listener = self.listen()
        whole = datagram()
        for size in (MAX_DATAGRAM_BYTES + 1, 20_000, 65_507):
            self.send(whole + b" " * (size - len(whole)))
        self.send(whole + b" " * (MAX_DATAGRAM_BYTES - len(whole)))
        with self.assertLogs("elrar.listener"):
            counters = self.take_all(listener)
        self.assertEqual((counters["invalid_reasons"]["too_large"], counters["accepted"]), (3, 1))

    def test_a_log_line_for_each_state_but_not_for_its_copies(self) -> None:
        listener = self.listen()
        self.send(*[datagram(timestamp_ms=1000)] * 3, datagram(timestamp_ms=900), heartbeat(timestamp_ms=1100))
        counters = self.take_all(listener)
        outcomes = [counters[name] for name in ("accepted", "duplicates", "out_of_order", "heartbeats")]
        self.assertEqual(outcomes, [1, 2, 1, 1])
        self.assertEqual([state["timestamp_ms"] for state in logged_states(self.log_path)], [1000, 900, 1100])

    def test_more_than_a_batch_is_taken_in_order(self) -> None:
        listener = self.listen(receive_buffer=8 << 20)
        count = 3 * MAX_BATCH_DATAGRAMS + 5
        self.send(*(datagram(timestamp_ms=number) for number in range(count)))
        self.assertEqual(listener.step(0), count)
        counters = self.take_all(listener)
        self.assertEqual(counters["accepted"], count)
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
        self.assertEqual(self.take_all(listener)["accepted"], 1)

    def test_who_is_not_is_rejected_whatever_was_sent(self) -> None:
        listener = self.listen("127.0.0.1", "10.0.0.0/8")
        with self.assertLogs("elrar.listener", "WARNING"):
            self.send(datagram(), b"junk")
            counters = self.take_all(listener)
        self.assertEqual((counters["rejected_source"], counters["invalid_states"], counters["accepted"]), (2, 0, 0))
        self.assertEqual(self.store.views(), [])

    def test_mapped_ipv4_sender(self) -> None:
        """An IPv4 sender on an IPv6 socket is in its IPv4 network."""
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
        self.assertEqual((counters["accepted"], counters["rejected_source"]), (1, 1))
        self.assertEqual([view.source.rpartition(":")[0] for view in self.store.views()], ["127.0.0.1"])


class Addresses(ListenerCase):
    """What is listened on, and how a sender is written."""

    @unittest.skipUnless(ipv6_works(), "no IPv6 on this machine")
    def test_localhost_reaches_it_whichever_family_that_is(self) -> None:
        for address in ("0.0.0.0", "127.0.0.1", "::"):
            with self.subTest(address):
                listener = self.listen(address)
                before = self.store.counters()["total_received"]
                self.send(datagram(engine_id=address + "4"), host="127.0.0.1")
                self.send(datagram(engine_id=address + "6"), host="::1")
                self.assertEqual(self.take_all(listener)["total_received"] - before, 2)

    @unittest.skipUnless(ipv6_works(), "no IPv6 on this machine")
    def test_an_ipv6_address_takes_ipv6(self) -> None:
        listener = self.listen("::1")
        self.send(datagram(), host="::1")
        self.assertEqual(self.take_all(listener)["accepted"], 1)
        self.assertRegex(self.store.views()[0].source, r"^\[::1\]:\d+$")


class Errors(ListenerCase):
    """What receiving meets besides datagrams ends nothing that can go on, and never in a traceback."""

    def failing(self, listener: UdpListener, *errors: int) -> contextlib.AbstractContextManager[object]:
        effects = [OSError(number, os.strerror(number)) for number in errors]
        inlet = next(iter(listener._inlets.values()))
        return mock.patch.object(inlet.receiver, "receive", side_effect=effects)

    def test_an_error_that_passes_loses_nothing(self) -> None:
        listener = self.listen()
        self.send(datagram())
        with self.failing(listener, errno.ENOBUFS), self.assertLogs("elrar.listener", "WARNING") as logged:
            self.assertEqual(listener.step(0), 0)
            listener.flush_notices()
        self.assertIn("No buffer space", logged.output[0])
        self.assertEqual(self.take_all(listener)["total_received"], 1)

    def test_errors_now_and_then_are_no_end(self) -> None:
        listener = self.listen()
        with mock.patch("udp_listener.MEND_TIMEOUT_S", 0.0):
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
        inlet = next(iter(listener._inlets.values()))
        real_getsockname = socket.socket.getsockname
        destroyed = [("0.0.0.0", 0)]  # what the kernel says of the address of one that was bound to any free port

        def getsockname(sock: socket.socket) -> object:
            return destroyed.pop() if sock is inlet.sock and destroyed else real_getsockname(sock)

        with self.failing(listener, errno.ECONNABORTED), mock.patch.object(socket.socket, "getsockname", getsockname):
            self.send(datagram())
            listener.step(0)
        self.assertEqual(inlet.sock.getsockname(), inlet.name)
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
        self.assertLess(counters["total_received"], sent)
        self.assertEqual(counters["total_received"] + (listener.kernel_dropped() or 0), sent)


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
        self.send(*(datagram(timestamp_ms=number) for number in range(MAX_BATCHES_PER_STEP * MAX_BATCH_DATAGRAMS)))
        self.send(datagram(engine_id="patient", timestamp_ms=1234568000))
        self.clock.move(10)
        listener.step(0)
        self.assertEqual(self.store.sweep(), 0)
        self.take_all(listener)
        self.assertEqual(self.store.sweep(), 0)
        self.assertEqual(self.store.counts(), (2, 2))


class MovingClock(FakeClock):
    """A clock that has moved on whenever it is looked at."""

    def __call__(self) -> float:
        self.move(2 * RATE_WINDOW_S)
        return self.now


class CatchingUp(ListenerCase):
    """Who asks is shown everything that had arrived before the question, however long the listener lets it wait."""

    def run_delayed(self, listener: UdpListener) -> mock.Mock:
        """Have the listener run, and wait for an hour after whatever it takes; returns what it asks how long."""
        patched = mock.patch("intake_progress.coalescing_delay_s", return_value=3600.0)
        how_long = patched.start()
        self.addCleanup(patched.stop)
        thread = threading.Thread(target=listener.run, daemon=True)
        thread.start()
        self.addCleanup(thread.join, DEADLINE_S)
        self.addCleanup(listener.stop)
        return how_long

    def test_what_has_arrived_is_taken_before_the_answer(self) -> None:
        self.clock = MovingClock()
        listener = self.listen(receive_buffer=8 << 20)
        self.run_delayed(listener)
        sent = 0
        for count in (1, 1, MAX_BATCH_DATAGRAMS, 3 * MAX_BATCHES_PER_STEP * MAX_BATCH_DATAGRAMS, 1):
            self.send(*(datagram(timestamp_ms=number) for number in range(sent, sent + count)))
            sent += count
            listener.catch_up(DEADLINE_S)
            self.assertEqual(self.store.counters()["total_received"], sent)

    def test_delays_are_short_for_readers_who_do_not_ask(self) -> None:
        self.clock = MovingClock()
        for low_latency, impatient, longest_s in (
            (False, None, MAX_DELAY_S),
            (True, None, LOW_LATENCY_DELAY_S),
            (False, False, MAX_DELAY_S),
            (False, True, LOW_LATENCY_DELAY_S),
        ):
            with self.subTest(low_latency=low_latency, impatient=impatient):
                if impatient is not None:
                    self.store.collect_changes(impatient=impatient)
                listener = self.listen(low_latency=low_latency)
                how_long = self.run_delayed(listener)
                self.send(datagram())
                wait_until("it to wait", lambda asked=how_long: asked.called)  # type: ignore[misc]
                self.assertEqual(how_long.call_args.args[1], longest_s)

    def test_what_is_just_being_taken_is_waited_for(self) -> None:
        listener = self.listen()
        self.send(datagram())
        asked: list[bool] = []

        def ask_meanwhile(batch: Batch) -> list[str]:
            listener.catch_up(0.001)
            asked.append(listener._barrier.is_requested)
            return []

        with mock.patch.object(self.store, "apply", ask_meanwhile):
            listener.step(0)
        self.assertEqual(asked, [True])

    def test_a_listener_that_has_stopped_is_not_waited_for(self) -> None:
        listener = self.listen()
        self.send(datagram())
        listener.stop()
        listener.catch_up(DEADLINE_S)


class DatagramsByThePortableReceiver(Datagrams):
    """The same where there is no recvmmsg."""

    portable = True


if __name__ == "__main__":
    unittest.main()
