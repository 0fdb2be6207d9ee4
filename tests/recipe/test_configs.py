"""The recipes in configs/: each plans on its model's exact shapes, and satisfies a schema that is Recipe's own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
import typer.testing
import yaml
from support.paths import ROOT
from support.shapes import shape_only

import loftq_cli
from loftq_cli.batches.expand import Job, read_jobs
from loftq_cli.cli import app
from loftq_cli.errors import UsageError
from loftq_cli.recipe.model import make_recipe, recipe_fields, recipe_specs

CONFIGS = ROOT / "configs"
# Skip files with fields that this version does not have.
FILES = [
    path
    for path in sorted(CONFIGS.glob("*.yaml"))
    if "mix" in recipe_fields() or "mix" not in yaml.safe_load(path.read_text())
]
JOBS = read_jobs(FILES)
CHOICES = {name: spec.choices for name, spec in recipe_specs().items() if spec.choices}
LEAST = {name: spec.least for name, spec in recipe_specs().items() if spec.least is not None and int in spec.types}
SCHEMA = loftq_cli.recipe_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
runner = typer.testing.CliRunner()


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_every_recipe_can_be_planned(job: Job, tmp_path: Path) -> None:
    assert job.problem is None
    asked = make_recipe(job.recipe)
    plan = loftq_cli.plan(**{**job.recipe, "model": str(shape_only(asked.model))}, output=tmp_path / "out")
    assert not plan.notes, plan.notes
    # Scales cost 8 or 16 bits per block of 64, and a mean is met within 5 %.
    scales = plan.bits_effective - asked.bits
    assert 0.2 < scales < 0.55, plan.bits_effective
    assert {unit.target.rank for unit in plan.matrices if unit.target} == {asked.rank}
    assert plan.backbone_bytes < 0.6 * plan.source_bytes
    embedded = [unit for unit in plan.matrices if unit.kind == "embedding"]
    assert bool(embedded) == (asked.embeddings == "adapt")
    assert not any("vision" in (unit.module or "") for unit in plan.matrices)
    layers = {"facebook/bart-large": 24 * 6 + 12 * 4, "microsoft/deberta-v3-base": 12 * 6 + 1}
    assert len(plan.matrices) == layers.get(asked.model, len(plan.matrices)) and len(plan.matrices) >= 73


def test_the_papers_recipes_are_there() -> None:
    asked = {(job.recipe["model"], job.recipe["bits"], job.recipe["rank"]) for job in JOBS}
    for size in ("7b", "13b"):
        assert {(f"meta-llama/Llama-2-{size}-hf", bits, 64) for bits in (4, 2)} <= asked
    assert {("facebook/bart-large", bits, rank) for bits in (4, 2) for rank in (8, 16)} <= asked
    assert {("microsoft/deberta-v3-base", 2, rank) for rank in (16, 32)} <= asked
    mixed = yaml.safe_load((CONFIGS / "llama-2-mixed.yaml").read_text())
    assert mixed["matrix"]["bits"] == [3, 2.5, 2.25] and mixed["mix"] == "paper" and mixed["rank"] == 64


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_satisfies_the_schema(path: Path) -> None:
    VALIDATOR.validate(yaml.safe_load(path.read_text()))


def test_every_file_names_the_schema_and_says_what_it_is() -> None:
    for path in CONFIGS.glob("*.yaml"):
        first, second = path.read_text().splitlines()[:2]
        assert (
            first == "# yaml-language-server: $schema=recipe.schema.json"
            and second.startswith("# ")
            and second[-1] == "."
        )


def test_the_schema_is_current() -> None:
    printed = runner.invoke(app, ["schema"])
    assert printed.exit_code == 0 and json.loads(printed.stdout) == SCHEMA
    assert (CONFIGS / "recipe.schema.json").read_text() == printed.stdout, "run: python scripts/generate.py"
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_the_schema_has_every_field_with_its_default_and_its_meaning() -> None:
    for name, default in recipe_fields().items():
        described = SCHEMA["properties"][name]
        assert described["description"] and described.get("default") == (
            list(default) if isinstance(default, tuple) else default
        )


def test_schema_and_recipe_agree() -> None:
    assert len(CHOICES) == 15 and LEAST == {"rank": 1, "iters": 0, "calibration_tokens": 1, "seed": 0}
    tried = [{name: value} for name, values in CHOICES.items() for value in (*values, "nonsense", 77, None)]
    tried += [{name: value} for name, least in LEAST.items() for value in (least, least - 1, least + 5, 2.5, "4")]
    tried += [{"rule": value} for value in ("q=2", ["q=2", "k=4:8"], 3)]
    tried += [{"keep_last": value} for value in (True, False, "yes")]
    tried += [{"alpha": value} for value in (16, 8.5, "16")] + [{"no_such_field": 1}, {"meta_version": 3.1}]
    for fields in tried:
        fields |= {"method": "refined"} if {"init", "levels"} & set(fields) else {}
        fields |= {"calibrate": "text.txt"} if fields.get("method") == "ldlq" else {}
        try:
            make_recipe({name: value for name, value in fields.items() if value is not None} | {"model": "m"})
            accepted = None not in fields.values()
        except UsageError:
            accepted = False
        assert VALIDATOR.is_valid({"model": "m", **fields}) == accepted, fields


@pytest.mark.parametrize(
    ("content", "valid"),
    [
        ({"model": "m", "output": "o", "push_to": "a/b"}, True),
        ({"matrix": {"model": ["a", "b"], "bits": [4, 2]}}, True),
        ({"model": "m", "matrix": {"rule": ["a=2", ["b=2", "c=4"]]}}, True),
        ({"bits": 4}, False),
        ({"matrix": {"bits": [4]}}, False),
        ({"model": "m", "matrix": {"bits": 4}}, False),
        ({"model": "m", "matrix": {"bits": [9]}}, False),
        ({"model": "m", "output": ""}, False),
    ],
)
def test_what_the_schema_accepts(content: dict[str, object], valid: bool) -> None:
    assert VALIDATOR.is_valid(content) == valid


def test_the_ci_example_runs_commands_that_exist() -> None:
    workflow = yaml.safe_load((CONFIGS / "ci" / "quantize.yml").read_text())
    steps = workflow["jobs"]["batch"]["steps"]
    lines = [
        line for step in steps for line in step.get("run", "").splitlines() if "loftq " in line and "pip" not in line
    ]
    assert [re.search(r"loftq (\w+)", line)[1] for line in lines] == ["batch", "batch", "push"]
    for line in lines:
        text = runner.invoke(app, [re.search(r"loftq (\w+)", line)[1], "--help"], env={"COLUMNS": "200"}).stdout
        for flag in re.findall(r"--[\w-]+", line):
            assert re.search(rf"{flag}\b", text), (flag, line)
    assert (ROOT / workflow[True]["workflow_dispatch"]["inputs"]["recipes"]["default"]).is_file()
