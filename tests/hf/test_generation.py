"""Where answers end: every form of ``eos_token_id``, in either file, from the first moment on."""

import json
import re

import pytest

from kava_jax.config.file import load_config
from kava_jax.errors import KavaError
from kava_jax.hf.generation import end_ids
from kava_jax.runs.prepare import prepare
from tests.tiny import write_workspace


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ({"eos_token_id": 7}, {"eos_token_id": 2}, {7}),
        ({"eos_token_id": [7, 9]}, {}, {7, 9}),
        ({"eos_token_id": None}, {"eos_token_id": 2}, set()),
        ({}, {"eos_token_id": 2}, set()),
        (None, {"eos_token_id": [2, 3]}, {2, 3}),
        (None, {}, set()),
    ],
)
def test_ends_are_read_as_transformers_reads_them(tmp_path, generation, config, ends):
    from transformers import AutoConfig, GenerationConfig

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"} | config))
    theirs = GenerationConfig.from_model_config(AutoConfig.for_model("qwen2", **config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        theirs = GenerationConfig.from_pretrained(tmp_path)
    listed = theirs.eos_token_id
    listed = listed if isinstance(listed, list) else [] if listed is None else [listed]
    assert end_ids(tmp_path) == set(listed) == ends


@pytest.mark.parametrize("given", ["</s>", [2, "</s>"], [[2]], True, 2.0, -1, {"id": 2}])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_what_is_no_id_is_named(tmp_path, given, file):
    (tmp_path / file).write_text(json.dumps({"eos_token_id": given}))
    with pytest.raises(KavaError, match=re.escape(f"{file}: eos_token_id={given!r} is neither")):
        end_ids(tmp_path)


def test_a_run_knows_its_ends_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(write_workspace(tmp_path))
    path = tmp_path / "student" / "generation_config.json"
    own = json.loads((tmp_path / "student" / "config.json").read_text())["eos_token_id"]
    for given, more in ((None, []), ([own, 7], [7]), (9, [9])):
        path.write_text(json.dumps({"eos_token_id": given}))
        assert prepare(load_config(tmp_path / "tiny.yaml")).end_ids == tuple(sorted([own, *more]))
