"""Pages of the site that lie elsewhere in the repository, and links between pages as the site has them."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
ELSEWHERE = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/paper/README.md": "paper.md",
}
"""Path in the repository, and the name of the page that it becomes."""
NOTEBOOKS = "examples/notebooks/"
"""Files that the site has as they are."""

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and the notebooks that lie outside docs/."""
    for path in sorted((ROOT / NOTEBOOKS).glob("*.ipynb")):
        name = f"notebooks/{path.name}"
        files.append(File.generated(config, name, content=path.read_text("utf-8")))
    for path, name in ELSEWHERE.items():
        text = (ROOT / path).read_text("utf-8")
        head = "---\nhide: [navigation]\n---\n" if name == "index.md" else ""
        files.append(File.generated(config, name, content=head + text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are in the repository become links of the site."""
    name = page.file.src_uri
    path = next((path for path, known in ELSEWHERE.items() if known == name), f"docs/{name}")
    return relinked(markdown, path)


def relinked(markdown: str, path: str) -> str:
    """The text of the file at `path`, with links to pages of the site; a link to another file is its text."""

    def link(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups()
        found = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        page = ELSEWHERE.get(found, found.removeprefix("docs/").removeprefix("examples/"))
        if found in ELSEWHERE or found.startswith(("docs/", NOTEBOOKS)):
            return f"{image}[{text}]({page}{anchor or ''})"
        return f"{text} (`{found}`)"

    return _LINK.sub(link, markdown)
