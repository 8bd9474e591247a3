"""Which sources are one sender of this host."""

from __future__ import annotations

import unittest

from own_addresses import is_one_sender, is_own_address
from tests.harness import ipv6_works


class Senders(unittest.TestCase):
    """The same port of two of this host's addresses is one sender; anything else is not."""

    def test_the_loopbacks_are_this_host_s(self) -> None:
        self.assertTrue(is_own_address("127.0.0.1"))
        self.assertTrue(is_own_address("127.0.0.2"))
        self.assertEqual(is_own_address("::1"), ipv6_works())
        for host in ("192.0.2.1", "2001:db8::1", "", "host", "1.2.3"):
            self.assertFalse(is_own_address(host) and bool(host), host)

    def test_the_port_and_both_addresses_count(self) -> None:
        self.assertTrue(is_one_sender(b'"127.0.0.1:4000"', b'"127.0.0.2:4000"'))
        self.assertFalse(is_one_sender(b'"127.0.0.1:4000"', b'"127.0.0.2:4001"'))
        self.assertFalse(is_one_sender(b'"127.0.0.1:4000"', b'"192.0.2.1:4000"'))
        self.assertEqual(is_one_sender(b'"127.0.0.1:4000"', b'"[::1]:4000"'), ipv6_works())


if __name__ == "__main__":
    unittest.main()
