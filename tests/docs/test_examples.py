"""Every shell and Python block of the README and the docs runs, or says in the source why it does not.

The blocks of a page run in order, in one process and one temporary folder, which holds a tiny random Llama where the
examples name a model. In the Markdown source a comment on the line before a block may say

    <!-- not run: REASON -->       the block is not run, and why
    <!-- exit code: N -->          its last command ends with this code

A YAML block with a title, such as ```yaml title="recipe.yaml", is written to a file of that name.
"""

from __future__ import annotations

import contextlib
import glob
import io
import re
import shlex
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.testing
from support.paths import ROOT
from support.perplexity import write_tokenizer

from loftq_cli.cli import app

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL, PYTHON, SHOWN = ("bash",), ("python",), ("text", "yaml", "json", "toml", "diff", "mermaid")
MODELS = ("my-model", "meta-llama/Llama-2-13b-hf")  # as the examples name them
TEXTS = ("wikitext2-test.txt", "my-domain.txt")

_BLOCK = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```[ ]*$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- (?P<kind>not run|exit code): (?P<value>.+?) -->\s*$")
_TITLE = re.compile(r'title="([^"]+)"')


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        line: of the page, at which its text begins.
        language, title: what stands behind the fence.
        not_run: why it is not run; "" where it is.
        exit_code: of its last command.
    """

    page: str
    line: int
    language: str
    title: str
    text: str
    not_run: str = ""
    exit_code: int = 0

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str, markdown: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = []
    for match in _BLOCK.finditer(markdown):
        words = match["info"].split(maxsplit=1)
        title = _TITLE.search(match["info"])
        mark = _MARK.search(markdown[: match.start()])
        marks = {mark["kind"]: mark["value"]} if mark else {}
        found.append(
            Block(
                page=page,
                line=markdown.count("\n", 0, match.start("text")) + 1,
                language=words[0] if words else "",
                title=title[1] if title else "",
                text=textwrap.dedent(match["text"]),
                not_run=marks.get("not run", ""),
                exit_code=int(marks.get("exit code", 0)),
            )
        )
    return found


def read_blocks(path: Path) -> list[Block]:
    return blocks_of(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))


def run_block(block: Block, namespace: dict[str, Any]) -> None:
    """Run a block that is not marked, or write its file; what is only shown is left alone."""
    if block.not_run:
        return
    if block.language in SHELL:
        run_shell(block)
    elif block.language in PYTHON:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block.text, block.place, "exec"), namespace)
    elif block.title:
        Path(block.title).write_text(block.text, encoding="utf-8")


def run_shell(block: Block) -> None:
    """Run the `loftq` commands of a block in this process; the last one must end with the block's exit code."""
    commands = [words for line in joined_lines(block.text) if (words := shlex.split(line, comments=True))]
    for number, words in enumerate(commands):
        target = ""
        if len(words) > 2 and words[-2] == ">":
            words, target = words[:-2], words[-1]
        assert words[0] == "loftq", f"{block.place}: only loftq commands are run here, mark this block: {words}"
        assert not {"|", "&&", ";", ">"} & set(words), f"{block.place}: one command a line, please: {words}"
        arguments = [path for word in words[1:] for path in sorted(glob.glob(word)) or [word]]
        result = typer.testing.CliRunner().invoke(app, arguments)
        expected = block.exit_code if number == len(commands) - 1 else 0
        assert result.exit_code == expected, (
            f"{block.place}: {shlex.join(words)}\n{result.output}\n{result.exception!r}"
        )
        if target:
            Path(target).write_text(result.stdout, encoding="utf-8")


def joined_lines(text: str) -> list[str]:
    """The commands of a shell block: a backslash at a line's end continues it."""
    return text.replace("\\\n", " ").splitlines()


@pytest.fixture(scope="module")
def supplies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model and texts under the names that the examples use."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("supplies")
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).bfloat16()
    for name in MODELS:
        model.save_pretrained(folder / name)
        write_tokenizer(folder / name)
    for name in TEXTS:
        (folder / name).write_text(" ".join(f"w{(i * i + 3 * i) % 91}" for i in range(300)), encoding="utf-8")
    return folder


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_blocks_of_a_page_run(path: Path, supplies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = read_blocks(path)
    if not any(block.language in SHELL + PYTHON and not block.not_run for block in blocks):
        return
    shutil.copytree(supplies, tmp_path / "page", ignore=shutil.ignore_patterns("cache"))
    monkeypatch.chdir(tmp_path / "page")
    monkeypatch.setenv("XDG_CACHE_HOME", str(supplies / "cache"))  # of all pages: nothing is measured twice
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with torch.random.fork_rng():
        for block in blocks:
            run_block(block, namespace)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_block_has_a_language_that_is_run_or_only_shown(path: Path) -> None:
    markdown = path.read_text(encoding="utf-8")
    blocks = read_blocks(path)
    assert markdown.count("```") == 2 * len(blocks), f"{path}: a fence is not closed, or not found here"
    for block in blocks:
        assert block.language in SHELL + PYTHON + SHOWN, f"{block.place}: '{block.language}' is neither run nor shown"
        # A command must not hide in a block that is only shown.
        assert block.language != "text" or not re.search(r"^\$ ", block.text, re.MULTILINE), block.place
    assert len(re.findall(r"<!-- not run:", markdown)) == sum(bool(block.not_run) for block in blocks), (
        f"{path}: a 'not run' comment does not stand right before a block"
    )


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_reasons_for_blocks_not_run_are_sentences(path: Path) -> None:
    for block in read_blocks(path):
        assert not block.not_run or len(block.not_run.split()) >= 3, f"{block.place}: '{block.not_run}' is no reason"


def test_a_block_that_fails_is_reported_with_its_place() -> None:
    (block,) = blocks_of("page.md", "\n```bash\nloftq inspect nowhere\n```\n")
    with pytest.raises(AssertionError, match=r"page.md:3: loftq inspect nowhere"):
        run_block(block, {})
    (block,) = blocks_of("page.md", "```bash\nls\n```\n")
    with pytest.raises(AssertionError, match="mark this block"):
        run_block(block, {})
    (block,) = blocks_of("page.md", "```python\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError):
        run_block(block, {})


def test_marks_belong_to_the_block_after_them() -> None:
    page = '<!-- not run: needs the Hub -->\n```bash\na\n```\n\ntext\n\n```yaml title="b.yaml"\nb: 1\n```\n\n'
    page += "<!-- exit code: 3 -->\n\n```bash\nc\n```\n\n  ```python\n  if x:\n      pass\n  ```\n"
    first, second, third, fourth = blocks_of("page.md", page)
    assert (first.not_run, first.line, first.exit_code) == ("needs the Hub", 3, 0)
    assert (second.language, second.title, second.not_run) == ("yaml", "b.yaml", "")
    assert (third.text, third.exit_code, third.not_run) == ("c\n", 3, "")
    assert fourth.text == "if x:\n    pass\n"
