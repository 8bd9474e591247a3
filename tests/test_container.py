"""The container: its entry script run for real with the gateway behind it, and what the image is made of.

The script runs on this machine as it would in a container: with the sources beside it, as root or as somebody else,
with more or fewer capabilities, in a folder that may be anybody's.
"""

from __future__ import annotations

import ast
import contextlib
import fnmatch
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Iterator
from pathlib import Path

from config import PREFIX, SETTINGS
from tests.harness import DEADLINE_S, GUIDE_EXAMPLE, TOP, Daemon, clean_environment, datagram, free_port, logged_states

USER = 65532
ENTRY = "docker-entrypoint.sh"
COMPOSE = TOP / "config_examples" / "compose" / "compose.yaml"
DEFAULTS = {setting.name: setting.default for setting in SETTINGS}
DROPPED = "--inh-caps=-all"
AS_USER = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups")
READ_ONLY = (
    "unshare", "-m", "sh", "-c",
    'mount --bind "$PWD" "$PWD" && mount -o remount,bind,ro "$PWD" && cd "$PWD" && exec "$@"', "sh",
)  # fmt: skip


def why_not() -> str:
    """Why the script cannot be tried here, or nothing where it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "only root of a Linux machine can start it as a container does"
    if shutil.which("setpriv") is None:
        return "setpriv is not on this machine"
    tried = subprocess.run([*AS_USER, "true"], capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    if tried.returncode:
        return f"root has too few rights here: {tried.stderr.strip()}"
    return "" if python_folder() else "no Python that an ordinary user can run is on this machine"


def python_folder() -> Path | None:
    """A folder with a `python3` that an ordinary user can run, too: that of these tests may be in root's home."""
    for folder in (Path(sys.executable).parent, Path("/usr/local/bin"), Path("/usr/bin")):
        # By `env`, because what setpriv itself starts it starts with root's rights to folders.
        command = [*AS_USER, "env", str(folder / "python3"), "-c", "import sys; sys.exit(sys.version_info < (3, 10))"]
        if subprocess.run(command, capture_output=True, check=False, cwd="/", timeout=DEADLINE_S).returncode == 0:
            return folder
    return None


def compose_capabilities() -> list[str]:
    """What the compose file adds to no capabilities at all."""
    added = re.search(r"^ +cap_add:\n((?: +- \w+\n)+)", COMPOSE.read_text(), re.MULTILINE)
    assert added is not None
    return re.findall(r"\w+", added[1])


def only(*capabilities: str) -> list[str]:
    """A command's prefix that leaves it these capabilities, as `--cap-drop ALL --cap-add ...` does."""
    bounds = ",".join(["-all", *(f"+{name.lower()}" for name in capabilities)])
    return ["setpriv", f"--bounding-set={bounds}", DROPPED]


def somebody(user: int) -> list[str]:
    """A command's prefix that runs it as `--user` does."""
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", DROPPED]


WHY_NOT = why_not()


@unittest.skipIf(WHY_NOT, WHY_NOT)
class EntryScriptTest(unittest.TestCase):
    def setUp(self) -> None:
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        self.top = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.app = self.top / "app"
        self.folder = self.top / "data"
        for folder in (self.top, self.app, self.folder):
            folder.mkdir(exist_ok=True)
            folder.chmod(0o755)
        for source in (*TOP.glob("*.py"), *TOP.glob("*.html"), TOP / ENTRY):
            copy = shutil.copy(source, self.app)
            os.chmod(copy, 0o755)
        self.log = self.folder / DEFAULTS["LOG_FILE"]

    def command(self, prefix: tuple[str, ...] | list[str], *arguments: str) -> list[str]:
        return [*prefix, "env", f"PATH={python_folder()}:{os.environ['PATH']}", str(self.app / ENTRY), *arguments]

    @contextlib.contextmanager
    def started(self, *prefix: str, **settings: object) -> Iterator[Daemon]:
        """The daemon, ready, started by the script after `prefix`."""
        running = Daemon(self.folder, settings, self.command(prefix))
        try:
            yield running.wait_ready()
        finally:
            running.close()

    def run_script(
        self, *arguments: str, prefix: tuple[str, ...] | list[str] = (), **settings: object
    ) -> subprocess.CompletedProcess[str]:
        """The script run to its end."""
        return subprocess.run(
            self.command(prefix, *arguments),
            cwd=self.folder,
            env=clean_environment(**{"UDP_PORT": 0, **settings}),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )

    def assert_takes_states(self, running: Daemon) -> None:
        """It takes a state, ends with 0 at SIGTERM, and the state is in the log."""
        running.send(datagram())
        running.wait_received(1)
        self.assertEqual(running.stop(), 0, running.lines)
        self.assertEqual(logged_states(self.log), [GUIDE_EXAMPLE])

    def owner(self, path: Path) -> int:
        return path.lstat().st_uid

    def assert_unprivileged(self, pid: int, user: int = USER) -> None:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        self.assertEqual(status["Uid"].split(), [str(user)] * 4)
        self.assertEqual(status["Gid"].split(), [str(user)] * 4)
        self.assertEqual(status["Groups"].strip(), "")
        for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            self.assertEqual(int(status[name], 16), 0, name)

    def test_root_gives_the_folder_away_and_leaves_root_for_good(self) -> None:
        """The guide's `docker run`: the host's folder is root's, the daemon is an ordinary user's and writes there."""
        with self.started() as running:
            pid = running.process.pid
            command_line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            self.assertIn(os.fsencode(self.app / "gateway.py"), command_line, "the script is still between")
            self.assert_unprivileged(pid)
            self.assertIn("NoNewPrivs:\t1\n", Path(f"/proc/{pid}/status").read_text())
            self.assert_takes_states(running)
        self.assertEqual((self.owner(self.folder), self.folder.stat().st_gid), (USER, 0))
        self.assertEqual(self.owner(self.log), USER)

    def test_groups_and_inheritable_capabilities_of_root_are_left_too(self) -> None:
        """Docker gives root its groups, and older runtimes make its capabilities inheritable."""
        with self.started("setpriv", "--groups=0,4", "--inh-caps=+chown,+setuid,+net_raw") as running:
            self.assert_unprivileged(running.process.pid)
            self.assert_takes_states(running)

    def test_log_that_root_wrote_is_continued(self) -> None:
        """A log from before, by a gateway that ran as root, is not in the way."""
        self.log.write_bytes(b'{"state": {"before": 1}}\n')
        with self.started(LOG_FILE=self.log) as running:
            running.send(datagram())
            running.wait_received(1)
            self.assertEqual(running.stop(), 0)
        self.assertEqual(logged_states(self.log), [{"before": 1}, GUIDE_EXAMPLE])

    def test_nothing_else_in_the_folder_changes_hands(self) -> None:
        """Other files, folders and what links lead to stay whose they were."""
        other, below = self.folder / "other", self.folder / "below"
        other.touch(0o600)
        below.mkdir(0o700)
        with self.started():
            self.assertEqual((self.owner(other), self.owner(below)), (0, 0))

    def test_link_in_place_of_the_log_gives_nothing_away(self) -> None:
        """What a link leads to stays root's, and is not written."""
        secret = self.top / "secret"
        secret.touch(0o600)
        self.log.symlink_to(secret)
        ended = self.run_script()
        self.assertEqual(ended.returncode, 1, ended.stderr)
        self.assertIn("cannot open the state log", ended.stderr)
        self.assertEqual((self.owner(secret), secret.read_bytes()), (0, b""))

    def test_file_of_roots_in_a_folder_that_was_given_away_stays_roots(self) -> None:
        """Whoever has the folder can move any file in it to the log's name: the next start must not give it to them."""
        os.chown(self.folder, USER, 0)
        self.log.touch(0o600)
        ended = self.run_script()
        self.assertEqual(ended.returncode, 1, ended.stderr)
        self.assertEqual(self.owner(self.log), 0)

    def test_writable_folder_stays_whose_it_is(self) -> None:
        """A folder for all, such as the host's /tmp, is not taken from root."""
        self.folder.chmod(0o1777)
        with self.started() as running:
            self.assert_takes_states(running)
        self.assertEqual(self.owner(self.folder), 0)

    def test_only_the_working_folder_is_given_away(self) -> None:
        """LOG_FILE names nothing else for root to give: of /dev/stdout it would be /dev."""
        elsewhere = self.top / "elsewhere"
        elsewhere.mkdir()
        log = elsewhere / "states.jsonl"
        log.touch()
        ended = self.run_script(LOG_FILE=log)
        self.assertEqual(ended.returncode, 1)
        self.assertIn("cannot open the state log", ended.stderr)
        self.assertEqual((self.owner(elsewhere), self.owner(log)), (0, 0))
        for path in ("..", f"{self.folder}/..", "", "/"):
            with self.subTest(path=path):
                os.chown(self.folder, 0, 0)
                self.assertIn(self.run_script(LOG_FILE=path).returncode, (1, 2))
                self.assertEqual((self.owner(self.folder), self.owner(self.top)), (USER, 0))

    def test_another_user_runs_it_as_that_user(self) -> None:
        """`docker run --user`: in a folder of that user's it works."""
        os.chown(self.folder, 1234, 1234)
        with self.started(*somebody(1234)) as running:
            self.assert_unprivileged(running.process.pid, 1234)
            self.assert_takes_states(running)
        self.assertEqual(self.owner(self.log), 1234)

    def test_another_user_is_told_that_the_folder_is_not_writable(self) -> None:
        """`docker run --user` in a folder of root's: a line with the file and what to do."""
        ended = self.run_script(prefix=somebody(1234))
        self.assertEqual(ended.returncode, 1, ended.stderr)
        self.assertRegex(ended.stderr, f"cannot open the state log {self.log}: Permission denied; set .*LOG_FILE")

    def test_root_without_capabilities_is_told_what_to_add(self) -> None:
        """`--cap-drop ALL` alone: nothing runs as root; one line says what does."""
        ended = self.run_script(prefix=only())
        self.assertEqual((ended.returncode, len(ended.stderr.splitlines())), (1, 1), ended.stderr)
        self.assertRegex(ended.stderr, f"cannot leave root .*--user {USER}:{USER}.*--cap-add SETUID --cap-add SETGID")
        self.assertEqual(self.owner(self.folder), 0)

    def test_capabilities_of_the_compose_file_are_enough(self) -> None:
        """`--cap-drop ALL` with those added back, and no-new-privileges."""
        with self.started(*only(*compose_capabilities()), "--no-new-privs") as running:
            self.assert_unprivileged(running.process.pid)
            self.assert_takes_states(running)

    def test_each_capability_of_the_compose_file_is_needed(self) -> None:
        """Without any one of them a line names it."""
        for name in compose_capabilities():
            with self.subTest(without=name):
                rest = [other for other in compose_capabilities() if other != name]
                ended = self.run_script(prefix=only(*rest))
                self.assertEqual(ended.returncode, 1)
                self.assertIn(f"--cap-add {name}", ended.stderr)

    def test_folder_that_cannot_be_given_away_is_no_matter_without_a_log(self) -> None:
        """With ENABLE_LOG=false it runs, and still not as root."""
        with self.started(*only("SETUID", "SETGID"), ENABLE_LOG="false") as running:
            self.assert_unprivileged(running.process.pid)
            self.assertEqual(running.stop(), 0)

    def test_read_only_folder_is_said(self) -> None:
        """A `/data` that nobody can write: a line says so, and the exit status is 1."""
        self.skip_without_mounts()
        ended = self.run_script(prefix=READ_ONLY)
        self.assertEqual(ended.returncode, 1, ended.stderr)
        self.assertIn(f"cannot give {self.folder} to user {USER}", ended.stderr)
        self.assertIn("Read-only file system", ended.stderr)

    def test_read_only_root_file_system_without_a_log_is_quiet(self) -> None:
        """`--read-only` and no volume: /data is the user's, nobody can write there, and nobody wants to."""
        self.skip_without_mounts()
        os.chown(self.folder, USER, 0)
        with self.started(*READ_ONLY, ENABLE_LOG="false") as running:
            self.assertEqual(running.stop(), 0)
        self.assertNotIn(ENTRY, "".join(running.lines))

    def skip_without_mounts(self) -> None:
        tried = subprocess.run(
            [*READ_ONLY, "true"], cwd=self.folder, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
        if tried.returncode:
            self.skipTest(f"nothing can be mounted here: {tried.stderr.strip()}")

    def test_options_are_the_gateways(self) -> None:
        """`docker run IMAGE --check-config`: an answer, and the folder stays as it is."""
        ended = self.run_script("--check-config", STALE_THRESHOLD=5000)
        self.assertEqual((ended.returncode, ended.stderr), (0, ""))
        self.assertIn(f"{PREFIX}STALE_THRESHOLD=5000  # environment", ended.stdout)
        self.assertIn("elrar-state-gateway ", self.run_script("--version").stdout)
        self.assertEqual(self.run_script("--check-config", STALE_THRESHOLD="soon").returncode, 2)
        self.assertEqual(self.run_script("--no-such-option").returncode, 2)
        self.assertEqual(self.owner(self.folder), 0)

    def test_another_command_is_run_instead_without_root(self) -> None:
        """`docker run IMAGE sh`: its words, its exit status, and not as root."""
        ended = self.run_script("sh", "-c", 'id -u; echo "$1"; exit 7', "sh", "two words")
        self.assertEqual((ended.returncode, ended.stdout), (7, f"{USER}\ntwo words\n"))
        self.assertEqual(self.owner(self.folder), 0)

    def test_it_runs_the_engines_agent_when_asked_without_root(self) -> None:
        """Beside an engine, the image is the agent, with its own arguments, and the data folder stays as it is."""
        before = self.owner(self.folder)
        done = self.run_script("engine_agent.py", "--simulate", "2", "--seconds", "0.5", "--print")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(len({json.loads(line)["engine_id"] for line in done.stdout.splitlines()}), 2)
        self.assertEqual(self.owner(self.folder), before)
        self.assertEqual(self.run_script("engine_agent.py", "--push-interval", "1").returncode, 2)

    def test_health_check_of_the_image_asks_the_daemon(self) -> None:
        """The Dockerfile's own command: 0 while the daemon is alive, 1 when it is not."""
        check = image_command("HEALTHCHECK")[1:]
        port = free_port()
        with self.started(UDP_PORT=port) as running:
            ended = self.run_script(*check, UDP_PORT=port)
            self.assertEqual((ended.returncode, json.loads(ended.stdout)["status"]), (0, "ok"))
            running.signal(signal.SIGINT)
            self.assertEqual(running.wait_exit(), 0)
        self.assertEqual(self.run_script(*check, UDP_PORT=port).returncode, 1)


def dockerfile() -> str:
    """The Dockerfile's instructions, each on one line, without comments."""
    text = re.sub(r"^\s*#.*\n", "", (TOP / "Dockerfile").read_text(), flags=re.MULTILINE)
    return text.replace("\\\n", " ")


def image_command(instruction: str) -> list[str]:
    """The words of an instruction in exec form, for a shell in between would keep signals to itself."""
    form = re.search(rf"^{instruction}\b[^\[\n]*(\[.*\])$", dockerfile(), re.MULTILINE)
    assert form is not None, f"{instruction} is not in exec form"
    words = json.loads(form[1])
    assert all(isinstance(word, str) for word in words)
    return list(words)


def is_let_through(name: str) -> bool:
    """Whether .dockerignore lets a file or folder at the top level into the image: the last fitting pattern decides."""
    let = True
    for line in (TOP / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#") and fnmatch.fnmatchcase(name, line.removeprefix("!")):
            let = line.startswith("!")
    return let


def imported_modules(name: str) -> set[str]:
    """The project's modules that one imports, itself and what those import included."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        name = waiting.pop()
        if name in found or not (TOP / f"{name}.py").exists():
            continue
        found.add(name)
        for node in ast.walk(ast.parse((TOP / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                waiting += [alias.name.partition(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                waiting.append(node.module.partition(".")[0])
    return found


class ImageTest(unittest.TestCase):
    def test_every_module_that_the_daemon_imports_is_in_the_image(self) -> None:
        """The image has what runs."""
        self.assertRegex(dockerfile(), r"(?m)^COPY \. /app/$")
        modules = imported_modules("gateway")
        self.assertIn("state_store", modules)
        for name in (*(f"{module}.py" for module in modules), "engine_agent.py", ENTRY):
            self.assertTrue(is_let_through(name), name)

    def test_nothing_but_what_runs_is_in_the_image(self) -> None:
        """No tests, no history, no documents, no logs."""
        for path in TOP.iterdir():
            if is_let_through(path.name):
                self.assertTrue(path.is_file(), path)
                self.assertIn(path.suffix, (".py", ".html", ".sh"), path)
        for name in (".git", "tests", "README.md", "Dockerfile", "engine_states.jsonl", "start_gateway_unicast.sh"):
            self.assertFalse(is_let_through(name), name)

    def test_commands_are_the_entry_script_in_exec_form(self) -> None:
        """The process that gets SIGTERM is the script, which becomes the daemon; health is the daemon's own check."""
        script = f"/app/{ENTRY}"
        self.assertEqual(image_command("ENTRYPOINT"), [script])
        self.assertEqual(image_command("HEALTHCHECK"), [script, "--health-check"])
        self.assertTrue(os.access(TOP / ENTRY, os.X_OK))

    def test_numbers_that_stand_in_two_places_are_equal(self) -> None:
        """Ports and the log's name with the settings' defaults; the user in both files."""
        port = DEFAULTS["UDP_PORT"]
        self.assertRegex(dockerfile(), rf"(?m)^EXPOSE {port}/udp {port}/tcp$")
        script = (TOP / ENTRY).read_text()
        self.assertIn(f"VLLM_STATE_GATEWAY_LOG_FILE:-{DEFAULTS['LOG_FILE']}}}", script)
        self.assertIn(f"\nuser={USER} ", script)
        self.assertIn(f"chown {USER}:0 /data ", dockerfile())
        self.assertRegex(dockerfile(), r"(?m)^WORKDIR /data$")

    def test_compose_file_sets_what_is_a_setting(self) -> None:
        """No name is misspelt, and the ports are the defaults."""
        text = COMPOSE.read_text()
        names = re.findall(r"^ +(VLLM_\w+):", text, re.MULTILINE)
        self.assertTrue(names)
        self.assertLessEqual(set(names), {setting.variable for setting in SETTINGS})
        port = DEFAULTS["UDP_PORT"]
        for protocol in ("udp", "tcp"):
            self.assertIn(f'"{port}:{port}/{protocol}"', text)


if __name__ == "__main__":
    unittest.main()
