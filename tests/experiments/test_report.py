"""The report of one run: right numbers, sound HTML, and a page that any screen can show."""

import base64
import json
import re
import struct
from datetime import date

import numpy as np
import pytest

from kava_jax.alignment.layer_map import LayerMap
from kava_jax.config.file import dump_config, parse_config
from kava_jax.errors import KavaError
from kava_jax.experiments.report import write_report
from kava_jax.journal.manifest import Fingerprints, write_manifest
from tests.experiments.pages import Page, check_stands_alone, ids_and_labels
from tests.tiny import GEOMETRY, kava
from tests.tiny_models import write_directory

DASH = "\N{EN DASH}"


def make_run(directory, records, *, teachers=("big",), metrics=True, **sections):
    """A run directory as training leaves it, without weights; a teacher is a name or a section."""
    names = [teacher if isinstance(teacher, str) else teacher["name"] for teacher in teachers]
    config = {
        "run": {"name": "tiny", "dir": "elsewhere"},
        "teachers": [
            {"name": teacher, "path": "builtin:demo_teacher"} if name is teacher else teacher
            for name, teacher in zip(names, teachers, strict=True)
        ],
        "student": {"geometry": GEOMETRY},
        "data": {"path": "data.jsonl"},
        "train": {"steps": 20},
    }
    write_manifest(
        directory,
        command=["kava", "train", "tiny.yaml"],
        config=dump_config(parse_config(config | sections)),
        fingerprints=Fingerprints(dict.fromkeys(names, "5e" * 32), data="da" * 32),
        today=date(2026, 1, 2),
        hardware={"hosts": 2, "devices": 16, "device_kind": "TPU v5e"},
    )
    if metrics:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (directory / "metrics.jsonl").write_text(lines)
    return directory


def layers_of(teacher="big", layers=2):
    """Figures by layer: 0.01, 0.02, ... so that every cell has its own number."""
    figures = ["cos_centered", "cka", "retrieval", "retrieval_centered", "cos_constant"]
    figures += ["student_rank", "target_rank", "mag_ratio_q10", "mag_ratio_q50", "mag_ratio_q90"]
    keys = [f"{figure}_{part}" for figure in figures for part in "kv"]
    numbers = iter(range(1, 1000))
    return {f"{teacher}/{key}": [next(numbers) / 100 for _ in range(layers)] for key in keys}


def train(step, **values):
    return {"step": step, "kind": "train", "ce": 2.0 - step / 20, "cos_sim": 0.8, **values}


def evaluation(step, **values):
    figures = {
        "eval_loss": 2.5 - step / 20,
        "eval_cos_sim": 0.85,
        "eval_cos_shuffled": 0.35,
        "eval_alignment_gap": 0.5,
        "eval_cos_centered": 0.625,
        "eval_retrieval": 0.25,
        "eval_student_rank": 7.0,
        "eval_target_rank": 8.0,
        "eval_sampled_tokens": 1024.0,
    }
    return {"step": step, "kind": "eval", **figures, **values}


def probe(step, **values):
    found = {"kv_gradient_share": 0.2, "kv_gradient_cosine": -0.125, "probe_share_of_time": 0.034}
    return {"step": step, "kind": "diagnostics", **found, **values}


FINISHED = [
    evaluation(0, eval_cos_sim=0.0123456, layers=layers_of()),
    probe(0, kv_gradient_share=1.5),
    train(10, cos_running=0.5, gap_running=0.25),
    evaluation(20, eval_loss=77.0),
    probe(20),
    train(20, cos_running=0.75, gap_running=0.375),
    # The last evaluation, taken again after a resume, is the one that counts.
    evaluation(20, layers=layers_of(), exact_match_strict=0.375, eval_something_new=123456.0),
]


def report(directory):
    return Page(write_report(directory).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("report") / "finished", FINISHED)


@pytest.fixture(scope="module")
def page(finished):
    return report(finished)


def evaluated(page, of=""):
    """The table of the first and the last evaluation: heads, and cells by figure in words."""
    heads, *rows = page.tables[f"First and last evaluation{of}, on held-out rows"]
    return heads, {name: cells for name, *cells in rows}


def test_the_page_stands_alone_and_is_well_formed(page, finished):
    check_stands_alone(page, (finished / "report.html").read_text(encoding="utf-8"))
    ids, labels = ids_and_labels(page)
    assert labels <= ids


def test_every_picture_is_inside_and_told_in_words(page):
    pictures = page.all("img")
    assert len(pictures) == 3  # loss, alignment, gradients
    for attrs in pictures:
        assert len(attrs["alt"]) > 40
        png = base64.b64decode(attrs["src"].removeprefix("data:image/png;base64,"), validate=True)
        assert png.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", png[16:24])
        shown = int(attrs["width"]), int(attrs["height"])
        assert shown == pytest.approx((width / 1.5, height / 1.5), abs=1)
    alts = " ".join(attrs["alt"] for attrs in pictures)
    for words in (
        "loss, training: 1.500 at step 10, 1 at step 20.",
        "loss, held out: 2.500 at step 0, 1.500 at step 20.",
        "cosine, training: 0.500 at step 10, 0.750 at step 20.",
        "cosine, held out: 0.012 at step 0, 0.850 at step 20.",
        "gap, training: 0.250 at step 10, 0.375 at step 20.",
        "KV / language: 1.500 at step 0, 0.200 at step 20.",
        "cosine of the two: -0.125 at step 0, -0.125 at step 20.",
    ):
        assert words in alts


def test_the_verdict_and_the_headlines(page):
    assert "Step 20 of 20. Started" in page.words
    assert "not finished" not in page.words
    assert (
        "Good Held-out cosine 0.850 at step 20; unrelated examples reach 0.350 (shuffled), "
        "so the gap is 0.500." in page.words
    )
    assert "Signs of collapse" not in page.words
    assert "cosine 0.850 0.012 at step 0" in page.words
    assert "exact match 0.375 cosine" in page.words  # no answers were asked for at step 0


def test_the_first_and_the_last_evaluation_stand_side_by_side(page):
    heads, found = evaluated(page)
    assert heads == ["figure", "step 0", "step 20"]
    assert found["held-out loss, nats per token"] == ["2.500", "1.500"]
    assert found["cosine"] == ["0.012", "0.850"]
    assert found["exact match"] == [DASH, "0.375"]
    assert found["something_new"] == [DASH, "123456"]
    assert found["tokens sampled"] == ["1024", "1024"]
    assert next(iter(found)) == "held-out loss, nats per token"
    assert "eval_alignment_gap" in page.words  # and each metric's own name


BY_LAYER = "Held-out figures beside big by student layer, step 20"
OTHERS = f"{BY_LAYER}: lengths, ranks and others"


def test_figures_by_layer_and_the_layer_map(page):
    heads, *rows = page.tables[BY_LAYER]
    assert heads == ["student layer", "0", "1"]
    found = {name: cells for name, *cells in rows}
    assert found["centred cosine, keys"] == ["0.010", "0.020"]
    assert found["centred cosine, values"] == ["0.030", "0.040"]
    # Ranks of layers_of: 0.21 and 0.22 of 0.25 and 0.26.
    assert found["effective rank, student / target, keys"] == ["0.840", "0.846"]
    others = {name: cells for name, *cells in page.tables[OTHERS]}
    assert others["length ratio, quantile 0.9, values"] == ["0.390", "0.400"]
    shown = [*rows, *page.tables[OTHERS][1:]]
    assert len(shown) == len(layers_of()) + 2  # every figure once, and two shares
    assert {"cos_centered_k", "mag_ratio_q90_v"} <= set(page.words.split())  # their own names
    # The built-in teacher has four layers, the student two: first meets first, last meets last.
    assert "the one at its own relative depth" in page.words
    assert "student layer | teacher layer 0 | 0 1 | 3" in page.words


def test_a_bar_is_as_long_as_its_figure(page):
    """Bars are told in the style; what has no scale from 0 to 1 has none."""
    cells = [attrs for attrs in page.all("td") if attrs.get("class") == "bar"]
    values = [float(attrs["style"].removeprefix("--v: ")) for attrs in cells]
    bounded = [
        value
        for key, row in layers_of().items()
        if not re.search(r"rank|ratio", key)
        for value in row
    ]
    shares = [0.21 / 0.25, 0.22 / 0.26, 0.23 / 0.27, 0.24 / 0.28]
    assert sorted(values) == pytest.approx(sorted(bounded + shares))


def luminance(colour):
    """Relative luminance of ``#rrggbb`` after WCAG 2."""
    c = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    linear = np.where(c <= 0.03928, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_words_on_bars_and_paper_can_be_read_light_and_dark(finished, page):
    """Contrast of at least 4.5 of letters on whatever is behind them, after WCAG 2."""
    text = (finished / "report.html").read_text(encoding="utf-8")
    schemes = re.findall(r":root \{(.*?)\}", text, re.S)
    assert len(schemes) == 2
    for scheme in schemes:
        colour = {name: luminance(c) for name, c in re.findall(r"--(\w+): (#\w{6})", scheme)}
        for front, back in (("ink", "paper"), ("ink", "bar"), ("ink", "raised"), ("soft", "paper")):
            low, high = sorted((colour[front], colour[back]))
            assert (high + 0.05) / (low + 0.05) >= 4.5


def test_what_probes_cost(page):
    assert "Probes cost 3.4% of the time that the steps took." in page.words


def test_how_it_was_made(page):
    assert "layer_map: null" in page.text
    for words in ("command: kava train tiny.yaml", "device_kind: TPU v5e", "devices: 16", "jax: "):
        assert words in page.words
    assert f"big: {'5e' * 32}" in page.words
    assert "student: null" in page.words


def test_before_anything_was_learnt_there_is_no_verdict(tmp_path):
    first = evaluation(0, eval_cos_sim=0.97, eval_cos_shuffled=0.96, eval_cos_centered=0.02)
    page = report(make_run(tmp_path, [first]))
    assert "so the gap is 0.010. Nothing has been learnt yet: no verdict." in page.words
    assert "collapsed" not in page.words


def test_a_collapsed_run_is_called_so_with_its_signs(tmp_path):
    last = evaluation(
        20,
        eval_cos_sim=0.97,
        eval_cos_shuffled=0.96,
        eval_cos_centered=0.02,
        eval_retrieval=0.001,
        eval_student_rank=0.5,
    )
    page = report(make_run(tmp_path, [last]))
    assert "collapsed Held-out cosine 0.970 at step 20" in page.words
    assert "Excellent" not in page.words
    signs = [
        "The gap over a shuffled cosine of 0.96 is 0.01; at least 0.05 was expected.",
        "The centred cosine is 0.02; at least 0.1 was expected.",
        "The share of tokens retrieved is 0.001; more than 0.00293 was expected, 3 times chance.",
        "The student's effective rank next to the target's 8 is 0.5; at least 0.8 was expected.",
    ]
    assert f"Signs of collapse: {' '.join(signs)}" in page.words


def test_signs_are_said_where_the_word_stays(tmp_path):
    page = report(make_run(tmp_path, [evaluation(20, eval_cos_centered=0.05)]))
    assert "Good Held-out cosine 0.850" in page.words
    assert "Signs of collapse: The centred cosine is 0.05; at least 0.1 was expected." in page.words


def test_several_teachers_have_a_verdict_and_a_section_each(tmp_path):
    own = {"eval_a/cos_sim": 0.96, "eval_a/cos_shuffled": 0.5, "eval_b/cos_sim": 0.25}
    last = evaluation(20, **own, layers=layers_of("a") | layers_of("b"))
    page = report(make_run(tmp_path, [last], teachers=("a", "b")))
    assert "All teachers together: Good Held-out cosine 0.850" in page.words
    assert "a: Excellent Held-out cosine 0.960 at step 20; unrelated examples" in page.words
    assert "b: Poor Held-out cosine 0.250 at step 20; without a shuffled cosine" in page.words
    assert "Layer by layer: a" in page.words
    assert "Layer by layer: b" in page.words
    assert len(page.tables) == 7  # evaluations: of both, a, b; two by layer of each
    together = [row[0] for row in page.tables["First and last evaluation, on held-out rows"]]
    assert together.count("cosine") == 1
    assert evaluated(page, " of b") == (["figure", "step 20"], {"cosine": ["0.250"]})
    assert len(page.all("img")) == 2  # loss, alignment


def test_a_run_without_a_teacher(tmp_path):
    records = [
        {"step": 20, "kind": "train", "ce": 1.0},
        {"step": 20, "kind": "eval", "eval_loss": 1.25},
    ]
    page = report(make_run(tmp_path, records, teachers=()))
    assert "No teacher: the student learns by cross-entropy alone" in page.words
    assert len(page.all("img")) == 1
    assert "Who pulls" not in page.words


@pytest.mark.parametrize("metrics", [True, False], ids=["empty metrics", "no metrics"])
def test_a_run_that_has_only_begun(tmp_path, metrics):
    page = report(make_run(tmp_path, [], metrics=metrics))
    assert "Step 0 of 20. It is not finished." in page.words
    assert "There is no evaluation yet, and so no verdict." in page.words
    assert "Nothing is logged yet that could be drawn." in page.words
    assert "No probe was taken yet." in page.words
    assert "There are no figures by layer yet." in page.words
    assert "student layer | teacher layer 0 | 0 1 | 3" in page.words


def test_a_run_in_the_middle_of_a_line(tmp_path):
    run = make_run(tmp_path, [train(10)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "kind": "tr')
    page = report(run)
    assert "Step 10 of 20. It is not finished." in page.words
    assert len(page.all("img")) == 2  # loss, alignment


def test_nulls_are_dashes(tmp_path):
    none = {key: None for record in FINISHED for key in record if key.startswith(("eval_", "kv_"))}
    layers = {key: [None, None] for key in layers_of()}
    records = [
        train(20, ce=None, cos_sim=None, cos_shuffled=None),
        {"step": 20, "kind": "eval", **none, "layers": layers},
        {"step": 20, "kind": "diagnostics", **none, "probe_share_of_time": None},
    ]
    page = report(make_run(tmp_path, records))
    assert "At step 20 the cosine is not a number: no verdict." in page.words
    for name in ("First and last evaluation, on held-out rows", BY_LAYER, OTHERS):
        assert {cell for _, *row in page.tables[name][1:] for cell in row} == {DASH}
    assert "No probe was taken yet." in page.words


def test_probes_that_were_never_asked_for(tmp_path):
    run = make_run(tmp_path, [train(10)], train={"steps": 20, "diagnose_every": None})
    assert "train.diagnose_every=null: nothing is probed." in report(run).words


CALIBRATED = {
    "projector": {"kind": "linear", "per_layer": True, "init": "calibrated"},
    "teachers": [{"name": "big", "path": "builtin:demo_teacher", "layer_map": "calibrated"}],
}


def write_calibration(run, layer_map):
    scores = {"r2_k": [0.5, 0.25], "r2_v": [0.75, 1.0], "cka_k": [0.125, 0.0], "cka_v": [0.1, 0.9]}
    found = {"layer_map": layer_map.as_dict(), **scores, "cos_sim": 0.9375, "retrieval": 0.0625}
    (run / "calibration").mkdir()
    path = run / "calibration" / "calibration.json"
    path.write_text(json.dumps({"teachers": {"big": found}}))
    return path


def test_a_calibration_is_shown_with_its_map(tmp_path):
    run = make_run(tmp_path, [], **CALIBRATED)
    path = write_calibration(run, LayerMap((0, 1), ((0, 1), (1, 2))))
    page = report(run)
    assert page.tables["Layer map and calibration scores"] == [
        ["student layer", "teacher layers", "R² keys", "R² values", "CKA keys", "CKA values"],
        ["0", "0 + 1", "0.500", "0.750", "0.125", "0.100"],
        ["1", "1 + 2", "0.250", "1", "0", "0.900"],
    ]
    assert "cosine 0.938, share of tokens retrieved 0.062." in page.words
    path.write_text("{}")
    with pytest.raises(KavaError, match=r"calibration\.json' cannot be read"):
        write_report(run)
    path.unlink()
    assert "its calibration is not in the run directory" in report(run).words


def test_a_teacher_whose_logits_are_used_is_not_cut(tmp_path):
    pairs = [{"name": "big", "path": "builtin:demo_teacher", "layer_map": [[1, 0], [2, 1]]}]
    page = report(make_run(tmp_path / "cut", [], teachers=pairs))
    assert "It is cut after layer 2." in page.words
    whole = make_run(tmp_path / "whole", [], loss={"kl_weight": 1.0}, teachers=pairs)
    assert "cut after" not in report(whole).words


def of_models(student, layer_map="ratio"):
    teacher = {"name": "big", "path": "builtin:demo_teacher", "layer_map": layer_map}
    return {"student": {"path": student}, "teachers": [teacher]}


def test_models_that_are_not_at_hand_are_not_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    page = report(make_run(tmp_path / "named", FINISHED[-1:], **of_models("someone/somewhere")))
    assert "Its geometry was not found here, so the layers are not listed." in page.words
    # The columns are known all the same: a named map uses every layer of the student.
    heads = page.tables[BY_LAYER][0]
    assert heads == ["student layer", "0", "1"]
    pairs = of_models("/no/such/directory", [[3, 4], [1, 1]])
    page = report(make_run(tmp_path / "pairs", FINISHED[-1:], **pairs))
    heads = page.tables[BY_LAYER][0]
    assert heads == ["student layer", "1", "4"]
    assert "layer_map: - - 3 - 4 - - 1 - 1" in page.words  # the pairs themselves


def test_models_in_the_hubs_cache_are_at_hand(tmp_path, monkeypatch):
    kept = tmp_path / "cache" / "models--someone--small"
    write_directory(kept / "snapshots" / "abc", "qwen2")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    page = report(make_run(tmp_path / "run", [], **of_models("someone/small")))
    assert "teacher layer 0 | 0 1 | 2 2 | 3" in page.words


def test_other_models_in_the_same_place_do_no_harm(tmp_path):
    student = {"geometry": GEOMETRY | {"num_hidden_layers": 3}}
    page = report(make_run(tmp_path / "more", FINISHED[-1:], student=student))
    assert page.tables[BY_LAYER][0][1:] == ["0", "1"]
    pairs = [{"name": "big", "path": "builtin:demo_teacher", "layer_map": [[9, 0], [3, 1]]}]
    page = report(make_run(tmp_path / "deep", FINISHED[-1:], teachers=pairs))
    assert (
        "The models that are here now do not fit the config: teachers.0.layer_map: pairs"
        in page.words
    )


def test_what_a_config_says_is_text_not_html(tmp_path):
    evil = '<img src=x onerror="alert(1)">&amp;'
    teachers = [{"name": "big", "path": evil}]
    page = report(make_run(tmp_path, [train(10)], teachers=teachers))
    assert evil in page.text
    assert not [attrs for attrs in page.all("img") if attrs.get("src") == "x"]


def test_the_command_writes_the_file_and_names_it(tmp_path, capsys):
    run = make_run(tmp_path / "run", [], teachers=())
    ended = kava(capsys, "report", str(run))
    assert ended == (0, "", f"report: {run / 'report.html'}\n")
    out = tmp_path / "new" / "page.html"
    ended = kava(capsys, "report", str(run), "--out", str(out))
    assert ended == (0, "", f"report: {out}\n")
    assert out.read_text() == (run / "report.html").read_text()


def test_what_is_no_run_is_refused(finished, tmp_path, capsys):
    for run, problem in (
        (tmp_path, "manifest.yaml is missing; name a run directory"),
        (tmp_path / "none", "is no directory; name one made by `kava train`"),
        (finished / "manifest.yaml", "is no directory"),
    ):
        ended = kava(capsys, "report", str(run))
        assert (ended.code, ended.out) == (2, "")
        assert problem in ended.err
        assert len(ended.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
    run = make_run(tmp_path / "run", [], teachers=())
    ended = kava(capsys, "report", str(run), "--out", str(tmp_path))
    assert ended.code == 2
    assert f"out={tmp_path} is a directory; name a file" in ended.err
    broken = make_run(tmp_path / "broken", [])
    (broken / "metrics.jsonl").write_text("no json\n{}\n")
    ended = kava(capsys, "report", str(broken))
    assert ended.code == 2
    assert "line 1 is not a metrics line" in ended.err


def answers(of, *right):
    """Lines of ``answers.jsonl``, one question for each bit."""
    return [
        {
            "set": of,
            "question": f"{of}: how many is {number}?",
            "generated": f" It is\n#### {number if bit else 'lost'}",
            "gold": str(number),
            "strict": bit,
            "flexible": True,
        }
        for number, bit in enumerate(right)
    ]


def test_a_few_right_and_wrong_answers_of_every_set(tmp_path):
    run = make_run(tmp_path, FINISHED[-1:])
    assert "What it answers" not in report(run).words
    rows = [*answers("held_out", False, True, False, True, True, False), *answers("old", False)]
    rows[0]["generated"] = "<script>x</script>"
    (run / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = report(run)
    assert "Held-out questions: 3 of 6 right" in page.words
    assert "Set old: 0 of 1 right" in page.words
    shown = re.findall(r"(held_out|old): how many is (\d)\? wanted \d student: (\w+)", page.words)
    assert shown == [
        ("held_out", "1", "right"),
        ("held_out", "3", "right"),
        ("held_out", "0", "wrong"),
        ("held_out", "2", "wrong"),
        ("old", "0", "wrong"),
    ]
    assert "<script>x</script>" in page.text
    assert not page.all("script")
    (run / "answers.jsonl").write_text('{"set": "held_out"}\n')
    with pytest.raises(KavaError, match=r"answers\.jsonl' cannot be read \(KeyError\)"):
        write_report(run)


def test_scores_of_further_sets_stand_in_a_table_of_their_own(tmp_path):
    figures = {"old/eval_loss": 1.25, "old/exact_match_strict": 0.5, "old/exact_match_rows": 64.0}
    sets = {"old": {"path": "builtin:word_problems"}, "text": {"path": "text.jsonl"}}
    last = evaluation(20, **figures, **{"text/eval_loss": 2.0})
    page = report(make_run(tmp_path, [evaluation(0), last], eval={"sets": sets}))
    heads, old = evaluated(page, " of old")
    assert heads == ["figure", "step 0", "step 20"]
    assert old["held-out loss, nats per token"] == [DASH, "1.250"]
    assert old["exact match"] == [DASH, "0.500"]
    assert old["questions asked"] == [DASH, "64"]
    assert evaluated(page, " of text")[1] == {"held-out loss, nats per token": [DASH, "2"]}
    whole = page.tables["First and last evaluation, on held-out rows"]
    assert not [row for row in whole if "1.250" in row]


@pytest.fixture(scope="module")
def widest(tmp_path_factory):
    """A page with all that is wide: 28 layers, long names, everything unfolded."""
    layers = layers_of(layers=28)
    student = {"geometry": GEOMETRY | {"num_hidden_layers": 28}}
    run = make_run(
        tmp_path_factory.mktemp("report") / "widest",
        [*FINISHED[:-1], evaluation(20, layers=layers)],
        run={"name": "a" * 90},
        student=student,
    )
    text = write_report(run).read_text(encoding="utf-8")
    return text.replace("<details>", "<details open>")


def test_a_phone_never_scrolls_sideways(browser, widest):
    assert browser.scroll_width(widest) == 390
    assert browser.scroll_width(widest, width=1280) == 1280
    # It would be noticed.
    wide = widest.replace("</main>", "<div style='width:600px'>wide</div></main>")
    assert browser.scroll_width(wide) > 390


def test_the_page_is_drawn_light_and_dark(browser, widest):
    light, dark = (browser.screenshot(widest, scheme) for scheme in ("light", "dark"))
    assert light.shape == (1200, 500, 3)
    for pixels, paper in ((light, 1.0), (dark, 0.09)):
        shown = pixels[:, :390]
        np.testing.assert_allclose(shown[2, 2], paper, atol=0.05)
        ink = np.abs(shown - shown[2, 2]).max(-1) > 0.3
        assert 0.02 < ink.mean() < 0.9
        assert ink[:, :8].mean() < 0.01  # nothing touches the edge
