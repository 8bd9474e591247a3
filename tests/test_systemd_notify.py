"""Under systemd: what the service manager is told, and when."""

from __future__ import annotations

import os
import signal
import socket
import sys
import unittest

import gateway
from config import read_config
from systemd_notify import SystemdNotify
from tests.harness import DEADLINE_S, datagram, gateway_command, wait_until
from tests.test_process import ProcessCase


class Systemd(ProcessCase):
    """Under systemd it says when it is ready, alive, reloading and stopping; where it is not alive, nothing."""

    def notified(self, address: str) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(address.replace("@", "\0"))
            manager.settimeout(DEADLINE_S)

            def told() -> list[str]:
                return manager.recv(4096).decode().splitlines()

            def told_more() -> list[str]:
                """What is not that it lives."""
                said: list[str] = wait_until("more", lambda: (lines := told()) != ["WATCHDOG=1"] and lines)
                return said

            running = self.start(("env", f"NOTIFY_SOCKET={address}", "WATCHDOG_USEC=30000", *gateway_command()))
            ready, status = told()
            self.assertEqual(ready, "READY=1")
            self.assertRegex(status, "^STATUS=network mode: unicast, UDP 127.0.0.1:[0-9]+")
            for _ in range(3):
                self.assertEqual(told(), ["WATCHDOG=1"])
            running.signal(signal.SIGHUP)
            lines = told_more()
            self.assertEqual(lines[0], "RELOADING=1")
            self.assertRegex(lines[1], "^MONOTONIC_USEC=[0-9]+$")
            self.assertEqual(told()[0], "READY=1")
            self.assertEqual(running.stop(), 0)
            lines = told_more()
            self.assertEqual(lines, ["STOPPING=1", "STATUS=stopping, SIGTERM"])

    def test_through_a_socket_with_a_path(self) -> None:
        self.notified(str(self.folder / "notify"))

    @unittest.skipUnless(sys.platform == "linux", "abstract sockets are Linux's")
    def test_through_an_abstract_socket(self) -> None:
        self.notified(f"@elrar-test-{os.getpid()}")

    def test_a_socket_that_is_not_there_is_no_reason_to_stop(self) -> None:
        nowhere = f"NOTIFY_SOCKET={self.folder / 'none'}"
        running = self.start(("env", nowhere, "WATCHDOG_USEC=30000", *gateway_command())).wait_ready()
        running.send(datagram())
        running.wait_received(1)
        self.assertEqual(running.stop(), 0)

    def test_a_stuck_thread_is_not_called_alive(self) -> None:
        told: list[str] = []
        threads = {"udp-listener": True}

        class Manager(SystemdNotify):
            def _tell(self, message: str, level_of_failure: int = 0) -> None:
                told.append(message)
                threads["udp-listener"] = False  # from the first sign of life on

        class Exits:
            turns = 0

            def wait(self, timeout_s: float | None) -> set[str]:
                self.turns += 1
                return {"SIGTERM"} if self.turns > 20 else set()

        class StuckGateway:
            config = read_config({})

            def threads(self) -> dict[str, bool]:
                return threads

        manager = Manager({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "1"})
        gateway._wait_for_exit(StuckGateway(), Exits(), manager)  # type: ignore[arg-type]
        self.assertEqual(told, ["WATCHDOG=1"])

    def test_that_nobody_was_told_is_a_warning_once(self) -> None:
        manager = SystemdNotify({"NOTIFY_SOCKET": str(self.folder / "none")})
        with self.assertLogs("elrar.systemd", "WARNING") as said:
            manager.ready("here")
            manager.alive()
        self.assertEqual(len(said.output), 1)

    def test_only_what_is_meant_for_it_is_minded(self) -> None:
        for environ, period_s in (
            ({}, None),
            ({"WATCHDOG_USEC": "3000000"}, None),
            ({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "3000000"}, 1.0),
            ({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 1.0),
            ({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
            ({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "0"}, None),
            ({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "x"}, None),
            ({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "9" * 400}, None),
        ):
            with self.subTest(environ):
                self.assertEqual(SystemdNotify(environ).watchdog_period_s, period_s)


if __name__ == "__main__":
    unittest.main()
