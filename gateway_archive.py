"""Makes gateway.pyz, the whole project in one file, which any Python from 3.10 on runs: `python3 gateway.pyz`.

python3 gateway_archive.py [FILE]    writes it: by default gateway.pyz in the working folder
"""

from __future__ import annotations

import os
import py_compile
import shutil
import sys
import tempfile
import zipapp
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
DEFAULT_NAME = "gateway.pyz"


def archived_files() -> list[Path]:
    """What runs: every module but this one, and the status page."""
    modules = (path for path in FOLDER.glob("*.py") if path.name != Path(__file__).name)
    return [*sorted(modules), FOLDER / "status_page.html"]


def write_archive(target: Path) -> None:
    """Write the archive, in the place of one that is there, all of it or nothing; raises OSError."""
    with tempfile.TemporaryDirectory() as name:
        source = Path(name)
        for path in archived_files():
            shutil.copy2(path, source)
        # Python runs __main__.py of an archive. A copy, so that the main program is the main program here, too.
        shutil.copy2(FOLDER / "gateway.py", source / "__main__.py")
        for path in list(source.glob("*.py")):  # byte code for this Python; another one takes the source beside it
            unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
            py_compile.compile(str(path), f"{path}c", path.name, doraise=True, invalidation_mode=unchecked)
        unfinished = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            zipapp.create_archive(source, unfinished, interpreter="/usr/bin/env python3", compressed=True)
            unfinished.chmod(0o755)
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)


def main(arguments: Sequence[str]) -> int:
    """Write the archive where the arguments say; returns the exit status."""
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        sys.stderr.write(f"usage: python3 gateway_archive.py [FILE]    (default: {DEFAULT_NAME})\n")
        return 2
    target = Path(arguments[0] if arguments else DEFAULT_NAME)
    try:
        write_archive(target)
    except OSError as error:
        sys.stderr.write(f"cannot write {target}: {error}\n")
        return 1
    sys.stdout.write(f"{target}: run it with `python3 {target}`\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
