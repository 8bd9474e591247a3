"""`pip install .` makes a plain module install that runs, status page included."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from tests.harness import TOP, Daemon

INSTALL_TIMEOUT_S = 200.0


def why_not() -> str:
    """Why it cannot be installed here without a package index, or nothing if it can."""
    if importlib.util.find_spec("pip") is None:
        return "no pip on this machine"
    if os.environ.get("STATE_GATEWAY_INSTALL_TESTS"):
        return ""  # setuptools comes from the package index
    needed = [name for name in ("setuptools", "wheel") if importlib.util.find_spec(name) is None]
    return (
        f"no {' and no '.join(needed)} on this machine: STATE_GATEWAY_INSTALL_TESTS=1 has pip get them"
        if needed
        else ""
    )


class Install(unittest.TestCase):
    """What is installed is all of it, and runs as it does in its folder."""

    def test_every_module_is_listed(self) -> None:
        text = (TOP / "pyproject.toml").read_text(encoding="utf-8")
        listed = re.findall(r'"(\w+)"', text.partition("\npy-modules = [")[2].partition("]")[0])
        self.assertEqual(listed, sorted(path.stem for path in TOP.glob("*.py")), "py-modules in pyproject.toml")

    @unittest.skipIf(why_not(), why_not())
    def test_it_runs_with_its_page(self) -> None:
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        folder = Path(temporary.name)
        source = folder / "source"  # a copy, because building leaves files behind
        source.mkdir()
        for path in (*TOP.glob("*.py"), *(TOP / name for name in ("pyproject.toml", "README.md", "status_page.html"))):
            shutil.copy(path, source)
        how = [] if os.environ.get("STATE_GATEWAY_INSTALL_TESTS") else ["--no-build-isolation", "--no-index"]
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--no-deps",
                *how,
                "--prefix",
                str(folder / "installed"),
                str(source),
            ],
            capture_output=True,
            text=True,
            timeout=INSTALL_TIMEOUT_S,
            check=False,
        )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        (gateway,) = (folder / "installed").glob("**/gateway.py")
        running = Daemon(folder, {"BIND_ADDRESS": "127.0.0.1", "ENABLE_LOG": "false"}, (sys.executable, str(gateway)))
        self.addCleanup(running.close)
        page = running.wait_ready().ask("/")
        self.assertEqual((page.status, page.body), (200, (TOP / "status_page.html").read_bytes()))
        self.assertEqual(running.stop(), 0)


if __name__ == "__main__":
    unittest.main()
