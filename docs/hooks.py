"""What mkdocs does to the pages of this folder: the addresses, and links to files outside of it."""

from __future__ import annotations

import configparser
import posixpath
import re
from pathlib import Path
from typing import Any

config = configparser.RawConfigParser()
config.read(Path(__file__).parents[1] / "setup.cfg", "utf-8")
REPOSITORY = config["metadata"]["url"]
OWNER, NAME = REPOSITORY.split("/")[-2:]
SITE = f"https://{OWNER.lower()}.github.io/{NAME}/"


def on_config(config: Any) -> None:
    """The addresses of the repository and of the site."""
    config.repo_url, config.site_url = REPOSITORY, SITE


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A link that leaves docs/ leads to the repository."""
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def whole(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[1]))
        return link[0] if path.startswith("docs/") else f"]({REPOSITORY}/blob/main/{path})"

    return re.sub(r"\]\((\.\./[^)\s]+)\)", whole, markdown)
