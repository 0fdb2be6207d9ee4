"""The right adapter or none: an adapter that was trained on another conversion is refused, and no other is."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import loftq, sentence
from support.hub_server import HubServer

import loftq_cli
import loftq_cli.runtime
from loftq_cli.checkpoint.trained_on import check_trained_on, conversion_in
from loftq_cli.errors import LoftqError

IDS = torch.arange(24).reshape(2, 12)
RECIPE = {"rank": 2, "iters": 1, "format": "packed"}


@pytest.fixture(scope="module")
def two(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Conversions of one model at two and at four bits, which differ in nothing else."""
    folder = tmp_path_factory.mktemp("two")
    for bits in (2, 4):
        loftq_cli.quantize(random_llama, output=folder / f"{bits}bit", bits=bits, **RECIPE)
    return folder / "2bit", folder / "4bit"


def trained_by(how: str, converted: Path, saved: Path) -> Path:
    """Train one step and save with PEFT itself."""
    from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    if how == "loftq":
        model = loftq_cli.load(converted, trainable=True)
    elif how == "auto":
        model = AutoPeftModelForCausalLM.from_pretrained(str(converted / "loftq_init"), is_trainable=True)
    else:
        backbone = AutoModelForCausalLM.from_pretrained(converted)
        if how == "peft":
            model = PeftModel.from_pretrained(backbone, converted, subfolder="loftq_init", is_trainable=True)
        else:  # an adapter of the user's own, with another rank
            config = LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
            model = get_peft_model(backbone, config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.save_pretrained(saved)
    return saved


def without(adapter: Path, target: Path, **fields: Any) -> Path:
    """Copy an adapter with fields of its config changed, as older versions of loftq and PEFT wrote them."""
    shutil.copytree(adapter, target)
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    return target


@pytest.fixture(scope="module")
def trained(two: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter trained at four bits."""
    return trained_by("loftq", two[1], tmp_path_factory.mktemp("trained") / "adapter")


@pytest.mark.parametrize("how", ["loftq", "peft", "auto", "own"])
def test_whatever_saved_it(how: str, two: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = trained_by(how, two[1], tmp_path / "adapter")
    kept = json.loads((adapter / "adapter_config.json").read_text())["auto_mapping"]
    assert kept == ({"loftq_fingerprint": loftq_cli.read_manifest(two[1]).fingerprint} if how != "own" else None)
    assert check_trained_on(conversion_in(two[1]), adapter) is None
    with pytest.raises(LoftqError, match=r"was not trained on .*2bit"):
        check_trained_on(conversion_in(two[0]), adapter)


def test_merge_load_and_the_command_refuse_it(
    two: tuple[Path, Path], trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = sentence(loftq("merge", two[0], trained, "-o", tmp_path / "merged", code=1))
    assert f"the adapter in {trained} was not trained on {two[0]}" in said and "--force" in said
    assert not (tmp_path / "merged").exists()
    with pytest.raises(LoftqError, match="force=True in Python"):
        loftq_cli.load(two[0], adapter=trained)
    forced = loftq("merge", two[0], trained, "-o", tmp_path / "merged", "--force")
    assert "note: the adapter in" in forced.stderr and (tmp_path / "merged" / "config.json").exists()
    with caplog.at_level(logging.WARNING):
        model = loftq_cli.load(two[0], adapter=trained, force=True)
    assert "was not trained on" in caplog.text
    stored = load_file(trained / "adapter_model.safetensors")
    assert all(
        torch.equal(model.state_dict()[name.replace(".weight", ".default.weight")], stored[name]) for name in stored
    )
    assert loftq("merge", two[1], trained, "-o", tmp_path / "right").stderr == ""


def test_moved_renamed_linked_and_relative(
    two: tuple[Path, Path],
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With the fingerprint, and without it, as adapters of 0.1.0 are saved."""
    old = without(trained, tmp_path / "old", auto_mapping=None)
    moved, link = tmp_path / "elsewhere" / "renamed", tmp_path / "link"
    shutil.copytree(two[1], moved)
    link.symlink_to(two[1])
    relative = without(
        trained, tmp_path / "relative", auto_mapping=None, base_model_name_or_path="./renamed/../renamed"
    )
    monkeypatch.chdir(moved.parent)
    with caplog.at_level(logging.WARNING):
        for place in (two[1], moved, link, Path("renamed"), Path("..") / "elsewhere" / "renamed"):
            for adapter in (trained, old, relative, without(old, tmp_path / f"x{len(str(place))}", revision="main")):
                assert check_trained_on(conversion_in(place), adapter) is None, (place, adapter)
            shutil.rmtree(tmp_path / f"x{len(str(place))}")
        loftq_cli.load("renamed", adapter=old)
    assert not caplog.records
    with pytest.raises(LoftqError, match=r"was not trained on .*2bit \(but on .*4bit\)"):
        check_trained_on(conversion_in(two[0]), old)
    with pytest.raises(LoftqError, match=r"was not trained on .*2bit \(but on \./renamed"):
        check_trained_on(conversion_in(two[0]), relative)


def test_pushed_and_downloaded(two: tuple[Path, Path], hub: HubServer, tmp_path: Path) -> None:
    """The repository's copy, an adapter trained on it, and the directory that was pushed."""
    from loftq_cli.artifacts.manifest import read_manifest
    from loftq_cli.publishing.stage import Destination, published_texts

    downloaded = tmp_path / "downloaded"
    shutil.copytree(two[1], downloaded)
    for name, text in published_texts(two[1], read_manifest(two[1]), Destination("org/out", None)).items():
        (downloaded / name).write_bytes(text)
    hub.add("org/out", downloaded)
    adapter = trained_by("loftq", downloaded, tmp_path / "adapter")
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/out"
    old = without(adapter, tmp_path / "old", auto_mapping=None)
    for place in (downloaded, two[1]):
        assert check_trained_on(conversion_in(place), adapter) is None
    assert check_trained_on(conversion_in(downloaded), old) is None
    note = check_trained_on(conversion_in(two[1]), old)
    assert note is not None and "names org/out as its model, which is not here" in note
    assert loftq_cli.load("org/out", adapter=adapter) is not None
    with pytest.raises(LoftqError, match="was not trained on org/out"):
        loftq_cli.load("org/out", adapter=two[0] / "loftq_init")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"r": 4}, "r is 4, not 2"),
        ({"lora_alpha": 7}, "lora_alpha is 7, not 2"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is {'q_proj': 8}, not None"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern is"),
        ({"target_modules": ["q_proj"]}, "its target_modules differ"),
    ],
)
def test_where_its_model_is_not_here_the_config_decides(
    fields: dict[str, Any], said: str, two: tuple[Path, Path], trained: Path, tmp_path: Path
) -> None:
    unknown = {"auto_mapping": None, "base_model_name_or_path": "org/somewhere"}
    note = check_trained_on(conversion_in(two[1]), without(trained, tmp_path / "same", **unknown))
    assert note is not None and "nothing tells" in note
    other = without(trained, tmp_path / "other", **unknown, **fields)
    with pytest.raises(LoftqError) as caught:
        check_trained_on(conversion_in(two[1]), other)
    assert said in str(caught.value)
    assert said in str(check_trained_on(conversion_in(two[1]), other, force=True))


def test_an_adapter_of_ones_own_named_by_a_path_from_elsewhere(
    two: tuple[Path, Path], trained: Path, tmp_path: Path
) -> None:
    """Another rank than the start's is no evidence where the name fits: at most a note."""
    own = {"auto_mapping": None, "r": 8, "target_modules": ["q_proj"]}
    for base in ("4bit", "../runs/4bit", "org/4bit"):
        adapter = without(trained, tmp_path / base.replace("/", "_"), base_model_name_or_path=base, **own)
        note = check_trained_on(conversion_in(two[1]), adapter)
        assert note is not None and f"names {base} as its model" in note


def test_trained_on_the_full_precision_model(
    two: tuple[Path, Path], trained: Path, random_llama: Path, tmp_path: Path
) -> None:
    source = without(trained, tmp_path / "source", auto_mapping=None, base_model_name_or_path=str(random_llama))
    with pytest.raises(LoftqError, match="but on its source"):
        check_trained_on(conversion_in(two[1]), source)


def test_factors_of_another_shape_are_one_sentence(two: tuple[Path, Path], trained: Path, tmp_path: Path) -> None:
    """`--force` cannot help: PEFT's own message has a line for every tensor."""
    odd = without(trained, tmp_path / "odd")
    tensors = load_file(odd / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, name: torch.zeros(2, 7)}, odd / "adapter_model.safetensors")
    with pytest.raises(LoftqError, match="does not fit LlamaForCausalLM") as caught:
        loftq_cli.load(two[1], adapter=odd, force=True)
    assert "\n" not in str(caught.value)
    assert "give the adapter of this model" in sentence(
        loftq("merge", two[1], odd, "-o", tmp_path / "m", "--force", code=1)
    )


def test_damaged_files_are_one_sentence(two: tuple[Path, Path], trained: Path, tmp_path: Path) -> None:
    damaged = without(trained, tmp_path / "damaged", auto_mapping=["x"])
    assert check_trained_on(conversion_in(two[1]), damaged) is None
    (damaged / "adapter_config.json").write_text("[")
    with pytest.raises(LoftqError, match="is not valid JSON"):
        check_trained_on(conversion_in(two[1]), damaged)
