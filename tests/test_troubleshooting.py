"""docs/troubleshooting.md: whatever the gateway warns of, or refuses to start for, is on the page in its own words."""

from __future__ import annotations

import ast
import re
import unittest
from collections.abc import Iterator

from query_server import REJECTIONS
from tests.documents import code, prose, read, rows, twin
from tests.harness import TOP

PAGE = "docs/troubleshooting.md"
OF_THEIR_OWN = ("engine_agent.py", "engine_table.py", "gateway_archive.py")  # programs with words of their own
LOGGED = ("warning", "error", "critical")


def literal(node: ast.expr) -> str:
    """A text with a hole for each thing that is put in; nothing for what is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[.0-9]*[a-z]", "\0", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)  # type: ignore[misc]
    return ""


def said(path: str) -> Iterator[str]:
    """Each line above INFO that a module logs, by its first words; and what is said of what could not be had."""
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.Call) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in LOGGED and ast.unparse(node.func).startswith("logger."):
                yield literal(node.args[0])
            elif name == "LogThrottle" and ast.unparse(node.args[1]) in ("logging.WARNING", "logging.ERROR"):
                yield literal(node.args[2])
            elif name in ("warn_of", "_complain"):
                yield literal(node.args[0])
        elif path == "start_errors.py" and isinstance(node, ast.Constant | ast.JoinedStr):
            text = literal(node)
            if text.startswith("cannot "):
                yield text


class Page(unittest.TestCase):
    """Who searches the page for what he reads in the log finds it."""

    def test_whatever_is_warned_of_is_there(self) -> None:
        named = [one for one in code(prose(PAGE)) if " " in one]
        told: set[str] = set()
        for path in sorted(path.name for path in TOP.glob("*.py") if path.name not in OF_THEIR_OWN):
            for text in said(path):
                if re.search("[a-z]{2} [a-z]{2}", text):  # and not only what is put together elsewhere
                    found = {one for one in named if one in text}
                    self.assertTrue(found, f"{path} says {text!r}, of which {PAGE} has nothing")
                    told |= found
        self.assertGreater(len(told), 30)

    def test_whatever_trouble_the_agent_tells_is_there(self) -> None:
        named = [one for one in code(prose(PAGE)) if " " in one]
        told = set()
        for node in ast.walk(ast.parse(read("engine_agent.py"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("complaints.trouble", "say")):
                text = literal(node.args[-1])
                if ast.unparse(node.func).endswith("trouble") or text.startswith("is silent"):
                    self.assertTrue([one for one in named if one in text], f"{text!r}, of which {PAGE} has nothing")
                    told.add(text)
        self.assertGreater(len(told), 10)

    def test_each_reason_for_which_readers_are_turned_away_is_there(self) -> None:
        for reason, meaning in REJECTIONS.items():
            self.assertIn(f"| `{reason}` | {meaning} |", rows(PAGE))

    def test_both_languages_have_the_same_anchors(self) -> None:
        """The status page's notes name them; test_status_page.py holds its notes to them."""
        ids = re.findall(r'<a id="([a-z-]+)"></a>', read(PAGE))
        self.assertEqual(re.findall(r'<a id="([a-z-]+)"></a>', read(twin(PAGE))), ids)
        self.assertEqual(len(ids), len(set(ids)))


if __name__ == "__main__":
    unittest.main()
