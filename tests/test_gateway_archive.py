"""`python3 gateway_archive.py` makes gateway.pyz, which runs alone, as the folder does, page included."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import unittest
import zipfile
from pathlib import Path

from tests.harness import DEADLINE_S, TOP, Daemon, clean_environment, datagram

PYTHONS = os.environ.get("STATE_GATEWAY_ARCHIVE_PYTHONS", sys.executable).split(os.pathsep)


class Archive(unittest.TestCase):
    """One file, made by one command, in a folder in which nothing else is."""

    folder: Path

    @classmethod
    def setUpClass(cls) -> None:
        temporary = tempfile.TemporaryDirectory()
        cls.addClassCleanup(temporary.cleanup)
        cls.folder = Path(temporary.name).resolve() / "a folder"
        cls.folder.mkdir()
        done = cls.run_here(sys.executable, str(TOP / "gateway_archive.py"))
        assert (done.returncode, done.stdout) == (0, "gateway.pyz: run it with `python3 gateway.pyz`\n"), done

    @classmethod
    def run_here(cls, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=cls.folder,
            env={**clean_environment(), **variables},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )

    def test_it_takes_a_state_answers_and_stops_in_order(self) -> None:
        for python in PYTHONS:
            with self.subTest(python):
                running = Daemon(self.folder, {"BIND_ADDRESS": "127.0.0.1"}, (python, "gateway.pyz"))
                self.addCleanup(running.close)
                running.wait_ready().send(datagram())
                running.wait_received(1)
                self.assertEqual(running.ask("/engines").json["engines"]["test"]["status"], "live")
                page = running.ask("/")
                self.assertEqual((page.status, page.body), (200, (TOP / "status_page.html").read_bytes()))
                self.assertEqual(running.ask("/status-feed.js").status, 200)
                self.assertIn("sha256-", page.headers["Content-Security-Policy"])
                self.assertEqual(running.stop(), 0)
        self.assertEqual({path.name for path in self.folder.iterdir()}, {"gateway.pyz", "engine_states.jsonl"})

    def test_it_need_not_be_compiled_at_each_start(self) -> None:
        names = set(zipfile.ZipFile(self.folder / "gateway.pyz").namelist())
        sources = {name for name in names if name.endswith(".py")}
        self.assertIn("__main__.py", sources)
        self.assertEqual(names, {*sources, *(f"{name}c" for name in sources), "status_page.html"})

    def test_its_command_line_is_that_of_the_folder(self) -> None:
        for argument in ("--version", "--check-config"):
            ours = self.run_here(sys.executable, str(TOP / "gateway.py"), argument)
            its = self.run_here(sys.executable, "gateway.pyz", argument)
            self.assertEqual((its.returncode, its.stdout, its.stderr), (0, ours.stdout, ours.stderr))

    @unittest.skipUnless(shutil.which("env"), "no env on this machine")
    def test_it_runs_by_its_name(self) -> None:
        wrapper = self.folder.parent / "python3"
        wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        wrapper.chmod(0o755)
        done = self.run_here("./gateway.pyz", "--version", PATH=f"{wrapper.parent}:{os.environ['PATH']}")
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_the_agent_the_table_and_a_routers_import_are_in_it(self) -> None:
        for command in (["-m", "engine_agent", "--help"], ["-m", "engine_table", "--help"], ["-c", "import gateway"]):
            with self.subTest(command):
                done = self.run_here(sys.executable, *command, PYTHONPATH="gateway.pyz")
                self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_a_target_that_cannot_be_written_is_said_and_leaves_nothing(self) -> None:
        done = self.run_here(sys.executable, str(TOP / "gateway_archive.py"), "missing/gateway.pyz")
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, r"^cannot write missing/gateway\.pyz: .*No such file or directory.*\n$")
        self.assertEqual(self.run_here(sys.executable, str(TOP / "gateway_archive.py"), "--help").returncode, 2)


if __name__ == "__main__":
    unittest.main()
