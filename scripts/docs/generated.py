"""The parts of the documentation that are read from the code, as Markdown."""

from __future__ import annotations

from collections.abc import Callable

import architecture
import messages
import reference

GENERATORS: dict[str, Callable[[], str]] = {
    "cli": reference.commands,
    "recipe": reference.recipe_fields,
    "formats": reference.containers,
    "python-api": reference.python_names,
    "exit-codes": reference.exit_codes,
    "messages": messages.all_messages,
    "flow": architecture.flow,
    "layers": architecture.layers,
    "tree": architecture.tree,
}
