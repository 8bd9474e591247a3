"""The version is one: whatever tells it says the same, and CHANGELOG.md begins with it."""

from __future__ import annotations

import re
import subprocess
import sys
import unittest

import engine_agent
import engine_table
from gateway import VERSION
from tests.documents import english_pages, every_page, read
from tests.harness import DEADLINE_S, TOP, clean_environment, daemon
from tests.test_config_examples import ENGINES, KUSTOMIZE


class Version(unittest.TestCase):
    """A release is a change of these places together: see CONTRIBUTING.md."""

    def test_it_is_three_numbers(self) -> None:
        self.assertRegex(VERSION, r"^\d+\.\d+\.\d+$")

    def test_the_files_that_stand_alone_and_the_package_have_it(self) -> None:
        self.assertEqual((engine_agent.VERSION, engine_table.VERSION), (VERSION, VERSION))
        self.assertIn(f'\nversion = "{VERSION}"\n', read("pyproject.toml"))

    def test_every_program_says_it(self) -> None:
        for program, name in (
            ("gateway.py", "elrar-state-gateway"),
            ("engine_agent.py", "elrar"),
            ("engine_table.py", "engine_table"),
        ):
            done = subprocess.run(
                [sys.executable, str(TOP / program), "--version"],
                env=clean_environment(),
                capture_output=True,
                text=True,
                timeout=DEADLINE_S,
                check=True,
            )
            self.assertEqual(done.stdout, f"{name} {VERSION}\n")

    def test_every_answer_says_it(self) -> None:
        with daemon(ENABLE_LOG="false") as running:
            self.assertEqual(running.ask("/version").json["version"], VERSION)
            self.assertEqual(running.stats()["version"], VERSION)
            self.assertEqual(running.ask("/openapi.json").json["info"]["version"], VERSION)
            self.assertIn(f'version="{VERSION}"', running.ask("/metrics").body.decode())

    def test_the_examples_name_it(self) -> None:
        self.assertIn(f'newTag: "{VERSION}"\n', (KUSTOMIZE / "kustomization.yaml").read_text(encoding="utf-8"))
        for path in (*ENGINES.glob("*.yaml"), *(TOP / page for page in english_pages())):
            for named in re.findall(r"elrar_agent-([0-9.]+)\.dist-info", path.read_text(encoding="utf-8")):
                self.assertEqual(named, VERSION, path)
        for page in every_page():
            for named in re.findall(r'"version": "([^"]+)"', read(page)):
                self.assertEqual(named, VERSION, page)

    def test_the_changelog_begins_with_it(self) -> None:
        """Above it may only stand what is not released yet."""
        sections = re.findall(r"^## (Unreleased|[0-9]\S*)", read("CHANGELOG.md"), flags=re.MULTILINE)
        released = [name for name in sections if name != "Unreleased"]
        self.assertEqual((released[0], released[-1]), (VERSION, "1.0.0"))
        self.assertEqual(sections[-len(released) :], released)


if __name__ == "__main__":
    unittest.main()
