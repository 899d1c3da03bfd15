"""Our exact match against lm-evaluation-harness itself, on the task file that we ship.

The harness comes from ``pip install lm_eval accelerate`` and needs torch. It is run in this process
on local files: nothing is fetched.
"""

import itertools
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import yaml

import kava_jax
from kava_jax.config.file import parse_config
from kava_jax.config.run import EvalConfig
from kava_jax.data.dataset import HeldOut
from kava_jax.data.problems import word_problems
from kava_jax.data.sources import load_examples
from kava_jax.data.text import Encoder
from kava_jax.data.tokenizer import load_tokenizer
from kava_jax.evaluation.answers import can_be_met, flexible_answer, same, strict_answer
from kava_jax.evaluation.exact_match import STOPS
from kava_jax.hf.export import export_model
from kava_jax.hf.load import load_decoder_params, read_spec
from kava_jax.runs.evaluate import answer
from kava_jax.runs.prepare import prepare

TASK = Path(kava_jax.__file__).parent / "assets" / "lm_eval" / "kava_gsm8k.yaml"
TEACHER = Path(kava_jax.__file__).parent / "assets" / "demo_teacher"
NEW_TOKENS = 52  # fewer than some answers take, so that they are cut
RULES = {"strict-match": strict_answer, "flexible-extract": flexible_answer}

MISSING = [name for name in ("lm_eval", "accelerate", "torch") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"{', '.join(MISSING)} not installed: pip install lm_eval accelerate"
)


class Judged(NamedTuple):
    """What the harness says of every row, in the order of the file, and its averages."""

    prompts: list[str]
    texts: list[str]
    right: dict[str, list[bool]]
    figures: dict[str, float]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """The harness as a function of a model and a task; its copies of data stay in a folder here."""
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    def run(model: Any, task: str, **options: Any) -> Judged:
        tasks = TaskManager(include_path=TASK.parent, include_defaults=False)
        found = simple_evaluate(model, tasks=[task], task_manager=tasks, **options)
        ((name, samples),) = found["samples"].items()
        rows = {rule: [s for s in samples if s["filter"] == rule] for rule in RULES}
        for of_rule in rows.values():
            of_rule.sort(key=lambda sample: sample["doc_id"])
        return Judged(
            [sample["arguments"][0][0] for sample in rows["strict-match"]],
            [sample["resps"][0][0] for sample in rows["strict-match"]],
            {rule: [bool(s["exact_match"]) for s in rows[rule]] for rule in RULES},
            {key: value for key, value in found["results"][name].items() if "match" in key},
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield run


def write_jsonl(path: Path, rows) -> Path:
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Problems that the teacher solves, and longer and larger ones, where it often fails."""
    mixtures = {"all": 16, "longer": 24, "larger": 24}
    rows = [row for name, n in mixtures.items() for row in word_problems("test", 0, n, name)]
    path = tmp_path_factory.mktemp("questions") / "problems.jsonl"
    return write_jsonl(path, ((row.prompt, row.answer) for row in rows))


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """An export that errs in many ways: the teacher with noise and a weak end token.

    Sometimes it does not stop after ``#### 14``, and what follows misleads the flexible rule.
    """
    spec = read_spec(TEACHER)
    rng = np.random.default_rng(0)

    def noisy(weight: Any) -> np.ndarray:
        noise = 1 + 0.2 * rng.standard_normal(weight.shape)
        return np.asarray(weight) * noise.astype(np.float32)

    params = jax.tree.map(noisy, load_decoder_params(TEACHER, spec))
    params["embed"]["embedding"][0] *= 0.2  # the end token's row, which the tied head shares
    out = tmp_path_factory.mktemp("student") / "exported"
    export_model(out, params, spec, dtype="float32", tokenizer=TEACHER, card="")
    return out


@pytest.fixture(scope="module")
def by_harness(judge, student, questions, tmp_path_factory) -> Judged:
    """The student judged by a task file of the user's own, as the guide shows it."""
    import torch

    torch.set_num_threads(1)  # matrices this small only lose by being split
    own = tmp_path_factory.mktemp("task") / "own.yaml"
    own.write_text(
        f"include: {TASK}\ntask: own\ndataset_kwargs: {{data_files: {{test: {questions}}}}}\n"
    )
    return judge(
        "hf",
        str(own),
        model_args={"pretrained": str(student), "dtype": "float32"},
        device="cpu",
        batch_size=16,
        gen_kwargs={"max_gen_toks": NEW_TOKENS},
    )


def test_the_prompts_are_those_we_train_on(by_harness, student, questions):
    tokenizer = load_tokenizer(student)
    encoder = Encoder(tokenizer)
    examples = load_examples(questions)
    assert len(by_harness.prompts) == len(examples) == 64
    for prompt, example in zip(by_harness.prompts, examples, strict=True):
        assert tokenizer(prompt)["input_ids"] == encoder.encode_prompt(example).tolist()


def test_our_rules_score_the_harness_s_generations_as_it_does(by_harness, questions):
    examples = load_examples(questions)
    for rule, extract in RULES.items():
        ours = [
            same(extract(text), example.answer)
            for text, example in zip(by_harness.texts, examples, strict=True)
        ]
        assert ours == by_harness.right[rule]
        assert sum(ours) / len(ours) == by_harness.figures[f"exact_match,{rule}"]
    # All four outcomes occur, so that no rule could stand in for the other.
    outcomes = set(zip(*by_harness.right.values(), strict=True))
    assert outcomes == set(itertools.product((False, True), repeat=2))


def test_our_own_generation_gives_the_same_texts_and_figures(by_harness, student, questions):
    fields = {"student": {"path": str(student)}, "data": {"path": str(questions), "batch_size": 32}}
    limits = [f"eval.max_new_tokens={NEW_TOKENS}", "eval.batch_size=64"]
    run = prepare(parse_config(fields, limits))
    held = HeldOut.of(load_examples(questions), run.encoder)
    ours = answer(run, held, run.blueprint.load_student())
    assert [sample.generated for sample in ours.samples] == by_harness.texts
    lengths = [len(run.tokenizer(text)["input_ids"]) for text in by_harness.texts]
    assert min(lengths) < NEW_TOKENS == max(lengths)  # some end by themselves, some are cut
    theirs = by_harness.figures
    assert ours.strict == theirs["exact_match,strict-match"]
    assert ours.flexible == theirs["exact_match,flexible-extract"]
    assert ours.strict_error == pytest.approx(theirs["exact_match_stderr,strict-match"])
    assert ours.flexible_error == pytest.approx(theirs["exact_match_stderr,flexible-extract"])


TEXTS = (
    "12+7=<<12+7=19>>19\n#### 19",
    "#### 18 apples",
    "#### 18.",
    "#### 18..",
    "#### 18.0",
    "#### $18",
    "#### 18$",
    "####18",
    "#### 1 8",
    "#### -18",
    "#### - 18",
    "\u221218",
    "####  18",
    "#### \n18",
    "#### 3\n#### 18",
    "#### 18\n#### 3",
    "#### x\n#### 18",
    "#### 18\n\nQ 7",
    "#### 1,234",
    "#### 1.234",
    "He pays $1,234.00 a year",
    "He pays $18.00",
    "He pays $18.00.",
    "costs 18$ or $.18",
    "It is 18 ...",
    "It is 18, no",
    "18%",
    "1/8",
    "the answer is eighteen",
    "\u0661\u0668",
    "...",
    "#### ,",
    "#### .",
    "$",
    "[invalid]",
    "",
    "\n",
)
GOLDS = (
    "9*2=<<9*2=18>>18\n#### 18",
    "#### 3",
    "#### -18",
    "#### 1,234",
    "#### 1234",
    "#### $18.00",
    "#### 18.",
    "#### 18..",
    "#### 18 apples",
    "#### 3\n#### 18",
    "#### 19 ",
    "#### [INVALID]",
    "####18",
    "18",
)


def judged_texts(judge, cases, tmp_path, monkeypatch) -> Judged:
    """(text, gold) pairs through all of the harness but its model."""
    from lm_eval.api.model import LM

    class Parrot(LM):
        def generate_until(self, requests, disable_tqdm=False):
            return [cases[int(request.doc["question"])][0] for request in requests]

        def loglikelihood(self, requests, disable_tqdm=False):
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    write_jsonl(tmp_path / "test.jsonl", ((str(i), gold) for i, (_, gold) in enumerate(cases)))
    monkeypatch.chdir(tmp_path)
    return judge(Parrot(), "kava_gsm8k")


def test_every_nasty_text_against_every_answer(judge, tmp_path, monkeypatch):
    """Rows are read from ``test.jsonl``."""
    cases = list(itertools.product(TEXTS, GOLDS))

    judged = judged_texts(judge, cases, tmp_path, monkeypatch)
    assert judged.texts == [text for text, _ in cases]
    for rule, extract in RULES.items():
        assert 0 < sum(judged.right[rule]) < len(cases)
        for (text, gold), theirs in zip(cases, judged.right[rule], strict=True):
            assert same(extract(text), gold) == theirs, (rule, text, gold)


def awkward_answers() -> list[str]:
    """200 final answers as people write them, each behind worked lines."""
    numbers = ("18", "1,234", "-7", "0.5", "12.", "1234567.89", "+3", "007", ".5", "1 000")
    shapes = (
        "#### {}",
        "#### ${}",
        "#### {}%",
        "#### {} apples",
        "#### {}/2",
        "#### {} 1/2",
        "#### {}:30",
        "#### {}kg",
        "#### \u20ac{}",
        "#### {}\n",
        "#### about {}",
        "#### 3\n#### {}",
        "#### {} #### 4",
        "####{}",
        "####  {}",
        "### {}",
        "**{}**",
        "{}",
        "#### {}e3",
        "#### \u2212{}",
    )
    return [f"2+2=<<2+2=4>>4\n{shape.format(number)}" for number in numbers for shape in shapes]


def test_awkward_answers_against_the_harness(judge, tmp_path, monkeypatch):
    """Each answer copied word for word, and answered by its neighbours, by the harness's rules."""
    golds = awkward_answers()
    assert len(set(golds)) == 200
    cases = [
        (golds[(i + shift) % 200], gold) for shift in (0, 1, 20) for i, gold in enumerate(golds)
    ]

    judged = judged_texts(judge, cases, tmp_path, monkeypatch)
    for rule, extract in RULES.items():
        ours = [same(extract(text), gold) for text, gold in cases]
        assert ours == judged.right[rule]
        assert 0 < sum(ours) < len(cases)
    # What we say at load can never be met is what the harness denies to a word-for-word copy.
    copies = judged.right["strict-match"][:200]
    assert [can_be_met(gold) for gold in golds] == copies


def test_the_task_is_the_harness_s_gsm8k_with_other_data_and_shots():
    ours = yaml.safe_load(TASK.read_text())
    (package,) = find_spec("lm_eval").submodule_search_locations
    theirs = yaml.safe_load((Path(package) / "tasks" / "gsm8k" / "gsm8k.yaml").read_text())
    assert theirs["metadata"]["version"] == 3.0
    differ = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    source = {"dataset_path", "dataset_name", "dataset_kwargs", "training_split", "fewshot_split"}
    assert differ == source | {"task", "tag", "num_fewshot", "metadata"}
    assert ours["num_fewshot"] == 0
    assert tuple(ours["generation_kwargs"]["until"]) == STOPS


def test_the_harness_generates_as_many_tokens_as_we_do_unless_told():
    from lm_eval.models.huggingface import HFLM

    assert HFLM.max_gen_toks.fget(None) == EvalConfig().max_new_tokens
