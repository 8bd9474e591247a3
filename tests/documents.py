"""The pages that people read, as the tests read them: their blocks, tables, links and anchors.

Those at the top are named here, because a folder may have other files of its user's; every Markdown file in docs/ is a
page, is executed, and has its links followed, without a line here. `TRANSLATED` have to be there in Chinese, too.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from tests.harness import TOP

AT_THE_TOP = ("CHANGELOG.md", "CONTRIBUTING.md", "README.md", "README.zh-CN.md", "SECURITY.md")
TRANSLATED = (
    "README.md",
    "docs/deploy.md",
    "docs/design.md",
    "docs/engines.md",
    "docs/http.md",
    "docs/monitoring.md",
    "docs/performance.md",
    "docs/routers.md",
    "docs/state-log.md",
    "docs/troubleshooting.md",
)


def every_page() -> list[str]:
    """Every page there is, as a path from the top."""
    return sorted([*AT_THE_TOP, *(f"docs/{path.name}" for path in TOP.glob("docs/*.md"))])


def english_pages() -> list[str]:
    return [name for name in every_page() if not name.endswith(".zh-CN.md")]


def twin(name: str) -> str:
    """The same page in the other language."""
    if name.endswith(".zh-CN.md"):
        return name.removesuffix(".zh-CN.md") + ".md"
    return name.removesuffix(".md") + ".zh-CN.md"


def read(name: str) -> str:
    return (TOP / name).read_text(encoding="utf-8")


def blocks(name: str) -> list[tuple[str, str]]:
    """Every fenced block as its language and its text."""
    return re.findall(r"^ *```(\w*)\n(.*?)^ *```$", read(name), flags=re.DOTALL | re.MULTILINE)


def prose(name: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", read(name), flags=re.DOTALL | re.MULTILINE)


def rows(name: str) -> list[str]:
    """Every row of every table."""
    return [line for line in prose(name).splitlines() if line.startswith("|")]


def code(text: str) -> list[str]:
    """What is written as code in a text."""
    return re.findall(r"`([^`]+)`", text)


def table(name: str, heading: str, number: int = 0) -> list[list[str]]:
    """The cells of each row of a table under a heading, without the table's own heading."""
    under = re.split(r"(?m)^#+ ", prose(name).partition(f"\n{heading}\n")[2])[0]
    found = re.findall(r"(?m)(?:^\|.*\n)+", under + "\n")
    return [re.split(r" \| ", line.strip("| ")) for line in found[number].splitlines()[2:]]


def anchors(name: str) -> set[str]:
    """What a link may name behind `#`: each heading as GitHub writes it, Chinese kept, its punctuation dropped.

    And what a line of its own names, `<a id="stale"></a>`: the same in each language, whatever the heading below it is.
    """
    found: set[str] = set(re.findall(r'^<a id="([a-z-]+)"></a>$', prose(name), flags=re.MULTILINE))
    for title in re.findall(r"^#+ (.*)$", prose(name), flags=re.MULTILINE):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).strip()
        slug = anchor = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        number = 0
        while anchor in found:
            number += 1
            anchor = f"{slug}-{number}"
        found.add(anchor)
    return found


def links(name: str) -> list[tuple[str, str]]:
    """Every link of a page into this project: the file from the top, and the anchor in it or nothing."""
    without_code = re.sub(r"`[^`\n]*`", "", prose(name))
    found: list[tuple[str, str]] = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found.append((_from_top(name, path) if path else name, anchor))
    return found


def _from_top(page: str, path: str) -> str:
    """A path that is written from a page, as one from the top."""
    parts: list[str] = []
    for part in (PurePosixPath(page).parent / path).parts:
        if part == ".." and parts:
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts)
