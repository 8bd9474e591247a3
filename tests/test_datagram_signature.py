"""A signature is right to the last bit, or refused with its reason, and no stranger's datagram gets further."""

from __future__ import annotations

import hmac
import random
import unittest

from datagram_signature import (
    BAD_SIGNATURE,
    SIGNATURE_REASONS,
    UNKNOWN_KEY,
    UNSIGNED,
    SignatureCheck,
)
from engine_agent import DatagramWriter, Key, Load
from signing_keys import SigningKey

SECRET, OTHER = b"0123456789abcdef", b"fedcba9876543210" * 4
BODY = b'{"engine_id": "e", "boot": "b", "seq": 1'


def signed(body: bytes, key_id: bytes = b"k1", secret: bytes = SECRET) -> bytes:
    code = hmac.digest(secret, body, "sha256").hex()[:32].encode()
    return body + b', "sig": "' + key_id + b":" + code + b'"}'


class Signatures(unittest.TestCase):
    def setUp(self) -> None:
        self.keys = {key_id: SigningKey(key_id, secret, None) for key_id, secret in ((b"k1", SECRET), (b"k-2_", OTHER))}
        self.checks = SignatureCheck(self.keys)

    def check(self, datagram: bytes) -> SigningKey | str:
        (found,), (signature,) = self.checks.check([datagram])
        if not isinstance(found, str):
            self.assertEqual(datagram[-2 - len(signature) : -2], signature)
            self.assertTrue(signature.startswith(found.key_id + b":"))
        return found

    def test_right_ones(self) -> None:
        for key_id, secret in ((b"k1", SECRET), (b"k-2_", OTHER)):
            for body in (BODY, b"", b"{", BODY * 200, '{"ä": ", \\"sig\\": '.encode()):
                self.assertIs(self.check(signed(body, key_id, secret)), self.keys[key_id])

    def test_what_the_agent_signs(self) -> None:
        """The sender and this side were written apart from each other."""
        writer = DatagramWriter("http://10.0.0.1:8000", model="m", key=Key("k-2_", OTHER))
        for phase in ("starting", "serving", "gone"):
            datagram = writer.write(phase, 1795372894782, Load())
            self.assertIs(self.check(datagram), self.keys[b"k-2_"])

    def test_a_change_of_any_bit(self) -> None:
        datagram = signed(BODY)
        for place in range(len(datagram)):
            for bit in range(8):
                changed = bytearray(datagram)
                changed[place] ^= 1 << bit
                self.assertIn(self.check(bytes(changed)), (UNSIGNED, UNKNOWN_KEY, BAD_SIGNATURE), bytes(changed))

    def test_a_cut_at_any_byte(self) -> None:
        datagram = signed(BODY)
        for end in range(len(datagram)):
            self.assertEqual(self.check(datagram[:end]), UNSIGNED)
        for start in range(1, len(datagram)):
            self.assertIn(self.check(datagram[start:]), (UNSIGNED, BAD_SIGNATURE))

    def test_how_it_is_written(self) -> None:
        """Exactly so: where it could be read in another way, it is not there."""
        datagram = signed(BODY)
        code = datagram[-34:-2]
        self.assertNotEqual(code, code.upper())
        for wrong in (
            datagram + b" ", datagram + b"\n", datagram + b"}", datagram + b"\0", datagram[:-1], datagram[:-2] + b'" }',
            BODY + b',"sig": "k1:' + code + b'"}', BODY + b', "sig":"k1:' + code + b'"}',
            BODY + b', "sig": "k1:' + code.upper() + b'"}', BODY + b', "sig": "k1:' + code + b'0"}',
            BODY + b', "sig": "k1:' + code[:-1] + b'"}', BODY + b', "sig": "k1' + code + b'"}',
            BODY + b', "sig": ":' + code + b'"}', BODY + b', "sig": "k 1:' + code + b'"}',
            BODY + b', "sig": "k1::' + code + b'"}', BODY + b', "SIG": "k1:' + code + b'"}',
            BODY + b', "sig": "' + b"k" * 33 + b":" + code + b'"}', BODY + b', "sig": "k1:' + code + b'", "a": 1}',
            b'{"sig": "k1:' + code + b'", ' + BODY[1:] + b"}", BODY + b"}", b"", b"}", b'"}', code,
            b"\xff" * 8193, datagram.decode().encode("utf-16"),
        ):  # fmt: skip
            self.assertEqual(self.check(wrong), UNSIGNED, wrong)

    def test_a_line_break(self) -> None:
        """It would make two lines of one in the log, wherever JSON allows it."""
        for line_break in (b"\n", b"\r", b"\r\n"):
            self.assertEqual(self.check(signed(BODY.replace(b", ", b"," + line_break))), UNSIGNED)

    def test_unknown_keys_and_other_keys(self) -> None:
        self.assertEqual(self.check(signed(BODY, b"k3")), UNKNOWN_KEY)
        self.assertEqual(self.check(signed(BODY, b"K1")), UNKNOWN_KEY)
        self.assertEqual(self.check(signed(BODY, b"k1", OTHER)), BAD_SIGNATURE)
        self.assertEqual(self.check(signed(BODY, b"k-2_", SECRET)), BAD_SIGNATURE)
        self.assertEqual(self.check(signed(BODY) + signed(b"")), BAD_SIGNATURE)

    def test_one_signature_behind_another(self) -> None:
        """The last one counts, over all before it."""
        self.assertEqual(self.check(signed(signed(BODY), b"k1", OTHER)), BAD_SIGNATURE)
        self.assertIs(self.check(signed(signed(BODY)[:-1], b"k-2_", OTHER)), self.keys[b"k-2_"])

    def test_junk(self) -> None:
        """Random bytes, and random bytes that end as a signature does."""
        chance = random.Random(16)
        for _ in range(3000):
            junk = chance.randbytes(chance.randrange(200))
            self.assertEqual(self.check(junk), UNSIGNED)
            tail = b', "sig": "k1:' + chance.randbytes(16).hex().encode() + b'"}'
            self.assertIn(self.check(junk + tail), (BAD_SIGNATURE, UNSIGNED))  # a line break may be in it

    def test_keys_are_replaced(self) -> None:
        self.checks.keys = {b"k1": SigningKey(b"k1", OTHER, None)}
        self.assertEqual(self.check(signed(BODY)), BAD_SIGNATURE)
        self.assertEqual(self.check(signed(BODY, b"k-2_", OTHER)), UNKNOWN_KEY)
        self.assertIs(self.check(signed(BODY, b"k1", OTHER)), self.checks.keys[b"k1"])

    def test_many_at_once(self) -> None:
        """Each is judged by itself, also beside one with a line break."""
        broken = signed(BODY.replace(b", ", b",\n"))
        found, signatures = self.checks.check([signed(BODY), b"", broken, signed(BODY), signed(BODY, b"k3")])
        self.assertEqual(found, [self.keys[b"k1"], UNSIGNED, UNSIGNED, self.keys[b"k1"], UNKNOWN_KEY])
        self.assertEqual(signatures[0], signatures[3])
        self.assertEqual(self.checks.check([]), ([], []))

    def test_the_reasons_are_in_order(self) -> None:
        self.assertEqual(
            list(SIGNATURE_REASONS),
            [
                "unsigned", "unknown_key", "bad_signature",
                "not_its_engine", "no_sequence", "clock", "replayed", "too_many_boots",
            ],
        )  # fmt: skip


if __name__ == "__main__":
    unittest.main()
