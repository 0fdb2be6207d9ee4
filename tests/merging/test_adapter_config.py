"""adapter_config.json: an odd file ends in one sentence that names the file and the field."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from loftq_cli.errors import LoftqError
from loftq_cli.merging.adapter_config import CONFIG, read_config

GOOD = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
ODD: dict[str, tuple[dict[str, object], str]] = {
    "alpha text": ({"lora_alpha": "16"}, "lora_alpha must be a number of at most 1e+06, not '16'"),
    "alpha null": ({"lora_alpha": None}, "lora_alpha must be a number of at most 1e+06, not null"),
    "alpha nan": ({"lora_alpha": float("nan")}, "lora_alpha must be a number of at most 1e+06, not nan"),
    "alpha huge": ({"lora_alpha": 1e38}, "lora_alpha must be a number of at most 1e+06, not 1e+38"),
    "alpha endless": ({"lora_alpha": 10**400}, "lora_alpha must be a number of at most 1e+06, not 1000"),
    "alpha true": ({"lora_alpha": True}, "lora_alpha must be a number of at most 1e+06, not True"),
    "rank zero": ({"r": 0}, "r must be a positive integer, not 0"),
    "rank text": ({"r": "x"}, "r must be a positive integer, not 'x'"),
    "pattern list": ({"rank_pattern": [1]}, "rank_pattern must be an object, not [1]"),
    "pattern zero": ({"rank_pattern": {"q": 0}}, "rank_pattern[q] must be a positive integer, not 0"),
    "pattern alpha": ({"alpha_pattern": {"q": "x"}}, "alpha_pattern[q] must be a number of at most 1e+06, not 'x'"),
    "parameters": ({"target_parameters": 5}, "target_parameters must be a list of names, not 5"),
    "saved": ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of names, not 'lm_head'"),
    "tokens": ({"trainable_token_indices": [1, 1]}, "trainable_token_indices must be a list of different token"),
    "flag": ({"use_rslora": "yes"}, "use_rslora must be true or false, not 'yes'"),
    "group zero": ({"use_qalora": True, "qalora_group_size": 0}, "qalora_group_size must be a positive integer, not 0"),
    "group": ({"use_qalora": True, "qalora_group_size": "x"}, "qalora_group_size must be a positive integer, not 'x'"),
}


def written(folder: Path, text: str) -> Path:
    (folder / CONFIG).write_text(text)
    return folder


@pytest.mark.parametrize("what", ODD)
def test_odd_fields_are_named(what: str, tmp_path: Path) -> None:
    fields, said = ODD[what]
    with pytest.raises(LoftqError) as caught:
        read_config(written(tmp_path, json.dumps({**GOOD, **fields})))
    assert str(caught.value).startswith(f"{tmp_path / CONFIG} is damaged ({said}")
    assert str(caught.value).endswith("): save the adapter again.")


@pytest.mark.parametrize("text", ["[1]", "null", "[" * 100_000, "{", '{"r": ' + "9" * 9000 + "}"])
def test_text_that_is_not_an_object(text: str, tmp_path: Path) -> None:
    with pytest.raises(LoftqError, match="is damaged") as caught:
        read_config(written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_invalid_and_endless_patterns(tmp_path: Path) -> None:
    with pytest.raises(LoftqError, match=r"rank_pattern in .* '.*' is not a valid regular expression"):
        read_config(written(tmp_path, json.dumps({**GOOD, "rank_pattern": {"([": 4}})))
    config = read_config(written(tmp_path, json.dumps({**GOOD, "rank_pattern": {"(((a|a)+)+)+b": 4}})))
    started = time.monotonic()
    with pytest.raises(LoftqError, match="takes too long: remove its nested repeats"):
        config.rank_of("a" * 60)
    assert time.monotonic() - started < 10


def test_patterns_match_a_path_or_its_end(tmp_path: Path) -> None:
    fields = {"rank_pattern": {"q_proj": 2, r"layers\.1\.up": 3}, "alpha_pattern": {"up|down": 1.5}}
    config = read_config(written(tmp_path, json.dumps({**GOOD, **fields})))
    assert [config.rank_of(name) for name in ("a.q_proj", "aq_proj", "m.layers.1.up", "layers.11.up")] == [2, 4, 3, 4]
    assert config.scaling_of("m.layers.1.up") == 0.5 and config.scaling_of("x.down") == 1.5 / 4


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"layer_replication": [[0, 1]]}, "replicated layers"),
        ({"alora_invocation_tokens": [3]}, "aLoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the backbone too"),
    ],
)
def test_adapters_that_do_more_than_add_are_refused(field: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(LoftqError, match=said):
        read_config(written(tmp_path, json.dumps({**GOOD, **field})))


@pytest.mark.parametrize(
    "key", ["q_proj", "layers.1.q_proj", "layers.1.q", "q-proj", "", "model.layers.1.q_proj", "1.q_proj"]
)
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.q_proj",
        "model.layers.11.q_proj",
        "layers.1.q_proj",
        "layersx1.q_proj",
        "q_proj",
        "xq_proj",
        "a\n.q_proj",
    ],
)
def test_paths_match_as_the_regular_expressions_that_they_are(key: str, name: str) -> None:
    from loftq_cli.merging.adapter_config import _matches

    assert _matches(key, name, "") == (re.fullmatch(rf"(.*\.)?({key})", name) is not None)


def test_many_patterns(tmp_path: Path) -> None:
    started = time.monotonic()
    paths = {f"model.layers.{i}.q_proj": i + 1 for i in range(20_000)}
    config = read_config(written(tmp_path, json.dumps({**GOOD, "rank_pattern": paths})))
    assert config.rank_of("model.layers.19999.q_proj") == 20_000
    with pytest.raises(LoftqError, match=r"rank_pattern in .* has 2000 regular expressions: leave at most 1000"):
        read_config(written(tmp_path, json.dumps({**GOOD, "rank_pattern": {f"(a+)+{i}": 4 for i in range(2_000)}})))
    assert time.monotonic() - started < 10
