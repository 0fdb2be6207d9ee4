"""`loftq report`: one page, complete, escaped, self-contained and reproducible."""

from __future__ import annotations

import dataclasses
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from support.commands import runner
from support.pages import Page

import loftq_cli
from loftq_cli.artifacts.manifest import NAME, Manifest, MatrixRecord, read_manifest, render, seal
from loftq_cli.cli import app
from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.modules.experts import Expert
from loftq_cli.reporting.data import collect
from loftq_cli.reporting.page import MARK, render_page
from loftq_cli.reporting.style import SCRIPT
from loftq_cli.reporting.text import breakable

HOSTILE = "</title><script>alert(1)</script>\u202e\x1b[31m\"'&"


@pytest.fixture(scope="module")
def two_bits(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "two-bits"
    loftq_cli.quantize(random_llama, output=out, bits=2, rank=4, iters=2)
    return out


@pytest.fixture(scope="module")
def mixed(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "mixed"
    loftq_cli.quantize(random_llama, output=out, bits=4, rank=4, iters=1, rule=("mlp=2",))
    return out


@pytest.fixture(scope="module")
def manifest(two_bits: Path) -> Manifest:
    return read_manifest(two_bits)


def loftq(*words: object) -> Any:
    return runner.invoke(app, ["report", *map(str, words)], prog_name="loftq")


def page_of(*manifests: Manifest) -> Page:
    return Page(render_page([collect(f"out-{number}", one) for number, one in enumerate(manifests)]))


def experts(record: MatrixRecord, layers: int, count: int) -> tuple[MatrixRecord, ...]:
    return tuple(
        dataclasses.replace(
            record,
            kind="expert",
            parameter=f"model.layers.{layer}.mlp.experts.down_proj",
            expert=Expert(number, count),
            module=f"model.layers.{layer}.mlp.experts.down_proj.{number}",
            tensor=f"model.layers.{layer}.mlp.experts.{number}.down_proj.weight",
            residual=0.25 if number else 0.35,
        )
        for layer in range(layers)
        for number in range(count)
    )


def test_the_command_writes_a_page_with_every_part(two_bits: Path, mixed: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = loftq(two_bits, mixed, "-o", page)
    assert result.exit_code == 0 and str(page) in result.stdout.replace("\n", "")
    assert stat.S_IMODE(page.stat().st_mode) & 0o044 == 0o044 and list(tmp_path.iterdir()) == [page]
    found = Page(page.read_text(encoding="utf-8"))
    headings = [text for tag, text in found.texts if tag == "h2"]
    assert headings == [
        "At a glance",
        "Residual by layer and module",
        "Residual after each step",
        "Bits and rank by layer",
        "Bits and rank by layer and module",
        "Where the bytes are",
        "The largest residuals",
        "Singular values of the error",
        "Recipe",
        "Origin and versions",
        "Files and hashes",
    ]
    totals = read_manifest(two_bits).totals
    assert f"{totals.plain_residual:.4f} → {totals.residual:.4f}" in found.text
    assert f"{totals.bits_effective:.2f} bits" in found.text and "of the output is the embedding" in found.text
    for directory in (two_bits, mixed):
        one = read_manifest(directory)
        assert one.digest in found.text and one.fingerprint in found.text and one.versions["torch"] in found.text
        assert all(record.sha256 in found.text for record in one.files.values())
    for record in read_manifest(mixed).matrices:
        numbers = f"{record.plain_residual:.4f} plain, {record.residual:.4f} kept, {record.bits} bits"
        assert f"{record.module}: {numbers}" in found.text
    assert len([value for tag, name, value in found.attributes if value.startswith("singular values of")]) == 6


def test_it_is_well_formed_and_refers_to_nothing_outside(two_bits: Path, mixed: Path, tmp_path: Path) -> None:
    content = loftq_cli.report([two_bits, mixed], output=tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(content)
    assert page.faults == []
    assert not re.search(r"https?://|//[a-z]|@import|url\(", content.replace("application/", ""))
    assert not [found for found in page.attributes if found[1] in ("src", "href", "action", "srcset", "data")]
    assert [text for tag, text in page.texts if tag == "script"] == [SCRIPT]
    assert "default-src 'none'" in content and "prefers-color-scheme" in content and "@media print" in content
    assert len(content) < 300_000


def test_the_same_directories_give_the_same_bytes(two_bits: Path, tmp_path: Path) -> None:
    pages = [loftq_cli.report(two_bits, output=tmp_path / name).read_bytes() for name in ("a.html", "b.html")]
    assert pages[0] == pages[1]


def test_names_are_escaped(manifest: Manifest) -> None:
    first = manifest.matrices[0]
    hostile = dataclasses.replace(
        manifest,
        source=HOSTILE,
        architecture=HOSTILE,
        device=HOSTILE,
        notes=(HOSTILE,),
        versions={HOSTILE: HOSTILE},
        files={HOSTILE: next(iter(manifest.files.values()))},
        recipe={**manifest.recipe, "include": [HOSTILE], "init": HOSTILE},
        matrices=(
            dataclasses.replace(first, module=f"layers.0.{HOSTILE}", residual=9.0),
            dataclasses.replace(first, module=HOSTILE, tensor=HOSTILE),
        ),
    )
    content = render_page([collect(HOSTILE, hostile), collect(HOSTILE, hostile)])
    page = Page(content)
    assert page.faults == []
    assert [text for tag, text in page.texts if tag == "script"] == [SCRIPT]
    assert not {"\u202e", "\x1b"} & set(content)
    assert page.text.count("\\u202e") > 10 and not [found for found in page.attributes if found[1].startswith("on")]


def test_secrets_are_removed(manifest: Manifest) -> None:
    token = "hf_" + "a" * 34
    content = render_page([collect("out", dataclasses.replace(manifest, source=f"org/{token}"))])
    assert token not in content


def test_experts_share_a_cell_and_many_matrices_stay_small(manifest: Manifest) -> None:
    many = experts(manifest.matrices[0], layers=40, count=128)
    content = render_page([collect("out", dataclasses.replace(manifest, matrices=many))])
    assert len(many) == 5120 and len(content) < 300_000
    assert "model.layers.7.mlp.experts.down_proj: 128 matrices" in content and "(0.2500 to 0.3500)" in content


def test_the_page_has_a_bound(manifest: Manifest) -> None:
    first = manifest.matrices[0]
    many = tuple(
        dataclasses.replace(first, module=f"model.layers.{layer}.part_{number}.proj", tensor=f"{layer}.{number}")
        for layer in range(1000)
        for number in range(30)
    )
    content = render_page([collect(name, dataclasses.replace(manifest, matrices=many)) for name in ("a", "b")])
    assert len(content) < 3_000_000 and "more layers are not drawn" in content


def test_a_manifest_without_adapters(manifest: Manifest) -> None:
    plain = tuple(
        dataclasses.replace(record, rank=0, residuals=(), best=0, residual=record.plain_residual, adapter_bytes=0)
        for record in manifest.matrices
    )
    totals = dataclasses.replace(manifest.totals, adapter_bytes=0, residual=manifest.totals.plain_residual)
    page = page_of(dataclasses.replace(manifest, matrices=plain, totals=totals))
    assert page.faults == [] and "no adapter" in page.text and "No matrix was iterated." in page.text
    assert "plain → kept:" not in page.text and "of it the adapter" not in page.text


def test_residuals_of_zero(manifest: Manifest) -> None:
    zero = tuple(
        dataclasses.replace(record, plain_residual=0.0, residual=0.0, residuals=(0.0, 0.0))
        for record in manifest.matrices
    )
    totals = dataclasses.replace(manifest.totals, plain_residual=0.0, residual=0.0)
    assert page_of(dataclasses.replace(manifest, matrices=zero, totals=totals)).faults == []


def test_qa_lora(random_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    loftq_cli.quantize(
        random_llama, output=out, method="qa-lora", format="packed", bits=4, rank=4, iters=1, group_size=32
    )
    page = Page(loftq_cli.report(out, output=tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.faults == [] and "qa-lora" in page.text
    worst = max(read_manifest(out).matrices, key=lambda record: record.residual)
    assert f"W − Q − BA, rank {worst.rank}" in page.text


def test_rows_that_differ_are_marked(two_bits: Path, mixed: Path) -> None:
    page = page_of(read_manifest(two_bits), read_manifest(mixed))
    rows = [text for tag, text in page.texts if tag == "th"]
    assert "bits ≠" in rows and "rule ≠" in rows and "format" in rows and "torch" in rows


def test_calibrated_conversions_show_the_error_of_the_outputs(manifest: Manifest) -> None:
    weighted = tuple(
        dataclasses.replace(record, weighted_plain_residual=0.5, weighted_residual=0.2) for record in manifest.matrices
    )
    text = page_of(dataclasses.replace(manifest, matrices=weighted)).text
    assert "0.5000 → 0.2000" in text and "error of the layers' outputs: 60.0% smaller" in text


def test_without_the_source_the_rest_is_shown(two_bits: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    gone = dataclasses.replace(read_manifest(two_bits), source=str(tmp_path / "gone"))
    (moved / NAME).write_bytes(seal(render(gone)))
    page = Page(loftq_cli.report(moved, output=tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "Not computed: the source model is not in a directory here. Name it with --source." in page.text
    assert not [value for _, _, value in page.attributes if value.startswith("singular values of")]
    none = loftq_cli.report(moved, output=tmp_path / "page.html", singular_values=0).read_text(encoding="utf-8")
    assert "Singular values" not in none


def test_a_wrong_source_is_an_error(two_bits: Path, minilm: Path, tmp_path: Path) -> None:
    with pytest.raises(LoftqError, match="is not the model this directory was made from"):
        loftq_cli.report(two_bits, output=tmp_path / "page.html", source=minilm)
    assert not list(tmp_path.iterdir())


def test_only_reports_are_replaced(two_bits: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<html>my own page</html>", encoding="utf-8")
    refused = loftq(two_bits, "-o", page, "--singular-values", "0")
    assert refused.exit_code == 2 and "exists and is not a report" in " ".join(refused.stderr.split())
    assert page.read_text(encoding="utf-8") == "<html>my own page</html>"
    assert loftq(two_bits, "-o", page, "--overwrite", "--singular-values", "0").exit_code == 0
    assert MARK in page.read_text(encoding="utf-8")
    assert loftq(two_bits, "-o", page, "--singular-values", "0").exit_code == 0


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("folder", "is not a regular file"),
        ("link", "is not a regular file"),
        ("nowhere/page.html", "is not a writable directory"),
        ("out/page.html", "lies in"),
        ("out/loftq_init/page.html", "lies in"),
    ],
)
def test_places_that_are_refused(name: str, says: str, two_bits: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "out").symlink_to(two_bits)
    before = sorted(two_bits.rglob("*"))
    with pytest.raises(UsageError, match=says):
        loftq_cli.report(two_bits, output=tmp_path / name, overwrite=True)
    assert sorted(two_bits.rglob("*")) == before and not (tmp_path / "elsewhere").exists()


def test_wrong_arguments(two_bits: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no directory is given"):
        loftq_cli.report([], output=tmp_path / "page.html")
    with pytest.raises(UsageError, match="--singular-values 99"):
        loftq_cli.report(two_bits, output=tmp_path / "page.html", singular_values=99)
    with pytest.raises(LoftqError, match="there is no directory"):
        loftq_cli.report([two_bits, tmp_path / "none"], output=tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_page(two_bits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = loftq_cli.report(two_bits, output=tmp_path / "page.html", singular_values=0)
    before = page.read_bytes()

    def full(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("loftq_cli.reporting.job.os.replace", full)
    with pytest.raises(LoftqError, match="No space left"):
        loftq_cli.report(two_bits, output=page, singular_values=0)
    assert page.read_bytes() == before and list(tmp_path.iterdir()) == [page]


def test_directories_of_the_same_name_are_numbered(two_bits: Path, tmp_path: Path) -> None:
    page = Page(
        loftq_cli.report([two_bits, two_bits], output=tmp_path / "p.html", singular_values=0).read_text("utf-8")
    )
    names = [text for tag, text in page.texts if tag == "h3"]
    assert set(names) == {"two-bits (1)", "two-bits (2)"}


def test_names_break_after_separators() -> None:
    assert breakable("model.layers.0.mlp.gate_proj") == "model.<wbr>layers.<wbr>0.<wbr>mlp.<wbr>gate_<wbr>proj"
    assert breakable("a<b.c'd") == "a&lt;b.<wbr>c&#x27;d"
