"""Where the modules are found: beside gateway.py, whatever else has their names (the contract's sections 4 and 7)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from tests.harness import DEADLINE_S, TOP, clean_environment, datagram, fields

MODULES = sorted(path.stem for path in TOP.glob("*.py"))
PACKAGE = "router.services.state_gateway"
ROUTER_CLASHES = "THEIRS = True\n"


class Case(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name).resolve()

    def write_modules(self, folder: Path, text: str) -> None:
        """A module of the same name as each of the gateway's."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in MODULES:
            (folder / f"{name}.py").write_text(text)

    def run_python(self, *arguments: object, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=self.folder,
            env={**clean_environment(), **environment},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout


class AsScript(Case):
    """`python3 gateway.py` finds its own modules and nothing else's, however Python makes its path."""

    def setUp(self) -> None:
        super().setUp()
        self.write_modules(self.folder, "raise SystemExit('a module that only has the same name')\n")

    def assert_runs(self, *arguments: object, **environment: str) -> None:
        self.assertRegex(self.run_python(*arguments, "--version", **environment), "^elrar-state-gateway ")

    def test_with_every_option_that_takes_its_folder_off_the_path(self) -> None:
        options = [[], ["-I"], ["-E", "-s"], *([["-P"]] if sys.version_info >= (3, 11) else [])]
        for option in options:
            with self.subTest(option):
                self.assert_runs(*option, TOP / "gateway.py")
                self.assert_runs(*option, TOP / "gateway.py", PYTHONPATH=str(self.folder))
                self.assert_runs(*option, TOP / "gateway.py", PYTHONPATH=str(self.folder), PYTHONSAFEPATH="1")

    def test_through_a_symbolic_link_and_by_a_relative_path(self) -> None:
        link = self.folder / "linked"
        link.symlink_to(TOP / "gateway.py")
        for path in (link, os.path.relpath(TOP / "gateway.py", self.folder)):
            for option in ([], ["-I"]):
                with self.subTest(path=path, option=option):
                    self.assert_runs(*option, path, PYTHONPATH=str(self.folder))

    def test_within_a_package_it_is_a_script_all_the_same(self) -> None:
        here = self.folder / PACKAGE.replace(".", "/")
        here.mkdir(parents=True)
        for path in TOP.glob("*.py"):
            shutil.copy(path, here)
        self.assert_runs(here / "gateway.py")
        self.assert_runs("-m", f"{PACKAGE}.gateway")


IMPORT_ALL = """
import importlib, sys
top, package, early, *names = sys.argv[1:]
sys.path.insert(0, top)
path = sys.path.copy()
if early:
    for name in names:
        assert importlib.import_module(name).THEIRS
gateway = importlib.import_module(package + ".gateway")
assert early or not set(names) & set(sys.modules), set(names) & set(sys.modules)
for name in names:
    module = importlib.import_module(f"{package}.{name}")
    assert not hasattr(module, "THEIRS"), module
    assert importlib.import_module(name).THEIRS, name
assert sys.path == path
own = {value for name in names for value in vars(sys.modules[f"{package}.{name}"]).values() if isinstance(value, type)}
print(*sorted({value.__module__ for value in own if value.__module__ in names}))
"""

RUN = """
import importlib, json, socket, sys, urllib.request
sys.path.insert(0, sys.argv[1])
from router.services.state_gateway.gateway import get_state_gateway
gateway = get_state_gateway()
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.sendto(sys.argv[2].encode(), ("127.0.0.1", gateway.udp_port))
def get(path):
    return urllib.request.urlopen(f"http://127.0.0.1:{gateway.http_port}{path}", timeout=30).read()
while not json.loads(get("/engines"))["engines"]:
    pass
assert b"<html" in get("/") and b"elrar_state_gateway" in get("/metrics")
print(json.dumps(gateway.get_engine_states_dict()))
gateway.shutdown()
"""


class InAPackage(Case):
    """In a router's package the modules find each other, and neither they nor the router's get each other's."""

    def put(self, *, marked: bool) -> None:
        """The folder in a router's package, where modules of the router, at the top and in it, have the same names."""
        here = self.folder / PACKAGE.replace(".", "/")
        here.mkdir(parents=True)
        for path in (*TOP.glob("*.py"), TOP / "status_page.html"):
            shutil.copy(path, here)
        self.write_modules(self.folder, ROUTER_CLASHES)
        self.write_modules(self.folder / "router", ROUTER_CLASHES)
        if marked:
            for folder in (here, *here.parents[:2]):
                (folder / "__init__.py").touch()

    def test_every_module_is_there_under_its_full_name_only(self) -> None:
        for marked in (True, False):
            for early in ("", "early"):
                with self.subTest(init_py=marked, router_first=bool(early)):
                    shutil.rmtree(self.folder / "router", ignore_errors=True)
                    self.put(marked=marked)
                    mixed = self.run_python("-c", IMPORT_ALL, self.folder, PACKAGE, early, *MODULES)
                    self.assertEqual(mixed.split(), [], "classes of modules by their plain names")

    def test_it_runs_there(self) -> None:
        self.put(marked=True)
        settings = {"UDP_PORT": "0", "BIND_ADDRESS": "127.0.0.1", "STALE_THRESHOLD": "60000", "ENABLE_LOG": "false"}
        environment = {f"VLLM_STATE_GATEWAY_{name}": value for name, value in settings.items()}
        states = json.loads(self.run_python("-c", RUN, self.folder, datagram().decode(), **environment))
        self.assertEqual(states, {"test": fields()})


if __name__ == "__main__":
    unittest.main()
