"""Every sentence that loftq's errors can say, collected from the source by its syntax tree.

Values that a message fills in are shown by name in angle brackets, such as `<path>`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "loftq_cli"
ERRORS = ("UsageError", "LoftqError", "Refusal")
REFUSERS = {"refuse"}  # methods of containers that return a sentence, or its end
SENTENCES = {"unmergeable"}  # attributes of containers that hold one

# The package a message comes from -> the heading it is listed under. The rest goes to the last heading.
TOPICS: dict[str, tuple[str, ...]] = {
    "Flags and recipes": ("recipe", "cli", "machine"),
    "Opening a checkpoint": ("checkpoint", "modules"),
    "The Hub: reading": ("hub",),
    "What fits the container": ("formats", "planning", "numerics"),
    "Mixed precision and rank budgets": ("budget",),
    "Calibration and text": ("calibration", "forward", "evaluation"),
    "Output, resuming and workers": ("engine", "api", "tensorfile"),
    "Reading a converted directory": ("artifacts", "verification", "reporting"),
    "Loading and training": ("runtime", "kernels"),
    "Merging": ("merging",),
    "Batches": ("batches",),
    "The Hub: pushing": ("publishing",),
}
OTHER = "Other"


def all_messages() -> str:
    """The messages by topic, as Markdown."""
    found: dict[str, set[str]] = {topic: set() for topic in (*TOPICS, OTHER)}
    for package, message in collect():
        found[_topic(package)].add(message)
    parts = []
    for topic, messages in found.items():
        if messages:
            listed = "\n".join(f"- {_escaped(message)}" for message in sorted(messages, key=str.lower))
            parts.append(f"### {topic}\n\n{listed}")
    return "\n\n".join(parts)


def collect() -> Iterator[tuple[str, str]]:
    """Pairs of the package (or root module) a message is in, and the message."""
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        for message in messages_of(path.read_text(encoding="utf-8")):
            yield inside.parts[0].removesuffix(".py"), message


def messages_of(source: str) -> list[str]:
    """The messages that a module's errors are made with."""
    module = ast.parse(source)
    values = {
        target.id: node.value
        for node in ast.walk(module)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    functions = {node.name: node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)}
    messages: list[str] = []
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and _name(node.func) in ERRORS and node.args:
            messages += _texts(node.args[0], values, functions)
        elif isinstance(node, ast.keyword) and node.arg in SENTENCES:
            messages += _texts(node.value, values, functions)
    for name in REFUSERS & functions.keys():
        messages += [text for value in _returned(functions[name]) for text in _texts(value, {}, functions)]
    return [message for message in dict.fromkeys(messages) if " " in message]


def _texts(node: ast.expr, values: dict[str, ast.expr], functions: dict[str, ast.FunctionDef]) -> list[str]:
    """The texts an expression can be: of a name what it was assigned, of a call what the function returns."""
    if isinstance(node, ast.IfExp):
        return _texts(node.body, values, functions) + _texts(node.orelse, values, functions)
    if isinstance(node, ast.Name) and node.id in values and not isinstance(values[node.id], ast.Name):
        return _texts(values[node.id], values, functions)
    if isinstance(node, ast.Call):
        called = functions.get(_name(node.func))
        if called is not None:
            return [text for value in _returned(called) for text in _texts(value, {}, {})]
        if isinstance(node.func, ast.Attribute) and node.func.attr == "format":
            return _texts(node.func.value, values, functions)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        lefts, rights = (_texts(side, values, functions) for side in (node.left, node.right))
        return [left + right for left in lefts for right in rights]
    text = _text(node)
    return [text] if text else []


@cache
def constants() -> dict[str, str]:
    """The package's string constants by name: messages share some, such as what to use instead."""
    found: dict[str, str] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                name = _name(node.targets[0])
                if name.isupper() and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                    found[name] = node.value.value
    return found


def _returned(function: ast.FunctionDef) -> list[ast.expr]:
    return [item.value for item in ast.walk(function) if isinstance(item, ast.Return) and item.value]


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value) if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return constants().get(_name(node.value)) or f"<{_label(node.value)}>"
    return ""


def _label(node: ast.expr) -> str:
    """A short name for a value: the last name in the expression that makes it."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("join", "replace"):
        return _label(node.args[0]) if node.args and node.func.attr == "join" else _label(node.func.value)
    if isinstance(node, ast.Call) and node.args:
        return _label(node.args[0])
    if isinstance(node, ast.Subscript):
        return _label(node.value)
    return _name(node).replace("_", " ").strip().lower() or "value"


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _topic(package: str) -> str:
    return next((topic for topic, packages in TOPICS.items() if package in packages), OTHER)


def _escaped(message: str) -> str:
    """A message as Markdown text: its own markup is shown, not interpreted."""
    for character in "\\`*_[]#|":
        message = message.replace(character, f"\\{character}")
    return message.replace("<", "&lt;").replace(">", "&gt;")
