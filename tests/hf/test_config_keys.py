"""Every key of public ``config.json`` forms: read, without a say, or refused by name."""

import json

import pytest

from kava_jax.errors import KavaError
from kava_jax.hf.config_json import FAMILIES, spec_from_config
from kava_jax.hf.config_keys import (
    IGNORED,
    READ,
    REFUSED,
    note_unknown,
    refuse_unknown,
    unknown_keys,
)
from tests.hf.config_forms import FORMS, NOT_SUPPORTED
from tests.hf.test_config_json import agrees


class Watched(dict):
    """Remembers which keys it was asked for."""

    def __init__(self, values):
        super().__init__(values)
        self.asked = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)


def test_the_forms_are_many_and_the_lists_are_apart():
    assert len(FORMS) >= 25
    assert {form["model_type"] for form in FORMS.values()} == set(FAMILIES)
    assert len(READ | IGNORED | REFUSED.keys()) == sum(map(len, (READ, IGNORED, REFUSED)))


@pytest.mark.parametrize("name", FORMS)
def test_a_public_form_is_read_as_transformers_reads_it(name):
    from transformers import AutoConfig

    form = Watched(FORMS[name])
    spec = spec_from_config(form, where=name)
    assert unknown_keys(form) == []
    # What is on the list of keys that are read is read, and nothing else is.
    assert form.asked - REFUSED.keys() <= READ
    fields = {k: v for k, v in json.loads(json.dumps(form)).items() if k != "model_type"}
    theirs = AutoConfig.for_model(form["model_type"], **fields)
    theirs.standardize_rope_params()  # as the rotary module does first of all
    agrees(spec, theirs)


def test_every_key_on_the_list_is_read_in_some_form():
    asked = {"eos_token_id"}  # by hf.generation
    for form in FORMS.values():
        watched = Watched(form)
        spec_from_config(watched, where="form")
        asked |= watched.asked
    assert asked >= READ


@pytest.mark.parametrize("name", NOT_SUPPORTED)
def test_what_would_be_computed_otherwise_is_refused_by_name(name):
    form, words = NOT_SUPPORTED[name]
    with pytest.raises(KavaError) as error:
        spec_from_config(form, where=name)
    assert words in str(error.value)


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_a_neutral_value_of_a_refused_key_is_no_matter(key):
    form = FORMS["TinyLlama-1.1B"]
    want = spec_from_config(form, where="plain")
    for value in (None, False, *REFUSED[key]):
        assert spec_from_config(form | {key: value}, where=key) == want
    with pytest.raises(KavaError, match=f"{key}=7 is not supported"):
        spec_from_config(form | {key: 7}, where=key)


def test_a_key_on_no_list_is_said_of_a_model_and_refused_in_a_geometry():
    form = FORMS["TinyLlama-1.1B"]
    assert note_unknown(form, "teachers.big") is None
    strange = form | {"rope_thetta": 1e6, "my_note": "x"}
    note = note_unknown(strange, "teachers.big")
    assert note is not None
    assert note.endswith("not read: rope_thetta, my_note")
    with pytest.raises(KavaError, match=r"rope_thetta=.*did you mean rope_theta\?"):
        refuse_unknown(strange, "student.geometry")
    with pytest.raises(KavaError, match="my_note='x' is no key of these models; remove it"):
        refuse_unknown(form | {"my_note": "x"}, "student.geometry")


@pytest.mark.parametrize("key", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
def test_a_text_is_no_truth_value(key):
    with pytest.raises(KavaError, match=f"{key}='false' is neither true nor false"):
        spec_from_config(FORMS["TinyLlama-1.1B"] | {key: "false"}, where="model")
