"""Bad input ends in exit code 2 and one line that names field, value and remedy; nothing is lost.

Every case runs the real command line in a copy of one small workspace, whose every byte is compared
before and after.
"""

import gzip
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.spoil import (
    Arrange,
    append,
    break_tensors,
    change_row,
    checkpoint_of_nan,
    config,
    cut_record,
    dangling_link,
    differing_head,
    foreign_export,
    foreign_folder,
    foreign_tokenizer,
    fresh_student,
    generation,
    geometry,
    grid,
    grid_in_use,
    hold,
    home,
    larger_tokenizer,
    long_questions,
    misspelt_geometry,
    no_checkpoints,
    only_pickle,
    other_vocabulary,
    other_vocabulary_in_two_files,
    other_weights,
    short_eighth_row,
    spoil_weight,
    student_tokenizer_of_another,
    truncate_weights,
    two_teachers,
    without,
)
from tests.tiny import contents, kava, write_rows, write_workspace

TRAIN = ("train", "tiny.yaml")
EVAL = ("--data", "data.jsonl")


class Case(NamedTuple):
    """Arguments, the words the error must contain, and what was done to the workspace before."""

    arguments: tuple[str, ...]
    words: tuple[str, ...]
    arrange: Arrange = lambda workspace: None


FRESH = {
    "unknown key": Case(
        (*TRAIN, "train.colour=red"),
        ("train.colour", "not a known field", "the fields there are steps"),
    ),
    "misspelt key": Case((*TRAIN, "train.stesp=4"), ("train.stesp", "did you mean train.steps?")),
    "misspelt section": Case(
        (*TRAIN, "optimiser.student_lr=1"), ("optimiser", "did you mean optimizer?")
    ),
    "wrong type": Case((*TRAIN, "train.steps=many"), ("train.steps='many'", "valid integer")),
    "out of range": Case(
        (*TRAIN, "projector.dropout=1.5"), ("projector.dropout=1.5", "less than 1")
    ),
    "unknown choice": Case((*TRAIN, "loss.kv=cosine"), ("loss.kv='cosine'", "'mercator', 'mse'")),
    "student in float16": Case(
        (*TRAIN, "train.dtype=float16"),
        ("train.dtype='float16'", "no", "loss scaling", "use bfloat16"),
    ),
    "teacher in float16": Case(
        (*TRAIN, "teachers.0.dtype=float16"), ("teachers.0.dtype", "called train.dtype now")
    ),
    "not a number": Case((*TRAIN, "loss.kv.beta=.nan"), ("loss.kv.beta=nan", "finite number")),
    "wrong mesh": Case((*TRAIN, "mesh.data=0"), ("mesh", "data=0", "positive number or -1")),
    "a run in another store": Case(
        (*TRAIN, "run.dir=s3://bucket/run"),
        ("run.dir=s3://bucket/run", "neither a local directory nor gs://bucket/folder"),
    ),
    "a run in a bucket itself": Case(
        (*TRAIN, "run.dir=gs://bucket"), ("run.dir=gs://bucket", "gs://bucket/folder")
    ),
    "a run at what a shell made of a URL": Case(
        (*TRAIN, "--smoke", "run.dir=gs:/bucket/run"), ("run.dir=gs:/bucket/run", "use one of")
    ),
    "a calibration in another store": Case(
        ("calibrate", "tiny.yaml", "recipe=calibrated", "run.dir=az://c/run"), ("run.dir=az://c/",)
    ),
    "a demo in a bucket": Case(
        ("demo", "--out", "gs://bucket/demo"), ("out=gs://bucket/demo", "use a local one")
    ),
    "a grid in a bucket": Case(
        ("ablate", "tiny.yaml", "--out", "gs://bucket/grid"), ("out=gs://bucket/grid", "local")
    ),
    "override without value": Case(
        (*TRAIN, "train.steps"), ("override='train.steps'", "section.field=value")
    ),
    "override with broken value": Case(
        (*TRAIN, "train.steps=[1"), ("override='train.steps=[1'", "mend")
    ),
    "override into a scalar": Case(
        (*TRAIN, "train.steps.x=1"), ("override='train.steps.x=1'", "check the key")
    ),
    "override past a list's end": Case(
        (*TRAIN, "teachers.3.path=x"), ("override='teachers.3.path=x'", "check the key")
    ),
    "warm-up longer than the run": Case(
        (*TRAIN, "optimizer.warmup_steps=3"),
        ("optimizer.warmup_steps=3", "train.steps=2", "lower it"),
    ),
    "accumulation does not divide": Case(
        (*TRAIN, "train.grad_accumulation=3"),
        ("data.batch_size=8", "train.grad_accumulation=3", "use a multiple"),
    ),
    "teachers of one name": Case(
        TRAIN, ("teachers", "['big', 'big']", "different names"), two_teachers
    ),
    "two origins": Case(
        (*TRAIN, "student.geometry.model_type=llama"),
        ("student", "exactly one of path, geometry and cut", "(path and geometry given)"),
    ),
    "template missing": Case(
        (*TRAIN, "data.format=template"), ("data.format='template'", "{prompt} and {answer}")
    ),
    "broken YAML": Case(
        TRAIN,
        ("config='tiny.yaml'", "line 2", "mend that line"),
        config("run: {name: x\ndata: [\n"),
    ),
    "key given twice": Case(
        TRAIN,
        ("config='tiny.yaml'", "'train' is given twice", "mend"),
        config("train: {steps: 1}\ntrain: {steps: 2}\n"),
    ),
    "config without sections": Case(
        TRAIN, ("config='tiny.yaml'", "no sections", "write"), config("steps\n")
    ),
    "config that is no text": Case(
        TRAIN,
        ("config='tiny.yaml'", "cannot be read", "give a YAML file"),
        lambda w: (w / "tiny.yaml").write_bytes(b"\xff\xfe\x00"),
    ),
    "missing config": Case(
        ("train", "absent.yaml"), ("config='absent.yaml'", "does not exist", "give the path")
    ),
    "config that is a folder": Case(("train", "teacher"), ("config='teacher'", "give a YAML file")),
    "missing data": Case(
        (*TRAIN, "data.path=absent.jsonl"),
        ("data.path='absent.jsonl'", "does not exist", "give a file"),
    ),
    "missing held-out data": Case(
        (*TRAIN, "data.eval_path=absent.jsonl"), ("absent.jsonl'", "does not exist", "give a file")
    ),
    "half-broken JSONL": Case(
        TRAIN,
        ("data.path='data.jsonl'", "line 89", "not JSON", "correct"),
        append(b'{"question": "a", "ans'),
    ),
    "unreadable JSONL": Case(
        TRAIN, ("data.path='data.jsonl'", "line 89", "not UTF-8", "correct"), append(b"\xff\xfe\n")
    ),
    "missing answer": Case(
        TRAIN,
        ("data.path='data.jsonl'", "line 89", "'answer' is NaN, a missing value", "correct"),
        append(b'{"question": "a", "answer": NaN}\n'),
    ),
    "number beyond all numbers": Case(
        TRAIN,
        ("data.path='data.jsonl'", "line 89", "1e400", "write it as text"),
        append(b'{"question": "a", "answer": 1e400}\n'),
    ),
    "answer given twice": Case(
        TRAIN,
        ("data.path='data.jsonl'", "line 89", "'answer' is given twice", "correct"),
        append(b'{"question": "a", "answer": "b", "answer": "c"}\n'),
    ),
    "rows inside of an object": Case(
        TRAIN,
        ("data.path='data.jsonl'", "'rows' holds rows", "write that list alone"),
        lambda w: (w / "data.jsonl").write_text('{\n"rows": [{"question": "a"}]\n}'),
    ),
    "table of another kind": Case(
        (*TRAIN, "data.path=data.csv"),
        ("data.path='data.csv'", "unknown ending", "write its rows as one of .jsonl"),
        lambda w: (w / "data.csv").write_text("question,answer\na,b\n"),
    ),
    "cut gzip": Case(
        (*TRAIN, "data.path=data.jsonl.gz"),
        ("data.path='data.jsonl.gz'", "cannot be read", "fetch or write it again"),
        lambda w: (w / "data.jsonl.gz").write_bytes(
            gzip.compress((w / "data.jsonl").read_bytes())[:-9]
        ),
    ),
    "set called as ours": Case(
        (*TRAIN, "eval.sets.held_out.path=data.jsonl"),
        ("eval", "sets.held_out", "give the set another name"),
    ),
    "set with a path for a name": Case(
        (*TRAIN, "eval.sets={a/b: {path: data.jsonl}}"), ("eval.sets", "a/b", "pattern")
    ),
    "teacher called student": Case(
        (*TRAIN, "teachers.0.name=student", "loss.kl_weight=1"),
        ("called student", "give it another name"),
    ),
    "shuffled rows one at a time": Case(
        (*TRAIN, "teachers.0.control=shuffled", "train.grad_accumulation=8"),
        ("control=shuffled", "big", "data.batch_size=8", "use two or more"),
    ),
    "all replies of one answer": Case(
        (*TRAIN, "data.train_on=assistant"), ("train_on=assistant", "format=qa", "use format=chat")
    ),
    "missing field names": Case(
        (*TRAIN, "data.fields=[question, reply]"),
        ("data.path='data.jsonl'", "'reply' is missing", "question, answer", "correct"),
    ),
    "empty data": Case(
        TRAIN,
        ("data.path='data.jsonl'", "no rows", "give a data set"),
        lambda w: (w / "data.jsonl").write_text(""),
    ),
    "a single row": Case(
        TRAIN,
        ("data.path='data.jsonl'", "1 row", "give data.eval_path"),
        lambda w: write_rows(w / "data.jsonl", 1),
    ),
    "unknown split": Case(
        (*TRAIN, "data.path=builtin:word_problems", "data.split=validation"),
        ("split='validation'", "train"),
    ),
    "chat without template": Case(
        (*TRAIN, "data.format=chat"), ("data.format='chat'", "use data.format=qa")
    ),
    "tokenizer with more ids than rows": Case(
        TRAIN, ("student", "vocab_size=512", "513 ids", "use the tokenizer"), larger_tokenizer
    ),
    "different vocabularies": Case(
        TRAIN, ("teachers.big", "disagree", "use models with one tokenizer"), other_vocabulary
    ),
    "different vocabularies in vocab.json": Case(
        TRAIN,
        ("teachers.big", "disagree", "'a' in the run and 'b' there"),
        other_vocabulary_in_two_files,
    ),
    "student tokenizer of another model": Case(
        (*TRAIN, "student.tokenizer=other", "teachers=[]"),
        ("student.path", "disagree", "use models with one tokenizer"),
        student_tokenizer_of_another,
    ),
    "end token by name": Case(
        TRAIN,
        ("student/generation_config.json", "eos_token_id='</s>'", "write the number", "or null"),
        generation(eos_token_id="</s>"),
    ),
    "end tokens by name": Case(
        TRAIN, ("eos_token_id=[2, '</s>']", "list of ids"), generation(eos_token_id=[2, "</s>"])
    ),
    "RoPE scaling without a type": Case(
        TRAIN,
        ("teacher", "rope_type=None does not take factor=2.0", "llama3"),
        geometry(rope_parameters=None, rope_scaling={"factor": 2.0}),
    ),
    "unknown key in a RoPE scaling": Case(
        TRAIN,
        ("rope_type='linear' does not take factro=2.0", "correct what is misspelt"),
        geometry(
            rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0, "factro": 2.0}
        ),
    ),
    "unknown RoPE type": Case(
        TRAIN,
        ("rope_type='xpos' is not supported", "yarn"),
        geometry(rope_parameters=None, rope_scaling={"type": "xpos"}),
    ),
    "RoPE of a part of the head": Case(
        TRAIN,
        ("partial_rotary_factor=0.5", "rotates the whole head"),
        geometry(partial_rotary_factor=0.5),
    ),
    "tied model with a head of its own": Case(
        TRAIN, ("teacher", "lm_head.weight", "set tie_word_embeddings to false"), differing_head
    ),
    "untied model without its head": Case(
        (*TRAIN, "loss.kl_weight=1"),
        ("teacher", "missing: lm_head.weight", "set tie_word_embeddings to true"),
        geometry(tie_word_embeddings=False),
    ),
    "misspelt key of a geometry": Case(
        TRAIN,
        ("student.geometry", "rope_thetta=1000000.0", "did you mean rope_theta?"),
        misspelt_geometry,
    ),
    "quantized teacher": Case(
        TRAIN,
        ("teacher", "quant_method='fp8'", "FineGrainedFP8Config", "save_original_format=False"),
        geometry(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}),
    ),
    "no tokenizer": Case(
        (*TRAIN, "student.tokenizer=data"), ("tokenizer='data'", "give a local directory")
    ),
    "fresh student without tokenizer": Case(
        TRAIN, ("student.tokenizer=null", "name a tokenizer"), fresh_student
    ),
    "unsupported architecture": Case(
        TRAIN,
        ("teacher", "GPT2LMHeadModel", "LlamaForCausalLM, M"),
        geometry(architectures=["GPT2LMHeadModel"], model_type="gpt2"),
    ),
    "incomplete geometry": Case(
        TRAIN, ("teacher", "hidden_size", "add what the model has"), geometry(hidden_size=None)
    ),
    "tensors that do not fit": Case(
        TRAIN,
        (
            "teacher",
            "missing: ",
            "model.norm.weight",
            "layers.1.mlp.up_proj",
            "unexpected: model.layers.0.mlp.extra.weight",
            "k_proj.weight is [7, 16], expected [8, 16]",
            "use matching weights",
        ),
        break_tensors,
    ),
    "damaged weights": Case(
        TRAIN,
        ("teacher/model.safetensors", "truncated or damaged", "download or copy it again"),
        truncate_weights,
    ),
    "teacher with a weight that is NaN": Case(
        TRAIN,
        ("teacher: NaN or infinity in model.layers.1.mlp.up_proj.weight in model.safetensors",),
        spoil_weight("teacher", float("nan")),
    ),
    "student with a weight that is infinite": Case(
        TRAIN,
        ("student: NaN or infinity in model.layers.1.mlp.up_proj.weight", "convert it again"),
        spoil_weight("student", float("-inf")),
    ),
    "evaluate a model that is NaN": Case(
        ("eval", "student", *EVAL, "--json"),
        ("student: NaN or infinity in model.layers.1.mlp.up_proj.weight",),
        spoil_weight("student", float("nan")),
    ),
    "calibrate with a model that is NaN": Case(
        ("calibrate", "tiny.yaml", "recipe=calibrated"),
        ("teacher: NaN or infinity in model.layers.1.mlp.up_proj.weight",),
        spoil_weight("teacher", float("nan")),
    ),
    "a run directory in use": Case(
        TRAIN, ("run.dir=run is in use by another process", "wait for its end"), hold("run")
    ),
    "a smoke run's directory in use": Case(
        (*TRAIN, "--smoke"), ("run.dir=run-smoke is in use",), hold("run-smoke")
    ),
    "calibrate into a directory in use": Case(
        ("calibrate", "tiny.yaml", "recipe=calibrated"), ("run.dir=run is in use",), hold("run")
    ),
    "a grid in use": Case(
        ("ablate", "grid.yaml", "--out", "grid"), ("out=grid is in use",), grid_in_use
    ),
    "a demo in use": Case(("demo", "--out", "demo"), ("out=demo is in use",), hold("demo")),
    "first tokens left out that are all": Case(
        (*TRAIN, "loss.sink_tokens=64"),
        ("loss.sink_tokens=64 leaves no token of the training rows to compare", "lower it"),
    ),
    "calibration scored on nothing": Case(
        (
            "calibrate",
            "tiny.yaml",
            "recipe=calibrated",
            "data.rows=8",
            "loss.sink_tokens=40",
        ),
        ("loss.sink_tokens=40: of 8 rows none to score on is longer", "lower it"),
        short_eighth_row,
    ),
    "held-out rows that are all prompt": Case(
        (*TRAIN, "data.eval_path=long.jsonl"),
        ("data.max_length=64 leaves no held-out row with an answer", "2 rows", "raise it"),
        long_questions,
    ),
    "a set whose rows are all prompt": Case(
        (*TRAIN, "eval.sets.far.path=long.jsonl"),
        ("data.max_length=64 leaves no far row with an answer", "give other rows"),
        long_questions,
    ),
    "nothing is weighed": Case(
        (*TRAIN, "loss.ce_weight=0", "loss.kv_weight=0"),
        ("loss.kv_weight=0 and loss.kl_weight=0 and loss.ce_weight=0", "nothing to learn from"),
    ),
    "nothing is weighed and there is no teacher": Case(
        (*TRAIN, "loss.ce_weight={start: 0, end: 0}", "teachers=[]", "loss.kl_weight=1"),
        ("no teachers and loss.ce_weight=0", "nothing to learn from"),
    ),
    "teachers of no weight": Case(
        (*TRAIN, "teachers.0.weight=0"), ("no teacher has a weight above 0", "give one to")
    ),
    "a trace of steps that never come": Case(
        (*TRAIN, "--profile", "3:4"), ("--profile=3:4", "train.steps=2", "name earlier steps")
    ),
    "pickled weights": Case(
        TRAIN, ("'teacher'", "pytorch_model.bin", "convert them to safetensors"), only_pickle
    ),
    "missing model directory": Case(
        (*TRAIN, "student.path=./absent"), ("path='./absent'", "give an existing directory")
    ),
    "hub id while offline": Case(
        (*TRAIN, "teachers.0.path=Qwen/Qwen2.5-14B"),
        ("Qwen/Qwen2.5-14B", "hub cannot be reached", "hf download"),
    ),
    "layer outside": Case(
        (*TRAIN, "teachers.0.layer_map=[[3, 1], [0, 0]]"),
        ("teachers.0.layer_map", "[[3, 1]]", "teacher of 3", "count layers from 0"),
    ),
    "origins of a student that was not cut": Case(
        (*TRAIN, "teachers.0.layer_map=origin"),
        ("teachers.0.layer_map='origin'", "no record of a cut", "use 'ratio' or a list of pairs"),
    ),
    "origins in a teacher of another depth": Case(
        (*TRAIN, "teachers.0.layer_map=straddle"),
        (
            "teachers.0.layer_map='straddle'",
            "a cut from 4 to 2 layers, but the teacher has 3 and the student 2",
            "use 'ratio' or a list of pairs",
        ),
        cut_record(teacher_layers=4),
    ),
    "damaged record of a cut": Case(
        TRAIN,
        ("student/kava_cut.json", "layers=[2, 0] do not rise", "restore it, or remove it"),
        cut_record(layers=[2, 0]),
    ),
    "identity between other heads": Case(
        (*TRAIN, "projector.kind=identity"),
        ("projector.kind=identity", "4 (1 x 4)", "8 (2 x 4)", "kind=linear bridges them"),
        geometry(num_key_value_heads=1),
    ),
    "identity between other widths of a head": Case(
        (*TRAIN, "projector.kind=identity", "projector.direction=teacher_to_student"),
        ("projector.kind=identity", "8 (1 x 8)", "8 (2 x 4)", "kind=linear bridges them"),
        geometry(num_key_value_heads=1, head_dim=8),
    ),
    "a share of no gradient": Case(
        (*TRAIN, "loss.ce_weight=0", "loss.kv_weight=auto(0.2)"),
        ("loss.kv_weight=auto(0.2)", "loss.ce_weight=0 and loss.kl_weight=0", "give one of them"),
    ),
    "a ramp of KL without an end": Case(
        (*TRAIN, "loss.kl_weight={start: 0}"), ("loss.kl_weight.end", "required but missing")
    ),
    "student layer twice": Case(
        (*TRAIN, "teachers.0.layer_map=[[0, 1], [1, 1]]"),
        ("teachers.0.layer_map", "[1]", "twice", "give one"),
    ),
    "batch not divisible": Case(
        (*TRAIN, "mesh.data=8", "data.batch_size=6"),
        ("data.batch_size=6", "8 data-parallel devices", "use a multiple of 8"),
    ),
    "devices left over": Case(
        (*TRAIN, "mesh.data=3"), ("mesh.data=3", "8 devices", "make the product 8")
    ),
    "tensor axis does not divide": Case(
        (*TRAIN, "mesh.data=1", "mesh.tensor=8"),
        (
            "mesh does not divide",
            "blocks/attention/q/kernel",
            "heads=4",
            "blocks/attention/k/kernel",
            "kv_heads=2",
            "use mesh.data=4, mesh.fsdp=1, mesh.tensor=2",
        ),
    ),
    "run directory that is no run": Case(
        (*TRAIN, "run.dir=elsewhere"),
        ("run.dir=elsewhere", "not empty", "name an empty or new directory"),
        foreign_folder,
    ),
    "run directory that is a file": Case(
        (*TRAIN, "run.dir=data.jsonl"), ("run.dir=data.jsonl", "is a file", "name a directory")
    ),
    "run under a file": Case(
        (*TRAIN, "run.dir=data.jsonl/run"),
        ("run.dir=data.jsonl/run", "data.jsonl is a file", "name a directory"),
    ),
    "run at a link to nothing": Case(
        (*TRAIN, "run.dir=link/run"), ("run.dir=link/run", "link to what does not"), dangling_link
    ),
    "run at a link to itself": Case(
        (*TRAIN, "run.dir=loop"),
        ("run.dir=loop", "symbolic links", "name a directory"),
        lambda w: (w / "loop").symlink_to("loop"),
    ),
    "run with too long a name": Case(
        (*TRAIN, f"run.dir=new/{'x' * 250}"), ("run.dir=new/xxx", "longer than", "name a directory")
    ),
    "run with too long a path": Case(
        (*TRAIN, f"run.dir={'new/' * 1000}x"), ("run.dir=new/new", "too long", "name a directory")
    ),
    "run where nothing can be made": Case(
        (*TRAIN, "run.dir=/proc/kava"), ("run.dir=/proc/kava", "/proc: ", "name a directory")
    ),
    "run at the home of nobody": Case(
        (*TRAIN, "run.dir=~no.body/run"), ("run.dir=~no.body/run", "no home", "./~no.body/run")
    ),
    "run without a name": Case((*TRAIN, "run.dir=''"), ("run.dir=''", "give a path")),
    "smoke run under a file": Case(
        (*TRAIN, "--smoke", "run.dir=data.jsonl/run"), ("run.dir=data.jsonl/run", "is a file")
    ),
    "calibration under a file": Case(
        ("calibrate", "tiny.yaml", "recipe=calibrated", "run.dir=data.jsonl/run"),
        ("run.dir=data.jsonl/run", "is a file"),
    ),
    "demo under a file": Case(
        ("demo", "--out", "data.jsonl/demo"), ("out=data.jsonl/demo", "is a file")
    ),
    "demo over somebody's export": Case(
        ("demo", "--out", "."), ("out=export", "thesis.txt", "move them away"), foreign_export
    ),
    "grid under a file": Case(
        ("ablate", "grid.yaml", "--out", "data.jsonl/grid"),
        ("out=data.jsonl/grid", "is a file"),
        grid,
    ),
    "grid at home and not there": Case(
        ("ablate", "~/absent.yaml"), ("does not exist", "home/absent.yaml'"), home
    ),
    "data at home and not there": Case(
        (*TRAIN, "data.path=~/absent.jsonl"), ("home/absent.jsonl'", "does not exist"), home
    ),
    "model at home and not there": Case(
        (*TRAIN, "teachers.0.path=~/absent"), ("home/absent' is not a directory",), home
    ),
    "tokenizer at home and not there": Case(
        (*TRAIN, "student.tokenizer=~/absent"), ("home/absent' does not exist",), home
    ),
    "data with too long a name": Case(
        (*TRAIN, f"data.path={'x' * 300}"), ("data.path='xxx", "name too long", "another path")
    ),
    "model with too long a name": Case(
        (*TRAIN, f"student.path={'x' * 300}"), ("model path='xxx", "name too long", "another path")
    ),
    "student that could not be exported": Case(
        TRAIN,
        ("gives other ids next to a model of family qwen2", "own tokenizer"),
        foreign_tokenizer,
    ),
    "smoke with a missing file": Case(
        (*TRAIN, "--smoke", "data.path=absent.jsonl"),
        ("data.path='absent.jsonl'", "does not exist", "give a file"),
    ),
    "evaluate a missing model": Case(
        ("eval", "./absent", *EVAL), ("path='./absent'", "give an existing directory")
    ),
    "evaluate missing data": Case(
        ("eval", "student", "--data", "absent.jsonl"), ("data.path='absent.jsonl'", "give a file")
    ),
    "checkpoint of a plain model": Case(
        ("eval", "student", *EVAL, "--checkpoint", "best"),
        ("checkpoint='best'", "'student' is not a run", "leave it out"),
    ),
    "override that eval does not take": Case(
        ("eval", "student", *EVAL, "train.steps=3"),
        ("override='train.steps=3'", "data.* and eval.*"),
    ),
    "misspelt override of eval": Case(
        ("eval", "student", *EVAL, "eval.max_tokens=3"),
        ("eval.max_tokens", "did you mean eval.max_new_tokens?"),
    ),
    "export what is no run": Case(
        ("export", "student", "--out", "exported"), ("student", "name a run directory")
    ),
    "export what is missing": Case(
        ("export", "absent", "--out", "exported"), ("absent", "name a run directory")
    ),
}
OLD = {
    "a run in the place of a model": Case(
        (*TRAIN, "run.dir=new", "student.path=run"),
        ("model path='run' is a run directory", "kava export run --out DIR"),
    ),
    "run of another config": Case(
        (*TRAIN, "run.seed=5", "loss.kv.beta=0.5"),
        ("run.dir=run", "run.seed 0 -> 5", "loss.kv.beta 0.01 -> 0.5", "name another run.dir"),
    ),
    "changed teacher weights": Case(
        TRAIN, ("run.dir=run", "weights of teacher big", "restore the files"), other_weights
    ),
    "changed data": Case(TRAIN, ("run.dir=run", "data", "restore the files"), change_row),
    "broken manifest": Case(
        TRAIN,
        ("manifest.yaml", "not readable YAML", "restore it"),
        lambda w: (w / "run" / "manifest.yaml").write_text("{"),
    ),
    "unknown checkpoint": Case(
        ("export", "run", "--out", "exported", "--checkpoint", "7"),
        ("checkpoint='7'", "use last, best or one of 1, 2"),
    ),
    "export to another store": Case(
        ("export", "run", "--out", "s3://bucket/exported"),
        ("out=s3://bucket/exported", "gs://bucket/folder"),
    ),
    "report to another store": Case(
        ("report", "run", "--out", "https://bucket/a.html"), ("out=https://bucket/a.html",)
    ),
    "run of another store": Case(
        ("eval", "s3://bucket/run", *EVAL), ("model=s3://bucket/run", "gs://bucket/folder")
    ),
    "misspelt checkpoint": Case(
        ("eval", "run", *EVAL, "--checkpoint", "newest"), ("checkpoint='newest'", "use last, best")
    ),
    "run without checkpoints": Case(
        ("export", "run", "--out", "exported"),
        ("checkpoint='last'", "train the run first"),
        no_checkpoints,
    ),
    "export a checkpoint that is NaN": Case(
        ("export", "run", "--out", "exported"),
        ("checkpoint=3 of run holds NaN or infinity in student/final_norm/scale", "earlier one"),
        checkpoint_of_nan,
    ),
    "evaluate a checkpoint that is NaN": Case(
        ("eval", "run", *EVAL, "--json"), ("checkpoint=3 of run holds NaN",), checkpoint_of_nan
    ),
    "export into a foreign folder": Case(
        ("export", "run", "--out", "elsewhere"),
        ("out=elsewhere", "thesis.txt", "give a new directory"),
        foreign_folder,
    ),
    "export over a file": Case(
        ("export", "run", "--out", "data.jsonl"),
        ("out=data.jsonl", "is a file", "name a directory"),
    ),
    "export under a file": Case(
        ("export", "run", "--out", "data.jsonl/out"), ("out=data.jsonl/out", "is a file")
    ),
    "export at a link to nothing": Case(
        ("export", "run", "--out", "link"), ("out=link", "link to what does not"), dangling_link
    ),
    "export where nothing can be made": Case(
        ("export", "run", "--out", "/proc/kava"), ("out=/proc/kava", "/proc: ", "elsewhere")
    ),
    "report over a directory": Case(
        ("report", "run", "--out", "student"), ("out=student is a directory", "name a file")
    ),
    "report under a file": Case(
        ("report", "run", "--samples", "1", "--out", "data.jsonl/a.html"),
        ("out=data.jsonl/a.html", "is a file"),
    ),
    "teacher gone when a run goes on": Case(
        TRAIN,
        ("teachers.0.path='teacher'", "gone now", "put it back", "teachers.0.path=DIR"),
        without("teacher"),
    ),
    "teacher gone when it is to answer": Case(
        ("report", "run", "--samples", "1"),
        ("teachers.0.path='teacher'", "gone"),
        without("teacher"),
    ),
    "student gone at export": Case(
        ("export", "run", "--out", "exported"),
        ("student.path='student'", "gone now", "put it back"),
        without("student"),
    ),
    "unknown dtype": Case(
        ("export", "run", "--out", "exported", "--dtype", "int8"),
        ("--dtype='int8'", "use auto, float32"),
    ),
    "evaluate a run on broken data": Case(
        ("eval", "run", *EVAL), ("data.path='data.jsonl'", "line 89", "correct"), append(b"{\n")
    ),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("original"))


@pytest.fixture
def fresh(original, tmp_path, monkeypatch):
    """A copy of the workspace to work in, with a home that may be made in it."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture(scope="module")
def trained(original, tmp_path_factory):
    """The workspace with a finished run in it."""
    workspace = tmp_path_factory.mktemp("trained") / "workspace"
    shutil.copytree(original, workspace)
    done = subprocess.run(
        [sys.executable, "-c", "from kava_jax.cli import main; main()", *TRAIN],
        cwd=workspace,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return workspace


@pytest.fixture
def old(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refuse(case: Case, workspace: Path, capsys) -> None:
    case.arrange(workspace)
    before = contents(workspace)
    ended = kava(capsys, *case.arguments)
    check(ended.code, ended.err, case.words)
    assert ended.out == ""
    assert contents(workspace) == before


def check(code: int, err: str, words: tuple[str, ...]) -> None:
    assert code == 2, err
    assert err.startswith("error: "), err
    assert len(err.splitlines()) == 1, err
    assert [word for word in words if word not in err] == [], err


@pytest.mark.parametrize("name", FRESH)
def test_bad_input(name, fresh, capsys):
    refuse(FRESH[name], fresh, capsys)


@pytest.mark.parametrize("name", OLD)
def test_bad_input_for_a_finished_run(name, old, capsys):
    refuse(OLD[name], old, capsys)


@pytest.mark.parametrize("name", ["misspelt key", "missing data"])
def test_bad_input_in_a_process_of_its_own(name, fresh):
    before = contents(fresh)
    done = subprocess.run(
        [sys.executable, "-c", "from kava_jax.cli import main; main()", *FRESH[name].arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    check(done.returncode, done.stderr, FRESH[name].words)
    assert done.stdout == ""
    assert contents(fresh) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train",), ("Missing argument",)),
        (("train", "tiny.yaml", "--smok"), ("--smok", "--smoke")),
        (("eval", "student"), ("Missing option '--data'",)),
        (("eval", "student", *EVAL, "--rows", "0"), ("--rows", "1")),
        (("export", "run"), ("Missing option '--out'",)),
        (("trian", "tiny.yaml"), ("trian", "train")),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_two_too(arguments, words, fresh, capsys):
    before = contents(fresh)
    ended = kava(capsys, *arguments)
    assert ended.code == 2
    assert ended.out == ""
    assert "Traceback" not in ended.err
    assert [word for word in words if word not in ended.err] == [], ended.err
    assert contents(fresh) == before
