"""Recipes in YAML that are odd, hostile or damaged."""

from __future__ import annotations

import random
from pathlib import Path

from support.fuzzing.damage import damage_bytes

RECIPES = (
    "bits: {w}", "rank: {w}", "iters: {w}", "rule: {w}", "include: {w}", "block_size: {w}", "alpha: {w}", "seed: {w}",
    "max_shard_size: {w}", "format: {w}", "dtype: {w}", "model: {w}", "keep_last: {w}", "revision: {w}", "{w}: 1",
    "meta_version: {w}", "exclude: {w}", "data_type: {w}", "{w}", "method: {w}", "embeddings: {w}", "svd: {w}",
)  # fmt: skip
YAML_VALUES = (
    "!!python/object/apply:os.system ['touch {mark}']", "!!python/name:os.system", "!!python/object/new:open [x, w]",
    "!!python/module:os", "!!bool x", "!!int ''", "!!float abc", "!!timestamp x", "!!binary '%'", "2001-99-99", "0x",
    ".nan", "-.inf", "0o9", "1_000", "*nowhere", "&a [*a]", "{{a: &b [1], c: *b}}", "[2, 3]", "'2'", "4.0", "true",
    "null", "~", "'['", "['(=2', 'x=9']", "'*'", "[1, 2]", "{{}}", "'a=2:99999999999999999999'", "1e400", "9" * 5000,
    "'\\0'", "\"\\ud800\"", "- - -", "? [a]\n: b", "%TAG ! x", "\t", "'10 PB'", "'1e3GB'", "'" + "9" * 400 + "GB'",
    "💥", "'.*.*.*.*=2'", "'(a+)+$=2'",
)  # fmt: skip


def bomb() -> str:
    """A billion laughs."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    return "\n".join([*lines, "rule: *a11"])


def write_recipe(rng: random.Random, path: Path, mark: Path) -> None:
    lines = []
    for _ in range(rng.choice((1, 1, 2))):
        value = rng.choice(YAML_VALUES).replace("{mark}", str(mark)).replace("{{", "{").replace("}}", "}")
        lines.append(rng.choice(RECIPES).replace("{w}", value))
    content = "\n".join(lines)
    if rng.random() < 0.1:
        content = rng.choice(
            (bomb(), "[" * 3000, "{a: " * 3000, "\x00", "bits: 2\nbits: 4", "---\n---\n", "", "\ufeffbits: 2")
        )
    data = content.encode("utf-8", "surrogatepass")
    path.write_bytes(damage_bytes(rng, data) if rng.random() < 0.1 else data)
