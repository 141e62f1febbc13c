"""The description on PyPI: README.md as it reads where there is no repository beside it."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent


def without_repository_links(text: str) -> str:
    """Markdown in which a relative link is its text, and in which no image lies in the repository."""
    without_images = re.sub(r"^!\[[^\]]*\]\((?!https?:)[^)]+\)\n+", "", text, flags=re.M)
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#)([^)]+)\)", r"\1 (`\2`)", without_images)


if __name__ == "__main__":
    setup(
        long_description=without_repository_links((HERE / "README.md").read_text("utf-8")),
        long_description_content_type="text/markdown",
    )
