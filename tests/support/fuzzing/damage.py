"""Damage to bytes, JSON, safetensors files and the tensors in them. Everything is drawn from the `rng`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from support.fuzzing.odd_values import NAMES, RAW_NUMBERS, WEIRD

_DTYPES = (
    torch.int8, torch.int64, torch.bool, torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.float16,
)  # fmt: skip
_TENSOR_NAMES = tuple(name for name in NAMES if "\ud800" not in name and name != "__metadata__")


def damage_bytes(rng: random.Random, content: bytes) -> bytes:
    """Flip, cut, insert, repeat, zero: somewhere, mostly near the beginning or the end, where structure is."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = min(len(data), int(rng.choice((rng.random() ** 4, 1 - rng.random() ** 4, rng.random())) * (len(data) + 1)))
        length = rng.choice((1, 1, 2, 8, 64, 1000))
        how = rng.randrange(6)
        if how == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            del data[at:]
        elif how == 2:
            data[at:at] = rng.randbytes(length)
        elif how == 3:
            data[at:at] = data[at : at + length]
        elif how == 4:
            data[at : at + length] = bytes(len(data[at : at + length]))
        else:
            del data[at : at + length]
    return bytes(data)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(*path, key) for key, _ in items] + [p for key, inner in items for p in places(inner, (*path, key))]


def nested(rng: random.Random) -> Any:
    """Lists in lists, up to what the parser's stack would not take."""
    value: Any = 1
    for _ in range(rng.choice((3, 50, 400))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def damage_json(rng: random.Random, content: bytes) -> bytes:
    """Odd values, missing and doubled keys, swapped values, bombs, or damaged bytes."""
    how = rng.randrange(12)
    if how == 0:
        return damage_bytes(rng, content)
    if how == 1:
        return rng.choice((b"", b"[]", b"null", b"{", b"\xff\xfe{", b"[" * 100_000, b'{"a":' * 50_000, b"1" * 10_000))
    document = json.loads(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        found = places(document)
        if not found:
            break
        *way, key = rng.choice(found)
        holder = document
        for step in way:
            holder = holder[step]
        odd = nested(rng) if how == 2 else rng.choice(WEIRD)
        if how == 3:
            del holder[key]
        elif how == 4 and isinstance(holder, dict):
            holder[rng.choice(NAMES)] = holder.pop(key)
        elif how == 5:
            _, *other = (None, *rng.choice(found))
            source: Any = document
            for step in other:
                source = source[step] if isinstance(source, (dict, list)) else None
                if source is None:
                    break
            holder[key] = source if not isinstance(source, (dict, list)) else odd
        elif how in (6, 7) and isinstance(holder[key], int):
            holder[key] += rng.choice((-1, 1, 8, -8, 2**31, 2**62, -(2**40)))
        else:
            holder[key] = odd
    try:
        text = json.dumps(document).encode()
    except (ValueError, RecursionError):  # a value that holds itself
        return b"{}"
    if how == 8 and b":" in text:  # a number no Python value can be
        head, _, tail = text.partition(b": ")
        text = head + b": " + rng.choice(RAW_NUMBERS) + tail[len(tail.split(b",")[0].split(b"}")[0]) :]
    if how == 9:  # keys twice
        text = text.rstrip(b"}") + b", " + text.lstrip(b"{") if text.startswith(b"{") else text
    return text


def damage_safetensors(rng: random.Random, content: bytes) -> bytes:
    """The header's length, its JSON, or bytes anywhere."""
    how, length = rng.randrange(4), int.from_bytes(content[:8], "little")
    if how == 0:
        return damage_bytes(rng, content)
    if how == 1:
        claimed = rng.choice((0, 1, length - 1, length + 1, 2 * length, 100_000_000, 2**40, 2**63, 2**64 - 1))
        return claimed.to_bytes(8, "little") + content[8:]
    header = damage_json(rng, content[8 : 8 + length].rstrip())
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def damage_weights(rng: random.Random, path: Path) -> None:
    """Sound files with odd tensors: other dtypes and shapes, NaN, extremes, missing, doubled and extra ones."""
    tensors = load_file(path)
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(sorted(tensors))
        tensor = tensors[name]
        how = rng.randrange(11)
        if how == 0:
            del tensors[name]
        elif how == 1:
            tensors[name] = tensor.to(rng.choice(_DTYPES))
        elif how == 2:
            tensors[name] = tensor[: rng.randrange(len(tensor) + 1)].clone()
        elif how == 3:
            tensors[name] = tensor.reshape(rng.choice([(1, -1), (-1,), (-1, 1), (1, 1, -1)])).clone()
        elif how == 4 and tensor.is_floating_point():
            tensor.view(-1)[rng.randrange(tensor.numel()) :: 997] = rng.choice(
                (float("nan"), float("inf"), -float("inf"))
            )
        elif how == 5 and tensor.is_floating_point():
            tensors[name] = (tensor.float() * rng.choice((0.0, 1e30, 1e-30, 1e-42, 3e38))).to(tensor.dtype)
        elif how == 6 and tensor.is_floating_point():
            tensor.view(-1)[0] = rng.choice((1e30, -3e38, 1e10))
        elif how == 7:
            tensors[rng.choice(("extra.weight", f"{name}_scale", f"{name}_scale_inv", *_TENSOR_NAMES))] = tensor.clone()
        elif how == 8:
            tensors[name + rng.choice(("", ".weight", *_TENSOR_NAMES))] = tensors.pop(name)
        elif how == 9:
            tensors[name.replace("weight", "qweight")] = tensors.pop(name).to(torch.int32)
        else:
            other = rng.choice(sorted(tensors))
            tensors[name], tensors[other] = tensors[other].clone(), tensor.clone()
        if not tensors:
            break
    save_file(tensors, path)
