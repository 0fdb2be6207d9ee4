"""MkDocs hooks: fill in what pages take from the code, and turn `repo:` links into links to the repository.

A page asks for generated text with a comment on a line of its own, `<!-- generated: NAME -->`. `generated.GENERATORS`
has the names. A link `[text](repo:path)` leads to a file of this repository, below `repo_url` of mkdocs.yml.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from generated import GENERATORS
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parents[2]
BRANCH = "main"
_MARKER = re.compile(r"^<!-- generated: ([\w-]+) -->$", re.MULTILINE)
_LINK = re.compile(r"\]\(repo:([^)#\s]*)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Show warnings in strict mode: with --quiet MkDocs would not see them, and so not count them as errors."""
    log = logging.getLogger("mkdocs")
    if config.strict and log.level > logging.WARNING:
        log.setLevel(logging.WARNING)
    return config


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Return the page's Markdown with generated text and absolute links.

    Raises:
        PluginError: a page asks for text that nothing generates, or links to a file that does not exist.
    """
    where = page.file.src_uri

    def fill(match: re.Match[str]) -> str:
        if match[1] not in GENERATORS:
            raise PluginError(f"{where} asks for '{match[1]}', which is not one of {', '.join(GENERATORS)}.")
        return GENERATORS[match[1]]()

    def link(match: re.Match[str]) -> str:
        target = ROOT / match[1]
        if not target.exists():
            raise PluginError(f"{where} links to {match[1]}, which does not exist in this repository.")
        kind = "tree" if target.is_dir() else "blob"
        return f"]({config['repo_url'].rstrip('/')}/{kind}/{BRANCH}/{match[1]}{match[2] or ''})"

    return _LINK.sub(link, _MARKER.sub(fill, markdown))
