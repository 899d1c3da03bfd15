"""The model card says how the model was made and nothing about the machine."""

import yaml

from kava_jax.hf.card import model_card

CARD = {
    "name": "student-1.5b",
    "base_model": "Qwen/Qwen2.5-1.5B",
    "teachers": ["/data/home/someone/models/Qwen2.5-14B", "builtin:demo_teacher"],
    "recipe": {"loss": "mercator", "kv weight": 4.0, "project": "student→teacher"},
    "metrics": {"alignment gap": 0.41234567, "exact match": None},
    "dataset": "/data/home/someone/gsm8k/train.jsonl",
    "command": "kava train /data/home/someone/a.yaml student.path=~/someone/b run.name=x",
    "versions": {"jax": "0.10.2"},
}


def test_the_front_matter_is_yaml_and_leaves_the_licence_to_the_user():
    front = yaml.safe_load(model_card(**CARD).split("---")[1])
    assert front["base_model"] == "Qwen/Qwen2.5-1.5B"
    assert front["library_name"] == "transformers"
    assert "kava-jax" in front["tags"]
    assert "license" not in front
    local = yaml.safe_load(model_card(**CARD | {"base_model": "/a/b"}).split("---")[1])
    assert "base_model" not in local


def test_the_card_says_how_it_was_made_without_machine_paths():
    card = model_card(**CARD)
    assert "someone" not in card
    for words in (
        "kava train a.yaml student.path=b run.name=x",
        "`Qwen2.5-14B`, `builtin:demo_teacher`",
        "`train.jsonl`",
        "| loss | mercator |",
        "| project | student→teacher |",
        "| alignment gap | 0.412346 |",
        "| exact match | - |",
        "| jax | 0.10.2 |",
    ):
        assert words in card


def test_a_student_without_teachers_is_not_said_to_have_any():
    card = model_card(**CARD | {"teachers": []})
    assert "by cross-entropy alone" in card
    assert "keys and values of" not in card


def test_the_card_says_what_was_followed_and_who_answers_from_whose_cache():
    both = model_card(**CARD, followed=["block outputs", "logits"])
    assert "to follow the block outputs, logits of `Qwen2.5-14B`" in both
    assert "handoff.json" not in both
    card = model_card(**CARD, followed=[], reader="teacher")
    assert "\nnext to `Qwen2.5-14B`" in card
    assert "It can also answer from its teacher's prompt cache: see `handoff.json`" in card
    turned = model_card(**CARD, reader="student")
    assert "Its teacher can also answer from its prompt cache" in turned
