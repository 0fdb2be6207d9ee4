"""The command line as users and CI jobs see it: exit codes, streams, messages, help."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.table import Table
from rich.text import Text
from support.commands import loftq, runner, sentence

from loftq_cli.cli import app
from loftq_cli.cli.terminal import duration, guarded, messages, print_json, results, styled, warn
from loftq_cli.machine.openmp import openmp_spin_env
from loftq_cli.machine.sizes import size_text
from loftq_cli.machine.streams import lost_results


def test_quantize_prints_a_summary(random_llama: Path, tmp_path: Path) -> None:
    result = loftq("quantize", random_llama, "-o", tmp_path / "out", "--bits", 2, "--rank", 8, "--iters", 3)
    shown = ("weights", "→", "effective", "stored", "residual", "time", "peak memory", "written to", "loftq_cli.load")
    for text in shown:
        assert text in result.stdout
    assert str(tmp_path / "out") in result.stdout
    assert "14 matrices" in result.stderr and "Llama" in result.stderr


def test_json_is_one_object_and_nothing_else(random_llama: Path, tmp_path: Path) -> None:
    result = loftq("quantize", random_llama, "-o", tmp_path / "out", "--bits", 2, "--json")
    values = json.loads(result.stdout)
    assert result.stderr == "" and values["totals"]["matrices"] == 14 and values["output"] == str(tmp_path / "out")
    plan = json.loads(loftq("plan", random_llama, "--bits", 2, "--json").stdout)
    assert len(plan["matrices"]) == 14 and plan["files"]["model.safetensors"] > 0
    inspected = json.loads(loftq("inspect", tmp_path / "out", "--json").stdout)
    assert len(inspected["matrices"]) == 14 and inspected["fingerprint"] == values["fingerprint"]


def test_quiet_prints_nothing(random_llama: Path, tmp_path: Path) -> None:
    result = loftq("quantize", random_llama, "-o", tmp_path / "out", "--quiet")
    assert result.stdout == result.stderr == ""


def test_verbose_names_every_matrix(random_llama: Path, tmp_path: Path) -> None:
    result = loftq("quantize", random_llama, "-o", tmp_path / "out", "--verbose")
    for layer in (0, 1):
        assert f"model.layers.{layer}.self_attn.q_proj" in result.stderr
    assert re.search(r"14/14 .* residual \d\.\d{4} → \d\.\d{4}, mean \d\.\d{4} → \d\.\d{4}", result.stderr)


def test_plan_shows_groups_reasons_and_sizes(random_llama: Path) -> None:
    result = loftq("plan", random_llama, "--bits", 2, "--rule", "k_proj=4:8", "--exclude", "*.o_proj")
    assert re.search(r"model\.layers\.\*\.self_attn\.q_proj\s+2\s+64 × 64\s+2 nf", result.stdout)
    assert re.search(r"k_proj\s+2\s+32 × 64\s+4 nf\s+64\s+8", result.stdout)
    assert "--exclude" in result.stdout and "embedding (--embeddings keep)" in result.stdout
    assert "model.safetensors" in result.stdout and "total" in result.stdout


def test_inspect_shows_every_matrix(random_llama: Path, tmp_path: Path) -> None:
    loftq("quantize", random_llama, "-o", tmp_path / "out", "--bits", 2, "-q")
    result = loftq("inspect", tmp_path / "out", "-v")
    assert result.stdout.count("self_attn.q_proj") == 2 and "mean residual" in result.stdout
    assert "model.norm.weight" in result.stdout


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["quantize", "nowhere"], 1, "there is no directory"),
        (["quantize"], 2, "no model was given"),
        (["quantize", "nowhere", "--bits", "5"], 2, "--bits cannot be 5"),
        (["quantize", "nowhere", "--rule", "x"], 2, "REGEX=SPEC"),
        (["quantize", "--config", "nowhere.yaml"], 2, "cannot be read"),
        (["plan", "nowhere"], 1, "there is no directory"),
        (["inspect", "nowhere"], 1, "there is no directory"),
    ],
)
def test_mistakes_end_in_one_sentence(words: list[str], code: int, said: str) -> None:
    assert said in sentence(loftq(*words, code=code))


def test_usage_errors_of_the_parser_are_exit_2() -> None:
    loftq("quantize", "m", "--bits", "two", code=2)
    loftq("quantize", "m", "--no-such-flag", code=2)
    loftq("no-such-command", code=2)


def test_three_bits_in_bnb_are_refused_with_the_reason(random_llama: Path) -> None:
    said = sentence(loftq("quantize", random_llama, "--bits", 3, "--format", "bnb", code=2))
    assert "NF4's sixteen levels" in said and "--format packed" in said


@pytest.mark.parametrize(
    ("words", "code"),
    [(["quantize", "nowhere"], 1), (["plan", "m", "--bits", "9"], 2), (["verify", "nowhere"], 1)],
)
def test_debug_prints_the_traceback_and_keeps_the_exit_code(words: list[str], code: int) -> None:
    assert "Traceback" not in loftq(*words, code=code).stderr
    lines = loftq(*words, "--debug", code=code).stderr.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1].startswith("loftq: ") and "Error: " in "".join(lines)


def test_panics_and_unexpected_errors_end_in_one_sentence() -> None:
    class PanicException(BaseException):
        """Named as the exception of pyo3."""

    for error in (PanicException("a\nb"), RuntimeError("a \x1b[2J hf_abcdefgh12345678")):
        with pytest.raises(typer.Exit) as caught, guarded(debug=True):
            raise error
        assert caught.value.exit_code == 1
    for passing in (SystemExit(5), GeneratorExit()):
        with pytest.raises(type(passing)), guarded(debug=False):
            raise passing


ODD = "[/x]\x1b[2J\u202e\n::error::y [red]z hf_abcdefgh12345678 https://h/f?sig=1"
SHOWN = "[/x]\\x1b[2J\\u202e\\n::error::y [red]z *** https://h/f?***"


def test_consoles_print_text_as_it_is_without_harm(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(box=None, padding=0, show_header=False)
    table.add_column(no_wrap=True)
    table.add_row(ODD)
    for console in (messages(), results()):
        console.print(ODD, soft_wrap=True)
        console.print(Text("raw \x1b[2J\u202e"))
        console.print(styled((ODD, "bold")), soft_wrap=True)
        console.print(table, soft_wrap=True)
    warn(ODD)
    out, err = capsys.readouterr()
    assert [line.rstrip() for line in out.splitlines()] == [SHOWN, "raw \\x1b[2J\\u202e", SHOWN, SHOWN]
    assert err.splitlines()[-1] == f"note: {SHOWN}" and len(err.splitlines()) == 5


def test_text_for_other_encodings(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    results().print("4 × 4 → é")
    print_json({"a": "→\x9b"})
    assert written.getvalue() == b'4 x 4 -> \\xe9\n{\n  "a": "\\u2192\\u009b"\n}\n'


def test_a_stream_that_fails_stops_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.StringIO):
        error: type[OSError] = BrokenPipeError

        def write(self, text: str) -> int:
            raise self.error

    monkeypatch.setattr("sys.stdout", Broken())
    monkeypatch.setattr("sys.stderr", Broken())
    results().print("x")
    print_json({})
    messages().print("x")
    monkeypatch.setattr(Broken, "error", OSError)
    messages().print("x")
    assert lost_results() is None  # messages are not results, and a reader may leave
    for write in (lambda: results().print("x"), lambda: print_json({})):
        with pytest.raises(typer.Exit) as caught, guarded(debug=False):
            write()
        assert caught.value.exit_code == 1


@pytest.mark.parametrize("redirect", [">&-", "2>&-", "<&- >&- 2>&-", "| true", "2>&1 | true"])
def test_closed_streams(redirect: str, tmp_path: Path) -> None:
    command = f"set -o pipefail; {sys.executable} -m loftq_cli inspect {tmp_path}/none {redirect}"
    assert subprocess.run(["bash", "-c", command], capture_output=True, timeout=120).returncode == 1
    command = f"set -o pipefail; {sys.executable} -m loftq_cli schema {redirect}"
    assert subprocess.run(["bash", "-c", command], capture_output=True, timeout=120).returncode == 0


@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_help_shows_brackets(command: str) -> None:
    page = " ".join(loftq(command, "--help-all").stdout.split())
    assert "org/name[@revision] on the Hub" in page and "[default: 64, gguf 32]" in page and "\\[" not in page


def test_flags_win_over_the_yaml(random_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"model: {random_llama}\nbits: 2\nrank: 4\nrule: ['q_proj=8']\nkeep_last: true\n")
    plan = json.loads(loftq("plan", "--config", tmp_path / "r.yaml", "--rank", 8, "--json").stdout)
    assert {(m["bits"], m["rank"]) for m in plan["matrices"]} == {(2, 8), (8, 8)}


def test_help_has_panels_and_defaults() -> None:
    text = " ".join(loftq("quantize", "--help-all").stdout.split())
    for panel in ("What to convert", "Output", "Quantization", "LoftQ", "Running", "Showing"):
        assert panel in text
    assert "default: 16" in text and "default: keep-best" in text
    root = loftq("--help").stdout
    assert "quantize" in root and "inspect" in root and "Exit codes" in root


def test_version_lists_the_dependencies() -> None:
    text = loftq("--version").stdout
    for name in ("loftq", "python", "torch", "transformers", "peft", "bitsandbytes"):
        assert re.search(rf"^{name} \S+", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "at", "expected"),
    [("loftq qu", 1, "quantize"), ("loftq quantize --emb", 2, "--embeddings"), ("loftq plan --format p", 3, "packed")],
)
def test_the_shell_completes(words: str, at: int, expected: str) -> None:
    variables = {"_LOFTQ_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(at)}
    assert runner.invoke(app, [], env=variables, prog_name="loftq").stdout.split() == [expected]


def test_sizes_and_durations_are_readable() -> None:
    assert size_text(26_030_000_000) == "26 GB" and size_text(91_400_000) == "91.4 MB" and size_text(12) == "12 B"
    assert duration(8.44) == "8.4 s" and duration(200) == "3 min 20 s" and duration(3900) == "1 h 05 min"


def test_idle_threads_sleep_soon_unless_the_user_decides() -> None:
    assert openmp_spin_env({"HOME": "/root"}) == {"GOMP_SPINCOUNT": "3000"}
    assert openmp_spin_env({"GOMP_SPINCOUNT": "7"}) == {} == openmp_spin_env({"OMP_WAIT_POLICY": "active"})
    code = "import os, sys; sys.argv = ['loftq', '--help']\nfrom loftq_cli.cli import main\ntry: main()\n"
    code += "finally: print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False 3000"
