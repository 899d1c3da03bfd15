"""The page of a grid: right numbers, sound HTML, and fit for a phone, the dark and grey paper."""

import base64
import json
import re

import numpy as np
import pytest

from kava_jax.errors import KavaError
from kava_jax.experiments import report as page_of
from kava_jax.experiments.contrasts import compare
from kava_jax.experiments.report import write_grid_report
from kava_jax.experiments.results import read_results
from kava_jax.experiments.statistics import in_words
from tests.experiments.made_up import change_run, made_up_run, outcome, write_made_up, write_results
from tests.experiments.pages import Page, check_stands_alone, ids_and_labels
from tests.tiny import kava

DASH = "\N{EN DASH}"
FIELDS = {"kv": {"loss.kv": "mercator", "loss.kv_weight": {"start": 3, "end": 0}}}


def report(directory, out=None):
    return Page(write_grid_report(directory, out).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    directory = tmp_path_factory.mktemp("grid") / "made-up"
    write_made_up(directory, contrast="kv", fields=FIELDS, set={"train.steps": 20})
    write_grid_report(directory)
    return directory


@pytest.fixture(scope="module")
def text(grid):
    return (grid / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


@pytest.fixture(scope="module")
def comparison(grid):
    return compare(read_results(grid))


def test_the_page_stands_alone_and_is_well_formed(page, text):
    check_stands_alone(page, text)
    ids, labels = ids_and_labels(page)
    assert labels == ids


def test_what_was_compared_and_what_was_declared(page, comparison):
    assert "3 arms x 3 seeds (0, 1, 2), 64 questions per seed, 20 steps" in page.words
    assert "Not finished" not in page.words
    declared = comparison.declared
    assert in_words(declared, "kv", "ce") in page.words
    low, high = (f"{100 * end:+z.1f}" for end in declared.student)
    assert f"safer one with few seeds: {low} to {high} points." in page.words
    assert f"{100 * declared.per_seed[0]:+.1f}" in page.words
    assert "better" not in page.words.lower()


def test_what_else_was_to_be_compared(tmp_path):
    """Another arm, or several; an arm with a number of steps of its own says so."""
    arms = {"ce": (0.3, None), "kl": (0.4, None), "long": (0.5, None), "kv": (0.6, 0.9)}
    against = {"kv": ["kl", "long"], "long": "kl"}
    fields = {"long": {"train.steps": 1512}}
    grid = {"arms": arms, "contrast": "kv", "against": against, "fields": fields}
    page = report(write_made_up(tmp_path / "grid", **grid))
    for pair in ("kv minus kl", "kv minus long", "long minus kl"):
        assert re.search(
            rf"{pair}: [+-]\d+\.\d points \(95 % interval .*?\), [01]\.\d{{3}} after Holm's corr",
            page.words,
        )
    for table in ("Scores", "Other figures"):
        rows = page.tables[next(name for name in page.tables if name.startswith(table))]
        names = {row[0] for row in rows[1:]}
        assert names == {"kv (declared)", "long (1512 steps)", "kl", "ce (baseline)"}


def test_the_tables_hold_the_comparison(page, comparison):
    heads, *rows = page.tables["Scores, highest first"]
    assert heads[:3] == ["arm", "seeds", "exact match, %"]
    assert [row[0] for row in rows] == ["kv (declared)", "kl", "ce (baseline)"]
    kv, kl, ce = (dict(zip(range(8), row, strict=True)) for row in rows)
    own = comparison.arms["kv"]
    assert kv[2] == f"{100 * own.score.mean:.1f}"
    assert kv[3] == " to ".join(f"{100 * end:.1f}" for end in own.score.interval)
    assert kv[4] == f"{100 * own.difference.mean:+.1f}"
    assert kv[5] == " to ".join(f"{100 * end:+z.1f}" for end in own.difference.interval)
    assert kv[6] == " to ".join(f"{100 * end:+z.1f}" for end in own.difference.student)
    assert kv[7] == f"{own.difference.p_value:.3f}"
    assert kl[7] == f"{comparison.arms['kl'].difference.p_holm:.3f}"
    assert [ce[column] for column in (4, 5, 6, 7)] == [DASH] * 4
    heads, first, *_ = page.tables["Other figures, highest score first"]
    found = dict(zip(heads, first, strict=True))
    assert found["time of a step"] == "1.50"
    assert found["cosine"] == f"{own.cosine:.3f}"
    assert found["gradient spread"] == f"{own.gradient_spread:.3f}"
    assert found["steps to the baseline's score"] == f"{np.mean(own.reached):.0f}"
    heads, first, *_ = page.tables["By set, highest score first"]
    assert heads[1] == "old: exact match, %"
    assert first[1] == f"{100 * own.sets['old/exact_match_strict']:.1f}"
    assert first[2] == f"{100 * own.set_differences['old'].mean:+.1f}"


def test_every_picture_is_inside_and_tells_its_numbers(page, comparison):
    pictures = page.all("img")
    assert len(pictures) == 4  # loss, exact match, cosine, gap
    for attrs in pictures:
        png = base64.b64decode(attrs["src"].removeprefix("data:image/png;base64,"), validate=True)
        assert png.startswith(b"\x89PNG")
    loss, answers, cosine, gap = (p["alt"] for p in pictures)
    own = comparison.arms["kv"].score
    assert re.search(
        r"ce: 4\.\d{3} at step 0, 1\.\d{3} at step 20, between 1\.\d{3} and 1\.\d{3}\.", loss
    )
    assert f"kv: {100 * own.mean / 2:.3f} at step 10, {100 * own.mean:.3f} at step 20" in answers
    assert f"at step 0, {comparison.arms['kv'].cosine:.3f} at step 20, between" in cosine
    assert f"{comparison.arms['kv'].gap:.3f} at step 20, between" in gap
    words = "Rank correlation (Spearman's rho) of cosine and score"
    assert f"{words} {comparison.cosine.rho:.2f} over 3 runs, too few" in page.words


def scores_of(page):
    """Of each arm's score as drawn: where its interval, its mean and the baseline are, in parts."""
    tracks = [attrs["style"] for attrs in page.all("span") if attrs.get("class") == "track"]
    return [
        {name: float(x) for name, x in re.findall(r"--(\w+): ([-\d.e]+)", style)}
        for style in tracks
    ]


def test_scores_are_drawn_to_scale_in_the_order_of_the_table(page, comparison):
    order = ("kv", "kl", "ce")
    for drawn, arm in zip(scores_of(page), order, strict=True):
        score = comparison.arms[arm].score
        assert (drawn["low"], drawn["high"]) == pytest.approx(score.interval)
        assert drawn["mean"] == pytest.approx(score.mean)
        assert drawn["base"] == pytest.approx(comparison.arms["ce"].score.mean)
        assert f"{100 * score.mean:.1f} %" in page.words


def test_the_declared_arm_is_looked_into_layer_by_layer(page, grid):
    name = "Held-out figures of kv beside big by student layer, mean over seeds"
    heads, *rows = page.tables[name]
    assert heads == ["student layer", "0", "1"]
    runs = read_results(grid).arms["kv"].values()
    means = np.mean([run.layers["big/cos_centered_k"] for run in runs], axis=0)
    assert ["centred cosine, keys", *(f"{x:.3f}" for x in means)] in rows
    others = page.tables[f"{name}: lengths, ranks and others"]
    assert ["length ratio, median, keys", "0.900", "0.990"] in others


def test_answers_of_the_baseline_and_of_the_declared_arm(page, grid):
    assert "How many apples has child 1 of seed 0?" in page.words
    assert "wanted 2 ce: " in page.words
    bits = [run.correct["held_out"] for run in read_results(grid).arms["kv"].values()]
    first = bin(int(bits[0].split(":")[1][:2], 16))[2:].zfill(8)
    marks = re.findall(r"kv: (right|wrong) 2\*\d", page.words)
    assert marks == ["right" if bit == "1" else "wrong" for bit in first[:3]]


def test_how_it_was_made(page):
    assert "kv: loss.kv: mercator loss.kv_weight: start: 3 end: 0" in page.words
    assert "kl: {}" in page.words
    assert "set: train.steps: 20" in page.words
    assert "path: builtin:word_problems" in page.text
    assert "python: '3.11' jax: 0.10.2" in page.words


def test_a_grid_for_choosing_says_that_nothing_was_declared(tmp_path):
    page = report(write_made_up(tmp_path / "grid"))
    assert "No contrast was declared." in page.words
    assert "confirmed once, on fresh seeds" in page.words
    assert "Layer by layer: kv" in page.words  # the highest score
    (row,) = [row for row in page.tables["Scores, highest first"] if row[0] == "kv"]
    assert row[7] == "0.500"  # twice 2 / 2^3: both arms are corrected


def test_arms_that_were_not_run_yet(tmp_path):
    runs = {
        "ce": [made_up_run(s, 0.3) for s in (0, 1)],
        "kv": [made_up_run(1, 0.6, cosine=0.9)],
        "late": [],
    }
    page = report(write_results(tmp_path / "grid", runs, seeds=(0, 1), contrast="kv"))
    assert "Not finished: 3 of 6 runs are here. What is missing kv: seed 0 late: all" in page.words
    assert re.search(r"kv minus ce: \+\d\d\.\d points, with one seed only; no interval", page.words)
    assert "How many apples has child 1 of seed 1?" in page.words
    assert [row[0] for row in page.tables["Scores, highest first"][1:]] == [
        "kv (declared)",
        "ce (baseline)",
    ]


def test_one_seed_has_no_intervals(tmp_path):
    page = report(write_made_up(tmp_path / "grid", seeds=(5,), contrast="kv"))
    for row in page.tables["Scores, highest first"][1:]:
        assert [row[column] for column in (3, 5, 6, 7)] == [DASH] * 4
    assert "one seed has no band" in page.words
    assert "which one seed alone has not" in page.words
    assert not any("between" in attrs["alt"] for attrs in page.all("img"))
    for drawn in scores_of(page):
        assert drawn["low"] == drawn["high"] == drawn["mean"]
    assert "cannot go below" not in page.words


def test_nothing_was_run_yet(tmp_path):
    page = report(write_results(tmp_path / "grid", {"ce": [], "kv": []}, contrast="kv"))
    assert "No run has a score yet." in page.words
    assert "kv minus ce was declared; they have no seed in common yet." in page.words
    assert page.all("img") == []
    assert scores_of(page) == []


def test_a_grid_scored_by_loss_needs_no_answers(tmp_path):
    losses = {"ce": (1.5, 1.25, 1.0), "kv": (1.0, 1.125, None)}
    runs = {
        arm: [outcome(s, values={"eval_loss": loss}) for s, loss in enumerate(own)]
        for arm, own in losses.items()
    }
    page = report(write_results(tmp_path / "grid", runs, contrast="kv", score="eval_loss"))
    heads, kv, ce = page.tables["Scores, lowest first"]
    assert len(heads) == len(kv) == 7
    assert kv[:3] == ["kv (declared)", "3, 1 diverged", "1.062"]
    assert kv[4] == "-0.312"
    assert ce[2] == "1.250"
    assert "Seed by seed: -0.5, -0.125." in page.words
    assert "held-out loss" not in page.tables["Other figures, lowest score first"][0]
    kv_drawn, ce_drawn = scores_of(page)  # from the least to the highest end of all intervals
    assert min(kv_drawn["low"], ce_drawn["low"]) == 0
    assert max(kv_drawn["high"], ce_drawn["high"]) == pytest.approx(1)
    assert 0 < kv_drawn["mean"] < ce_drawn["mean"] == ce_drawn["base"] < 1


def test_what_files_say_is_text_not_html(tmp_path):
    """An arm's name is checked by the grid; its fields, the data's words and answers are not."""
    evil = "<script>alert('&amp;')</script>"
    fields = {"kv": {"teachers.0.path": evil}}
    directory = write_made_up(tmp_path / "grid", contrast="kv", fields=fields)
    sample = {"question": "q", "generated": evil, "gold": evil}
    change_run(directory, "kv", 0, lambda run: run["samples"].__setitem__(0, sample))
    asked = {"question": evil, "gold": evil}
    change_run(directory, "ce", 0, lambda run: run["samples"][0].update(asked))
    page = report(directory)
    assert page.text.count(evil) == 4  # question, wanted, answer, and the field in the grid
    assert not page.all("script")
    grid = json.loads((directory / "grid.json").read_text())
    grid["grid"]["arms"][evil] = {}
    (directory / "grid.json").write_text(json.dumps(grid))
    with pytest.raises(KavaError, match="is no grid of this version"):
        write_grid_report(directory)


def test_bands_are_students_intervals_and_ranges(grid):
    results = read_results(grid)
    arm = results.arms["kv"]

    def band(key, seeds=(0, 1, 2)):
        few = results._replace(arms={"kv": {seed: arm[seed] for seed in seeds}})
        return next(iter(page_of._bands(few, ["kv"], key).lines), None)

    values = [[point["eval_loss"] for point in run.curve] for run in arm.values()]
    own = band("eval_loss")
    assert list(own.points) == [0, 10, 20]
    assert list(own.points.values()) == pytest.approx(np.mean(values, axis=0))
    # Student's t of two degrees of freedom, from a table.
    half = 4.302653 * np.std(values, axis=0, ddof=1) / 3**0.5
    highs = [high for _, high in own.ends.values()]
    assert highs == pytest.approx(np.mean(values, axis=0) + half, rel=1e-5)
    answers = band("exact_match_strict")
    assert list(answers.points) == [10, 20]
    assert all(0 <= low <= high <= 100 for low, high in answers.ends.values())
    lows = [low for low, _ in band("eval_loss", (0, 1)).ends.values()]
    assert lows == pytest.approx(np.min(values[:2], axis=0))
    assert band("eval_loss", (0,)).ends == {}
    assert page_of._bands(results, ["ce"], "eval_cos_sim").lines == []


def test_six_arms_are_drawn_at_most(tmp_path):
    levels = {f"arm{place}": (place / 10, None) for place in range(8)} | {"ce": (0.05, None)}
    grid = {"arms": levels, "contrast": "arm1", "questions": 4096}
    page = report(write_made_up(tmp_path / "grid", **grid))
    drawn = re.findall(r"([a-z]+\d?): [\d.]+ at step 0", page.all("img")[0]["alt"])
    assert drawn == ["ce", "arm1", "arm7", "arm6", "arm5", "arm4"]


def test_the_command_knows_a_grid_from_a_run(grid, tmp_path, capsys):
    out = tmp_path / "new" / "page.html"
    ended = kava(capsys, "report", str(grid), "--out", str(out))
    assert ended == (0, "", f"report: {out}\n")
    assert out.read_text() == (grid / "report.html").read_text()
    ended = kava(capsys, "report", str(tmp_path))
    assert ended.code == 2
    assert "manifest.yaml is missing; name a run directory" in ended.err
    (tmp_path / "grid.json").write_text("{")
    ended = kava(capsys, "report", str(tmp_path))
    assert (ended.code, len(ended.err.splitlines())) == (2, 1)
    assert "grid.json is no grid of this version (JSONDecodeError)" in ended.err


@pytest.fixture(scope="module")
def widest(tmp_path_factory):
    """A page with all that is wide: long names, long answers, everything unfolded."""
    long = "an-arm-with-quite-a-long-name"
    levels = {"ce": (0.3, None), long: (0.6, 0.9), "kl": (0.4, 0.2)}
    fields = {long: {"teachers.0.path": "x" * 300}}
    directory = tmp_path_factory.mktemp("wide") / "grid"
    write_made_up(directory, arms=levels, fields=fields, contrast=long, name="a" * 90)
    wide = {"question": "q" * 300, "generated": "9" * 300}
    change_run(directory, "ce", 0, lambda run: run["samples"][0].update(wide))
    text = write_grid_report(directory).read_text(encoding="utf-8")
    return text.replace("<details>", "<details open>")


@pytest.mark.parametrize("width", [390, 1200])
def test_no_screen_scrolls_sideways(browser, widest, width):
    assert browser.scroll_width(widest, width=width) == width
    # It would be noticed.
    wide = widest.replace("</main>", "<div style='width:1300px'>wide</div></main>")
    assert browser.scroll_width(wide, width=width) > width


@pytest.mark.long
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_is_drawn_light_and_dark(browser, text, width):
    for scheme, paper in (("light", 1.0), ("dark", 0.09)):
        shown = browser.screenshot(text, scheme, width=width, height=2400)[:, :width]
        np.testing.assert_allclose(shown[2, 2], paper, atol=0.05)
        ink = np.abs(shown - shown[2, 2]).max(-1) > 0.3
        assert 0.02 < ink.mean() < 0.9
        for edge in (ink[:, :8], ink[:, -8:]):
            assert edge.mean() < 0.01  # nothing touches it


def test_pictures_hold_without_colour(page):
    """In grey every picture still has paper, ink and something between."""
    import io

    import matplotlib.image

    for attrs in page.all("img"):
        png = base64.b64decode(attrs["src"].removeprefix("data:image/png;base64,"))
        grey = matplotlib.image.imread(io.BytesIO(png))[..., :3] @ (0.299, 0.587, 0.114)
        assert np.mean(grey > 0.98) > 0.3
        assert np.mean(grey < 0.6) > 0.003
