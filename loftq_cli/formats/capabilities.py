"""What each container can do, in one place: the README's table and the card's `pip install` line come from here.

A cell's claim names the test that shows it, or says that it was read in upstream source.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

UPSTREAM = "upstream source"


@dataclass(frozen=True)
class Claim:
    """A cell of the table: what is claimed, and the test (`file.py::test`) that shows it, or `UPSTREAM`."""

    text: str
    proof: str


@dataclass(frozen=True)
class Capability:
    """One container.

    Attributes:
        bits, levels: what it holds.
        exact: the loaded backbone equals what LoftQ optimised.
        trains: what PEFT wraps; `serves`: what runs it besides transformers.
        needs: packages its loader takes besides transformers.
    """

    format: str
    bits: tuple[int, ...]
    levels: str
    exact: Claim
    trains: Claim
    serves: Claim
    needs: tuple[str, ...]


_PACKED_EXACT = "test_quantize.py::test_small_llama"
_CT = "test_integer_formats.py::test_transformers_loads_compressed_tensors_exactly"
_GPTQ = "test_integer_formats.py::test_gptqmodel_loads_gptq_exactly"
_GGUF = "test_gguf.py::test_transformers_and_gguf_load_exactly"

_GPTQ_V1 = Capability(
    "gptq",
    (2, 3, 4, 8),
    "integers, group 32 to 256 or a row",
    Claim("yes", _GPTQ),
    Claim("yes, at the stored bits", _GPTQ),
    Claim("vLLM: 4 and 8 bits, `--symmetric`", UPSTREAM),
    ("peft", "optimum", "gptqmodel"),
)

CAPABILITIES: tuple[Capability, ...] = (
    Capability(
        "packed",
        (2, 3, 4, 8),
        "any codebook, integers with float zeros; mixed",
        Claim("yes", _PACKED_EXACT),
        Claim("yes, at the stored bits", "test_runtime.py::test_forward_and_gradients_equal_the_dense_layer"),
        Claim("transformers with `loftq_cli.runtime`", _PACKED_EXACT),
        ("loftq-cli[train]",),
    ),
    Capability(
        "bnb",
        (2, 4),
        "`nf` (2 bits stored in 4); `--double-quant`",
        Claim("yes", _PACKED_EXACT),
        Claim("yes, at 4.5 bits", _PACKED_EXACT),
        Claim("vLLM", UPSTREAM),
        ("peft", "bitsandbytes"),
    ),
    _GPTQ_V1,
    replace(_GPTQ_V1, format="gptq-v2", levels="the same", serves=Claim("gptqmodel", UPSTREAM)),
    Capability(
        "compressed-tensors",
        (2, 3, 4, 8),
        "integers, group 32 to 256 or a row; experts one by one, symmetric",
        Claim("yes", _CT),
        Claim("yes, unpacked", _CT),
        Claim("vLLM, symmetric: 4 and 8 bits; 2 and 3 in new versions", UPSTREAM),
        ("peft", "compressed-tensors"),
    ),
    Capability(
        "gguf",
        (4, 8),
        "Q4_0, Q4_1 (`--asymmetric`), Q8_0; Llama, Qwen2, Qwen3",
        Claim("yes", _GGUF),
        Claim("yes, unpacked", _GGUF),
        Claim("llama.cpp", UPSTREAM),
        ("peft", "gguf"),
    ),
    Capability(
        "dense",
        (2, 3, 4, 8),
        "any",
        Claim("yes", _PACKED_EXACT),
        Claim("yes, at the model's dtype", _PACKED_EXACT),
        Claim("anything", UPSTREAM),
        ("peft",),
    ),
)


def capability(name: str) -> Capability:
    """The entry of a container."""
    return next(item for item in CAPABILITIES if item.format == name)


def markdown_table() -> str:
    """The README's table."""
    lines = ["| `--format` | bits | levels | loads exactly | trains | serves |", "|---|---|---|---|---|---|"]
    for item in CAPABILITIES:
        claims = [_cell(claim) for claim in (item.exact, item.trains, item.serves)]
        bits = ", ".join(str(width) for width in item.bits)
        lines.append(f"| `{item.format}` | {bits} | {item.levels} | {' | '.join(claims)} |")
    return "\n".join(lines)


def _cell(claim: Claim) -> str:
    return f"{claim.text} ¹" if claim.proof == UPSTREAM else claim.text
