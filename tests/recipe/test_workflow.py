"""The workflow in configs/ci: its steps are run with stubs of curl and loftq, in the order and under the conditions of
GitHub Actions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.paths import ROOT

WORKFLOW = yaml.safe_load((ROOT / "configs" / "ci" / "quantize.yml").read_text(encoding="utf-8"))
JOB = WORKFLOW["jobs"]["batch"]
STEPS: list[dict[str, Any]] = JOB["steps"]
ACCOUNT = {"name": "someone", "orgs": [{"name": "some-org"}], "auth": {"accessToken": {"role": "write"}}}


def step(name: str) -> dict[str, Any]:
    (found,) = (step for step in STEPS if step.get("name") == name)
    return found


def place(name: str) -> int:
    return STEPS.index(step(name))


def run(name: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a step's script as GitHub does, with the stubs in `folder/bin` first on the path."""
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    values = {"PATH": path, "GITHUB_RUN_ID": "7", "GITHUB_ENV": str(folder / "env"), "HF_TOKEN": "", **environment}
    values["GITHUB_OUTPUT"] = str(folder / "output")
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step(name)["run"]]
    return subprocess.run(command, cwd=folder, env=values, capture_output=True, text=True, timeout=60)


def stub(folder: Path, name: str, script: str) -> None:
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / "bin" / name).chmod(0o755)


CHECK = "Check the token"


@pytest.mark.parametrize(
    ("account", "target", "said"),
    [
        (ACCOUNT, "someone", ""),
        (ACCOUNT, "some-org", ""),
        (ACCOUNT, "another-org", "someone, who cannot push to another-org"),
        ({**ACCOUNT, "auth": {"accessToken": {"role": "read"}}}, "someone", "may only read"),
        ({"name": "someone"}, "someone", ""),
    ],
)
def test_the_token_is_checked(account: dict[str, object], target: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "answer").write_text(json.dumps(account))
    stub(tmp_path, "curl", 'echo "$@" > asked; cp answer account.json')
    done = run(CHECK, tmp_path, HF_TOKEN="hf_secret", PUSH_TO=target)
    assert (done.returncode != 0) == bool(said) and said in done.stderr, done.stderr
    assert "Bearer hf_secret" in (tmp_path / "asked").read_text() and "hf_secret" not in done.stdout + done.stderr


def test_a_missing_or_wrong_token_ends_the_run(tmp_path: Path) -> None:
    stub(tmp_path, "curl", "exit 22")
    missing = run(CHECK, tmp_path, PUSH_TO="someone")
    assert missing.returncode == 1 and "::error::There is no secret HF_TOKEN" in missing.stdout
    assert run(CHECK, tmp_path, HF_TOKEN="wrong", PUSH_TO="someone").returncode == 22
    assert place(CHECK) == 0 and step(CHECK)["if"] == "${{ inputs.push_to != '' }}"


def test_what_is_finished_leaves_the_cache_and_is_left_out_by_a_second_attempt(tmp_path: Path) -> None:
    recipes = {"RECIPES": "a.yaml b.yaml c.yaml", "PUSH_TO": "some-org"}
    assert run("Leave out the recipes that earlier attempts of this run finished", tmp_path, **recipes).returncode == 0
    assert (tmp_path / "env").read_text() == "RECIPES= a.yaml b.yaml c.yaml\n"
    outcomes = [
        {"file": "a.yaml", "output": "converted/a", "status": "done"},
        {"file": "b.yaml", "output": "converted/b-2", "status": "finished"},
        {"file": "b.yaml", "output": "converted/b-4", "status": "interrupted"},
        {"file": "c.yaml", "output": "converted/c", "status": "failed"},
    ]
    for outcome in outcomes:
        (tmp_path / outcome["output"]).mkdir()
    (tmp_path / "reports" / "summary.json").write_text(json.dumps({"recipes": outcomes}))
    moved = run("Move what this run finished", tmp_path, **recipes)
    assert moved.returncode == 0, moved.stderr
    assert {path.name for path in (tmp_path / "finished").iterdir()} == {"a", "b-2"}
    assert {path.name for path in (tmp_path / "converted").iterdir()} == {"b-4", "c", "finished-7.txt"}
    assert (tmp_path / "output").read_text() == "count=2\n"
    stub(tmp_path, "loftq", 'echo "$@" >> pushed; [[ "$2" != finished/a/ ]]')
    pushed = run("Push what this run finished", tmp_path, **recipes)
    assert pushed.returncode == 1, "a push that fails is reported, but does not stop the others"
    assert (tmp_path / "pushed").read_text().splitlines() == [
        "push finished/a/ some-org/a --private",
        "push finished/b-2/ some-org/b-2 --private",
    ]
    (tmp_path / "env").unlink()
    again = run("Leave out the recipes that earlier attempts of this run finished", tmp_path, **recipes)
    assert again.returncode == 0 and (tmp_path / "env").read_text() == "RECIPES= b.yaml c.yaml\n"
    (tmp_path / "env").unlink()
    other = "Leave out the recipes that earlier attempts of this run finished"
    assert run(other, tmp_path, **recipes, GITHUB_RUN_ID="8").returncode == 0
    assert (tmp_path / "env").read_text() == "RECIPES= a.yaml b.yaml c.yaml\n"
    assert not (tmp_path / "converted" / "finished-7.txt").exists()


def test_a_conversion_that_takes_too_long_is_interrupted_in_time_to_be_kept(tmp_path: Path) -> None:
    convert = step("Convert")
    command = convert["run"].split()
    assert command[:4] == ["timeout", "--signal=INT", "--kill-after=120", "270m"]
    assert 270 < convert["timeout-minutes"] < JOB["timeout-minutes"] < 360
    later = convert["timeout-minutes"] + step("Push what this run finished")["timeout-minutes"]
    assert later + 20 < JOB["timeout-minutes"], "installing and uploading take time too"
    stub(tmp_path, "loftq", "trap 'echo kept > state; exit 130' INT; while :; do sleep 0.05; done")
    quick = step("Convert")["run"].replace("270m", "0.5s")
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    environment = {"PATH": path, "RECIPES": "a.yaml"}
    done = subprocess.run(["bash", "-ec", quick], cwd=tmp_path, env=environment, timeout=60)
    assert done.returncode != 0 and (tmp_path / "state").read_text() == "kept\n"


def test_the_cache_is_saved_whatever_happens_and_under_a_new_key() -> None:
    save, restore = step("Keep what is unfinished"), step("Restore what an earlier run did not finish")
    assert save["if"] == "always()" and save["with"]["path"] == restore["with"]["path"] == "converted"
    key = "converted-${{ github.run_id }}-${{ github.run_attempt }}"
    assert save["with"]["key"] == restore["with"]["key"] == key
    assert restore["with"]["restore-keys"].split("\n")[:2] == ["converted-${{ github.run_id }}-", "converted-"]
    names = ["Convert", "Move what this run finished", "Push what this run finished", "Keep what is unfinished"]
    assert sorted(names, key=place) == names
    for name in names[1:3]:
        assert "!cancelled()" in step(name)["if"], "a conversion that was interrupted does not lose the others"
