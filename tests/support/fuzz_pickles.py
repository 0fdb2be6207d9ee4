"""Harmful pickles, as files that torch would be asked to load."""

from __future__ import annotations

import io
import pickle
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

# module, name and arguments of a call; {mark} is a file that must not be created.
CALLS: tuple[tuple[str, str, tuple[object, ...]], ...] = (
    ("os", "system", ("touch '{mark}'",)),
    ("posix", "system", ("touch '{mark}'",)),
    ("subprocess", "check_output", (["touch", "{mark}"],)),
    ("builtins", "eval", ("open(r'{mark}', 'w')",)),
    ("builtins", "exec", ("open(r'{mark}', 'w')",)),
    ("__builtin__", "eval", ("open(r'{mark}', 'w')",)),
    ("builtins", "open", ("{mark}", "w")),
    ("builtins", "getattr", ("x", "join")),
    ("builtins", "__import__", ("modeling_evil",)),
    ("io", "open", ("{mark}", "w")),
    ("_io", "FileIO", ("{mark}", "w")),
    ("torch", "save", ([1], "{mark}")),
    ("torch", "load", ("{mark}",)),
    ("torch.hub", "load", ("some/repo", "model")),
    ("torch.serialization", "add_safe_globals", ([1],)),
    ("torch.serialization", "_open_file", ("{mark}", "w")),
    ("torch._utils", "_import_dotted_name", ("os.system",)),
    ("torch.storage", "_load_from_bytes", (b"x",)),
    ("numpy", "save", ("{mark}", 1)),
    ("numpy.core.multiarray", "_reconstruct", (1, (0,), "b")),
    ("pathlib", "Path.touch", ("{mark}",)),
    ("shutil", "copyfile", ("/etc/passwd", "{mark}")),
    ("webbrowser", "open", ("http://127.0.0.1:9",)),
    ("importlib", "import_module", ("modeling_evil",)),
    ("runpy", "_run_code", ("open(r'{mark}', 'w')", {})),
    ("_codecs", "encode", ("x", "utf-8")),
    ("collections", "OrderedDict", ([["a", 1]],)),
    ("torch._utils", "_rebuild_tensor_v2", (None, 0, (2,), (1,), False, {})),
    ("torch._utils", "_rebuild_parameter", (1, 2, 3)),
    ("torch", "Size", ([10**9] * 4,)),
)


def _argument(value: object, mark: str) -> object:
    if isinstance(value, str):
        return value.replace("{mark}", mark)
    if isinstance(value, (list, tuple)):
        return type(value)(_argument(item, mark) for item in value)
    return value


def _body(value: object) -> bytes:
    """Return a value's opcodes without the header, the frame and the stop."""
    return pickle.dumps(value, protocol=2)[2:-1]


def call(rng: random.Random, mark: Path) -> bytes:
    """Return opcodes that call something, in one of the possible ways."""
    module, name, arguments = rng.choice(CALLS)
    values = _argument(arguments, str(mark))
    how = rng.randrange(5)
    what = f"c{module}\n{name}\n".encode()
    if how == 0:
        return what + _body(values) + b"R"
    if how == 1:
        return b"(" + what + b"".join(_body(value) for value in values) + b"o"  # OBJ
    if how == 2:
        return b"(" + b"".join(_body(value) for value in values) + f"i{module}\n{name}\n".encode()  # INST
    if how == 3:
        return what + _body(values) + b"\x81"  # NEWOBJ
    short = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    return short + b"\x93" + _body(values) + b"R"  # STACK_GLOBAL


def bombs(rng: random.Random) -> bytes:
    """Return short data that claims to be large."""
    return rng.choice((
        b"]q\x00" + b"(" + b"h\x00" * 9 + b"e" * 1,
        b"".join(b"(" + b"h\x00" * 9 + b"lq\x00" for _ in range(20)),  # each list holds the last nine times
        b"K\x01r\xff\xff\xff\x7f",  # a memo of two billion entries
        b"\x8e" + struct.pack("<Q", 2**62),  # BINBYTES8
        b"\x8d" + struct.pack("<Q", 2**40) + b"x",  # BINUNICODE8
        b"X\xff\xff\xff\x7fx",
        b"\x8b\xff\xff\xff\x7f1",  # LONG4
        b"\x95" + struct.pack("<Q", 2**60),  # FRAME
        b"(" * 100_000,
        b"]" * 50_000 + b"a" * 49_999,
        b"\x85" * 3 + b"K\x01" + b"\x85" * 60_000,  # tuples in tuples
        b"N" * 200_000,
        b"h\x09", b"0" * 5, b"R", b"b", b"u", b"Q", b"P1\n", b"\x82\x01", b"I" + b"9" * 6000 + b"\n", b"F1e999\n",
    ))  # fmt: skip


def storage(rng: random.Random) -> bytes:
    """Return a tensor whose storage or geometry is false."""
    count = rng.choice((4, -1, 2**20, 2**40, 2**62, 2**63 - 1))
    size, stride = rng.choice(
        (((2, 2), (2, 1)), ((2**31, 2**31), (0, 0)), ((-1, 4), (1, 1)), ((4,), (2**40,)), ((4,), (-1,)))
    )
    kind = rng.choice(("FloatStorage", "QInt8Storage", "ComplexFloatStorage", "UntypedStorage", "Tensor", "nn"))
    key = rng.choice(("0", "1", "../0", "x" * 200))
    head = (
        b"("
        + _body("storage")
        + f"ctorch\n{kind}\n".encode()
        + _body(key)
        + _body(rng.choice(("cpu", "cuda:0", "meta", "x")))
    )
    offset = rng.choice((0, 1, -1, 2**40))
    args = (
        b"("
        + head
        + _body(count)
        + b"tQ"
        + _body(offset)
        + _body(size)
        + _body(stride)
        + b"\x89ccollections\nOrderedDict\n)Rt"
    )
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + args + b"R"


def hostile_pickle(rng: random.Random, mark: Path, damage: Callable[[random.Random, bytes], bytes]) -> bytes:
    """Return a file (zip, legacy, or a bare pickle) with a damaged state dict."""
    inner = rng.choice((call, lambda r, _: bombs(r), lambda r, _: storage(r)))(rng, mark)
    around = rng.randrange(4)
    if around == 0:
        body = b"\x80\x02" + inner + b"."
    elif around == 1:
        body = b"\x80\x02}" + _body("a.weight") + inner + b"s."
    elif around == 2:
        body = b"\x80\x02ccollections\nOrderedDict\n)R" + _body("a.weight") + inner + b"s."
    else:
        body = b"\x80\x02}" + _body("state_dict") + b"}" + _body("a") + inner + b"ss" + inner + b"."
    if rng.random() < 0.2:
        body = damage(rng, body)
    how = rng.randrange(4)
    if how == 0:
        return body
    if how == 1:
        return _legacy(body)
    return _zip(rng, body)


def _legacy(body: bytes) -> bytes:
    """Return magic number, protocol and machine, then the object, then no storages."""
    head = io.BytesIO()
    for value in (
        torch.serialization.MAGIC_NUMBER,
        1001,
        {"little_endian": True, "protocol_version": 1001, "type_sizes": {}},
    ):
        pickle.dump(value, head, protocol=2)
    return head.getvalue() + body + pickle.dumps(["0"], protocol=2) + struct.pack("<q", 4) + bytes(16)


def _zip(rng: random.Random, body: bytes) -> bytes:
    made = io.BytesIO()
    folder = rng.choice(("archive/", "archive/", "../../", "/etc/", "a/b/", ""))
    with zipfile.ZipFile(
        made, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    ) as archive:
        archive.writestr(f"{folder}data.pkl", body)
        archive.writestr(f"{folder}version", "3\n")
        archive.writestr(f"{folder}byteorder", rng.choice(("little", "little", "big", "x")))
        archive.writestr(f"{folder}data/0", bytes(16))
        if rng.random() < 0.3:
            archive.writestr(f"{folder}constants.pkl", body)
        if rng.random() < 0.2:
            archive.writestr(f"{folder}data/1", b"")
    return made.getvalue()


def opcodes(data: bytes) -> list[str]:
    """Return the opcodes of a case, to look at it by hand."""
    return [opcode.name for opcode, _, _ in pickletools.genops(data)]
