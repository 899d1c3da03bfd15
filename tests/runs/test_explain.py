"""What ``kava explain`` says, against what the configs mean; no weights and no network."""

from pathlib import Path

import pytest

from kava_jax.config.file import load_config, shipped_config
from kava_jax.runs.explain import explain
from tests.tiny import kava

NAMED_JOB = "qwen2.5_14b_to_1.5b_gsm8k.yaml"


def words(*overrides: str, config: str = NAMED_JOB) -> str:
    return explain(load_config(shipped_config(config), overrides))


def test_the_named_job_in_words() -> None:
    text = words()
    assert "700 steps of 32 rows of up to 512 tokens from openai/gsm8k" in text
    assert "48 layers with 8 KV heads of 128; the student has 28 with 2 of 128" in text
    table = [line.split("|") for line in text.splitlines() if line.count("|") == 1][1:]
    pairs = [(int(student), int(teacher)) for student, teacher in table]
    assert pairs[0] == (0, 0)
    assert pairs[-1] == (27, 47)
    assert pairs[13] == (13, 23)  # 13 * 47 / 27 = 22.6
    assert "keys before RoPE and values, head by head" in text
    assert "all but" not in text
    assert "the first 4 of its row" in text
    assert "cannot drift" in text
    assert "Every field that it sets is as it sets it" in text
    assert "dropped at export" in text
    assert "1 x cross-entropy + (1 falling to 0) x KV" in text
    assert "student at 5e-05" in text
    assert "projector at 0.001 with it from the first step" in text
    assert "Every field that it sets is as it sets it." in text
    assert "Beware" not in text


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["recipe=original"],
            ["The target moves with the projector", "Beware: student and target"],
        ),
        (
            ["recipe=calibrated"],
            [
                "the 4 of the 8 nearest teacher layers that fit best together",
                "without their projection's bias",
                "running over past steps",
                "fitted in closed form",
                "stays as it was initialised",
            ],
        ),
        (
            ["recipe=original", "loss.kv.beta=0.05"],
            ["Set otherwise here: loss.kv.beta 0.01 -> 0.05."],
        ),
        (
            ["loss.kv.beta=0.05"],
            [
                "1 - cosine + 0 x (difference",
                "loss.kv.beta=0.05 is off: projector.kind=elastic begins",
            ],
        ),
        (["loss.kv.beta=0.05", "projector.kind=linear"], ["1 - cosine + 0.05 x (difference"]),
        (["teachers.0.control=shuffled"], ["Control: its targets are those of another row"]),
        (["loss.parts=values"], ["Compared: values, head by head"]),
        (["loss.parts=keys"], ["Compared: keys before RoPE, head by head"]),
        (
            ["loss.kv_weight=auto(0.3)"],
            ["0.3 of the language gradient, that of the other terms (measured every 20 steps)"],
        ),
        (["loss.kv_weight={start: 1, end: 0}"], ["(1 falling to 0) x KV"]),
        (
            ["loss.ce_weight={start: 0, end: 1, over: 0.2}"],
            ["(0 rising to 1 over the first 20% of the run) x cross-entropy"],
        ),
        (["loss.kv=hybrid"], ["KV is Hybrid: 0.8 x Mercator (beta 0) + 0.2 x MSE."]),
        (["loss.kv=mse"], ["KV is MSE: the mean squared difference."]),
        (["loss.match=attention"], ["KL of what the space's queries attend to"]),
        (
            ["loss.match=attention_outputs"],
            [
                "Compared: what each layer's attention adds to the residual stream, of every",
                "elastic, one for all layers; it maps",
                "The target is the teacher's own output",
            ],
        ),
        (["loss.match=block_outputs"], ["Compared: the residual stream after each layer, of"]),
        (["loss.kl_weight=0.5"], ["+ 0.5 x logit KL +"]),
        (["loss.kl_weight={start: 0, end: 1}"], ["+ (0 rising to 1) x logit KL +"]),
        (
            [],
            ["the one at its own relative depth (first meets first"],
        ),
        (
            ["teachers.0.path=nowhere/at-all"],
            ["the one that it was cut from where that is known, else the one at its own depth"],
        ),
        (
            ["projector.kind=identity", "student.path=Qwen/Qwen2.5-14B"],
            ["Projector: identity, so both sides' vectors are compared as they are."],
        ),
        (["loss.key_space=post_rope", "loss.sink_tokens=0"], ["keys after RoPE", "first 0 of"]),
        (["projector.training=warmup"], ["alone for the first 100 steps"]),
        (
            ["teachers.1={name: b, path: Qwen/Qwen2.5-7B, weight: 0.5}"],
            ["Teacher b", "with fixed weights (qwen14b 1, b 0.5)"],
        ),
        (["teachers=[]"], ["cross-entropy alone"]),
        (["teachers.0.path=nowhere/at-all"], ["Its geometry was not found here"]),
    ],
)
def test_every_setting_has_its_words(overrides, said) -> None:
    text = words(*overrides)
    assert [part for part in said if part not in text] == []


def test_a_fresh_student_has_no_cache_worth_fitting() -> None:
    overrides = ["recipe=calibrated", "projector.kind=linear"]
    text = words(*overrides, "projector.direction=teacher_to_student", config="demo.yaml")
    assert "Beware: the projector is fitted to the cache of a student with random weights" in text


def test_the_command_prints_it(capsys) -> None:
    ended = kava(capsys, "explain", str(shipped_config(NAMED_JOB)), "recipe=original")
    assert ended.code == 0
    assert ended.out == words("recipe=original") + "\n"
    ended = kava(capsys, "explain", str(Path("none.yaml")))
    assert ended.code == 2
    assert ended.err.count("\n") == 1
