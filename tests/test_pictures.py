"""The pictures of the concept page: the script draws them all, and they show what the page says."""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tolerances import TOL

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
LARGEST = 100_000  # bytes
PHONE = 800  # pixels: what is wider has letters too small for a phone


@pytest.fixture(scope="module")
def scripts():
    """``concept`` and ``concept_numbers``, which are no package."""
    folder = str(DOCS / "pictures")
    sys.path.insert(0, folder)
    try:
        import concept
        import concept_numbers

        yield concept, concept_numbers
    finally:
        sys.path.remove(folder)


def pictures_in(page: Path) -> list[Path]:
    """Every picture that a page shows."""
    text = page.read_text(encoding="utf-8")
    return [(page.parent / link).resolve() for link in re.findall(r"!\[[^]]*\]\(([^)\s]+)\)", text)]


def sizes(paths: Iterable[Path]) -> dict[str, tuple[int, int]]:
    found = {}
    for path in paths:
        with Image.open(path) as image:
            found[path.name] = image.size
    return found


def test_the_script_draws_every_picture_that_the_pages_show(scripts, tmp_path):
    concept, _ = scripts
    drawn = sizes(concept.draw(tmp_path))
    shown = {path for page in PAGES for path in pictures_in(page)}
    ours = {path.name for path in shown if path.parent == DOCS / "pictures"}
    assert ours == set(drawn)
    assert sizes((DOCS / "pictures").glob("*.png")) == drawn, (
        "python docs/pictures/concept.py draws them anew"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_picture_exists(page):
    assert not [path for path in pictures_in(page) if not path.is_file()]


@pytest.mark.parametrize("path", sorted((DOCS / "pictures").glob("*.png")), ids=lambda p: p.stem)
def test_a_picture_suits_a_phone_and_grey_print(path):
    assert path.stat().st_size < LARGEST
    with Image.open(path) as image:
        assert image.width <= PHONE
        grey = np.asarray(image.convert("L"))
    # White paper and near-black ink: nothing rests on colour alone to be seen at all.
    assert grey.max() >= 250
    assert grey.min() <= 60


def test_mse_prefers_the_shorter_vector_to_the_right_direction(scripts):
    found = scripts[1].by_angle((0.5, 1.0, 2.0))
    half_60, twice_0 = found.mse[0][30], found.mse[2][0]
    assert found.degrees[30] == 60
    assert half_60 == pytest.approx((0.25 + 1 - 2 * 0.5 * 0.5) / 2, rel=TOL["float32"])
    assert twice_0 == pytest.approx(0.5, rel=TOL["float32"])
    radians = np.radians(found.degrees.astype(float))
    for row in found.mercator:  # the same for every length
        np.testing.assert_allclose(row, 1 - np.cos(radians), atol=TOL["float32"])


def test_downhill_is_a_turn_that_short_vectors_make_faster(scripts):
    found = scripts[1].surface("mercator")
    students = np.stack(np.meshgrid(found.axis, found.axis), axis=-1).astype(float)
    lengths = np.linalg.norm(students, axis=-1)
    there = lengths > 0
    radial = (found.downhill * students).sum(axis=-1)[there]
    np.testing.assert_allclose(radial, 0, atol=10 * TOL["float32"])
    cosines = 1 - found.values[there].astype(float)
    expected = np.sqrt(np.clip(1 - cosines**2, 0, None)) / lengths[there]
    measured = np.linalg.norm(found.downhill, axis=-1)[there]
    # The sine of a small angle from its cosine has half the digits.
    np.testing.assert_allclose(measured, expected, atol=0.05)


def test_students_keep_to_their_great_circles_and_arrive(scripts):
    concept, numbers = scripts
    starts = concept._near_side(concept.STARTS) * np.array(concept.LENGTHS)[:, None]
    found = numbers.paths(starts.astype(np.float32), concept._near_side(concept.AIMS))
    normals = np.cross(found.directions[0], found.targets)
    off = np.einsum("spx,px->sp", found.directions, normals)
    np.testing.assert_allclose(off, 0, atol=10 * TOL["float32"])
    cosines = (found.directions[-1] * found.targets).sum(axis=-1)
    assert cosines.min() > 0.999
    # A tangential step of finite size lengthens, and only a little.
    growth = found.lengths[-1] / found.lengths[0]
    assert growth.min() >= 1
    assert growth.max() < 1.05


def test_the_magnitude_term_counts_ratios(scripts):
    ratios = np.array([0.5, 1.0, 2.0, 10.0])
    found = scripts[1].by_ratio(ratios, (0.01, 0.1))
    expected = np.outer([0.01, 0.1], np.log(ratios) ** 2)
    np.testing.assert_allclose(found, expected, atol=TOL["float32"])


def test_unrelated_keys_score_what_the_formula_says(scripts):
    ratios = np.array([0.5, 1.0, 3.0, 10.0])
    found = scripts[1].offsets(ratios)
    # Sampling: 512 pairs in 128 dimensions.
    np.testing.assert_allclose(found.unrelated, ratios**2 / (1 + ratios**2), atol=0.02)
    np.testing.assert_allclose(found.constant, ratios / np.sqrt(1 + ratios**2), atol=0.02)
    np.testing.assert_allclose(found.centred, 0, atol=0.02)


def test_a_joint_projector_reaches_one_against_noise_and_an_anchored_one_does_not(scripts):
    joint = scripts[1].joint_training("teacher_to_student")
    assert joint.cos[:10].mean() < 0.2
    assert min(joint.cos[100:].min(), joint.cos_shuffled[100:].min()) > 0.98
    assert np.abs(joint.cos[100:] - joint.cos_shuffled[100:]).max() < 0.01
    anchored = scripts[1].joint_training("student_to_teacher")
    assert np.abs(anchored.cos[100:].mean()) < 0.05


def test_rope_turns_a_key_away_from_itself(scripts):
    distances = np.arange(0, 65, 16)
    model, head_dim, theta = "Qwen/Qwen2.5-0.5B", 64, 1e6
    found = scripts[1].turned_keys(model, distances, keys=4096)
    pairs = np.arange(0, head_dim, 2) / head_dim
    expected = np.cos(distances[:, None] * theta**-pairs).mean(axis=1)
    np.testing.assert_allclose(found, expected, atol=0.02)
    assert found[0] == pytest.approx(1, abs=TOL["float32"])
    assert found[1:].max() < 0.9
