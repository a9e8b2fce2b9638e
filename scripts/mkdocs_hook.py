"""A hook of mkdocs: the site has the repository's layout, with docs/ at its root, so that all links work in both.

Pages link to files outside docs/ (``../d2kd/meta_arch.py``, ``../CONTRIBUTING.md``). These become part of the site.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
#: Pages outside docs/.
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "datasets/README.md")
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
#: Sphinx's roles, as the docstrings have them, before what they name.
ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):(?=<code>)")


def on_files(files: Any, config: Any) -> None:
    """Adds the pages outside docs/, and the files that pages link to."""
    docs = [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")]
    linked = {linked_path(link, page) for page in (*docs, *PAGES) for link in LINK.findall((ROOT / page).read_text())}
    for path in sorted({*PAGES, *linked}):
        if not path.startswith(("docs/", "..")) and (ROOT / path).is_file():
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points links to where their files lie in the site."""
    source = page.file.src_uri
    path = source if source in PAGES else f"docs/{source}"

    def moved(match: Any) -> str:
        target = linked_path(match.group(), path).removeprefix("docs/")
        return os.path.relpath(target, os.path.dirname(source) or ".")

    return LINK.sub(moved, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Leaves only the names of what docstrings refer to."""
    return ROLE.sub("", html).replace("<p>::</p>", "")


def linked_path(link: str, page: str) -> str:
    """The file that a page links to, as a path from the repository's root."""
    return os.path.normpath(os.path.join(os.path.dirname(page), link))
