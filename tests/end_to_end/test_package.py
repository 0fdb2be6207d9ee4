"""The distribution: what is in the wheel, what its page on a package index says, and what imports without extras."""

from __future__ import annotations

import email
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from support.paths import ROOT

import loftq_cli
from loftq_cli._version import REQUIREMENT

CONFIGS = ROOT / "configs"
EXTRAS = (
    "bitsandbytes", "compressed_tensors", "datasets", "gguf", "gptqmodel", "jsonschema", "matplotlib", "optimum",
    "peft", "pyarrow", "sentencepiece", "triton", "trl",
)  # fmt: skip
BUILT_FROM = ("pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE")


def shipped_configs() -> dict[str, bytes]:
    paths = [path for path in CONFIGS.rglob("*") if path.is_file()]
    return {path.relative_to(CONFIGS).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source distribution, and a wheel built from it."""
    for module in ("build", "setuptools"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed (extra 'dev')")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, source)
    skipped = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("loftq_cli", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skipped)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def test_the_wheel_holds_the_package_and_the_configs(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as wheel:
        held = {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}
    prefix = "loftq_cli/configs/"
    expected = shipped_configs()
    assert {name.removeprefix(prefix): held[name] for name in held if name.startswith(prefix)} == expected
    assert "recipe.schema.json" in expected and "ci/quantize.yml" in expected
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "loftq_cli").rglob("*.py")}
    text = {f"loftq_cli/calibration/default/{name}" for name in ("text.txt", "README.md")}
    assert {name for name in held if not name.startswith(prefix)} == code | text | {"loftq_cli/py.typed"}


def test_the_metadata_is_complete(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(wheel.read(name))
        entry_points = wheel.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert metadata["Author"] == "The loftq authors" and metadata["License-Expression"] == "Apache-2.0"
    classifiers = metadata.get_all("Classifier")
    assert classifiers is not None
    for minor in range(10, 15):
        assert f"Programming Language :: Python :: 3.{minor}" in classifiers
    urls = dict(line.split(", ", 1) for line in metadata.get_all("Project-URL") or ())
    assert {"Homepage", "Documentation", "Repository", "Issues", "Changelog"} <= urls.keys()
    assert all(url.startswith(urls["Repository"]) for url in urls.values()), urls
    assert "loftq = loftq_cli.cli:main" in entry_points
    assert metadata["Keywords"] and metadata["Requires-Python"] == ">=3.10"


def test_the_page_on_a_package_index_has_no_relative_links() -> None:
    targets = re.findall(r"\]\(([^)\s]+)|(?:src|href)=\"([^\"]+)\"", (ROOT / "README.md").read_text(encoding="utf-8"))
    relative = [link or attribute for link, attribute in targets if not re.match("https?://|#", link or attribute)]
    assert relative == []


def test_twine_accepts_both(distributions: tuple[Path, Path]) -> None:
    pytest.importorskip("twine", reason="twine is not installed (extra 'dev')")
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, distributions)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout + done.stderr


def test_configs_are_found_without_an_installation() -> None:
    found = files("loftq_cli.configs")
    for name, content in shipped_configs().items():
        assert found.joinpath(name).read_bytes() == content


def test_every_module_imports_without_the_extras() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    declared = re.search(r"^dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)
    assert declared is not None
    base = {name.replace("-", "_") for name in re.findall(r'"([\w-]+)', declared[1])}
    assert {"transformers", "peft"} <= base and "bitsandbytes" not in base
    missing = [name for name in EXTRAS if name not in base]
    command = [sys.executable, str(ROOT / "scripts" / "check_imports.py"), "--without", *missing]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.endswith("0 failed\n"), done.stdout + done.stderr


def test_what_loading_needs_is_a_base_dependency_and_old_extras_remain(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(wheel.read(name))
    base = {re.split(r"[^\w-]", line)[0] for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line}
    assert {"peft", "transformers", "accelerate"} <= base
    extras = {"train", "bnb", "gptq", "compressed-tensors", "gguf", "demo", "docs", "dev"}
    assert extras <= set(metadata.get_all("Provides-Extra", []))


def test_every_install_line_is_the_one_that_works() -> None:
    name, *place = REQUIREMENT.split(" ", 1)
    right = re.compile(rf"{name}(\[[\w,-]+\])?{''.join(f' {re.escape(part)}' for part in place)}(?![\w.=/@-])")
    files = [
        ROOT / "README.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").iterdir(),
        *CONFIGS.rglob("*.y*ml"),
    ]
    lines = [
        (path.name, line) for path in files if path.is_file() for line in path.read_text(encoding="utf-8").splitlines()
        if "pip install" in line and "loftq-cli" in line
    ]  # fmt: skip
    assert len(lines) >= 8 and [(file, line) for file, line in lines if not right.search(line)] == []


def test_ci_runs_every_python_that_is_declared() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    declared = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python-version"] == declared
    assert declared[0] == workflow["jobs"]["base"]["steps"][1]["with"]["python-version"], "the oldest, without extras"
    runs = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    named = {name for run in runs for name in re.findall(r"\bscripts/[\w.]+", run)}
    assert named and all((ROOT / name).is_file() for name in named), named


def test_the_changelog_has_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## \[([\d.]+)\] - (Unreleased|\d{4}-\d\d-\d\d)$", text, re.MULTILINE)
    assert loftq_cli.__version__ in dict(sections)
    assert all(f"\n[{version}]: https://" in text for version, _ in sections)
