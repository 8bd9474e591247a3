"""What is asked of a path: parameters are decoded as a browser means them, whatever it costs a stranger to write."""

from __future__ import annotations

import random
import time
import unittest
from urllib.parse import quote, unquote_plus

from http_message import QueryError
from query_route import MAX_PARAMETERS, Question, Route, decode, listed, parse_query

ROUTE = Route("/x", lambda *_: None, "", ("engine_id", "status"))


class Parameters(unittest.TestCase):
    """A query is split at what stands there unescaped, and nothing that is escaped is taken for that."""

    def assert_refused(self, query: str, *words: str) -> None:
        with self.assertRaises(QueryError) as refused:
            parse_query(query, ROUTE)
        self.assertEqual(refused.exception.status, 400)
        for word in words:
            self.assertIn(word, str(refused.exception))

    def test_as_browsers_write_them(self) -> None:
        for query, parameters in (
            ("", {}),
            ("&&", {}),
            ("status", {"status": [""]}),
            ("status=a=b=&status=c", {"status": ["a=b=", "c"]}),
            ("status=a+b%2Bc%20d", {"status": ["a b+c d"]}),
            ("%73tatus=%26%3d%25&engine_id=%E5%BC%95", {"status": ["&=%"], "engine_id": ["引"]}),
            ("status=引&engine%5Fid=%5Cx41\\x41\\u0041", {"status": ["引"], "engine_id": ["\\x41\\x41\\u0041"]}),
            ("status=\x7f\xff\xfe", {"status": ["\x7f\xff\xfe"]}),
        ):
            with self.subTest(query):
                self.assertEqual(parse_query(query, ROUTE), parameters)

    def test_what_is_none(self) -> None:
        self.assert_refused("staus=live", "/x", "engine_id and status")
        self.assert_refused("=live", "unknown")
        self.assert_refused("status%3Dlive", "unknown")
        self.assert_refused("status=%zz", "%25")
        self.assert_refused("status=%4", "%25")
        for no_utf_8 in ("%FF", "%fe", "%c3", "a%80", "%ed%a0%80", "%C3&status=%A9", "%C3=%A9"):
            with self.subTest(no_utf_8):
                self.assert_refused(f"status={no_utf_8}", "UTF-8")
        self.assert_refused("&" * MAX_PARAMETERS, str(MAX_PARAMETERS))

    def test_any_text_survives(self) -> None:
        """Quoted by the standard library, fully or hardly, each is read as it was."""
        rng = random.Random(20261126)
        alphabet = "a%&=+;\\/x4 1\n\x00\x7f\xff\u0100引😀"
        for _ in range(3000):
            text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(12)))
            query = "status=" + quote(text, safe=rng.choice(("", "/;\\\x7f=", "\u0100引")))
            self.assertEqual(parse_query(query, ROUTE)["status"], [unquote_plus(query.partition("=")[2])])
            self.assertEqual(parse_query(query, ROUTE)["status"], [text])
            self.assertEqual(decode(quote(text, safe="")), text)

    def test_no_way_of_writing_a_query_is_dear(self) -> None:
        """A request line full of escapes, in names or values, takes little longer than one without any."""

        def seconds(query: str) -> float:
            best = float("inf")
            for _ in range(7):
                begin = time.thread_time()
                parse_query(query, ROUTE)
                best = min(best, time.thread_time() - begin)
            return best

        for one in ("%65ngine_id=%41&", "engine_id=%41&", "%65%6E%67ine_id=+&", "engine_id=&", "%73tatus=\\&"):
            with self.subTest(one):
                query = one * (8100 // len(one))
                for attempt in range(4):  # the machine may have been busy elsewhere
                    if seconds(query) < (3 + attempt) * seconds("engine_id=a&" * 670):
                        break
                else:
                    self.fail(f"{seconds(query) * 1e6:.0f} us")


class Asked(unittest.TestCase):
    """What is asked with the parameters, or why it is no question."""

    def assert_refused(self, ask: object) -> None:
        assert callable(ask)
        with self.assertRaises(QueryError) as refused:
            ask()
        self.assertEqual(refused.exception.status, 400)

    def test_engine_ids(self) -> None:
        self.assertEqual(Question({"engine_id": ["b", "a", "b"]}).engine_ids(), ("b", "a"))
        self.assertEqual(Question({}).engine_ids(), ())
        self.assert_refused(Question({"engine_id": ["a", ""]}).engine_ids)

    def test_exactly_one_engine(self) -> None:
        self.assertEqual(Question({"engine_id": ["a"]}).engine_id(), "a")
        for none in ({}, {"engine_id": ["a", "a"]}, {"engine_id": [""]}):
            self.assert_refused(Question(none).engine_id)

    def test_since(self) -> None:
        self.assertEqual(Question({}).since_ms(), 0)
        self.assertEqual(Question({"since": [str(2**53)]}).since_ms(), 2**53)
        for none in (["-1"], ["1", "2"], [""], ["１"], [str(2**53 + 1)], ["1e3"]):
            self.assert_refused(Question({"since": none}).since_ms)

    def test_one_of_a_few(self) -> None:
        self.assertEqual(Question({"engines": ["no"]}).among("engines", ("yes", "no")), ["no"])
        self.assert_refused(lambda: Question({"engines": ["no", "No"]}).among("engines", ("yes", "no")))

    def test_names_in_a_sentence(self) -> None:
        self.assertEqual([listed("a"), listed("ab"), listed("abc", "or")], ["a", "a and b", "a, b or c"])


if __name__ == "__main__":
    unittest.main()
