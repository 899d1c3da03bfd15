"""``kava eval``: any student on any data, a run's with its alignment, a directory's without."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from kava_jax.config.file import parse_config
from kava_jax.data.dataset import HeldOut
from kava_jax.errors import KavaError, StoppedError
from kava_jax.journal.manifest import MANIFEST_NAME, OLD_MANIFEST_NAME
from kava_jax.runs.evaluate import answer_notes, choice_note, evaluate
from kava_jax.runs.handed import assess_handed
from kava_jax.runs.prepare import Run, data_loader, prepare
from kava_jax.runs.reopen import config_of, gone, reopen, reopen_student, restore, restore_student
from kava_jax.storage import check_access, place


def assess(
    model: str,
    data: str,
    *,
    checkpoint: str,
    rows: int | None,
    handoff: bool = False,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda note: None,
) -> dict[str, Any]:
    """Held-out figures of a run directory, a Hugging Face directory or a hub id on ``data``.

    ``overrides`` change fields of ``data`` and ``eval`` (format, field names, split, new tokens).
    A run whose teachers are gone is evaluated without alignment. With ``handoff`` a run's teachers
    are evaluated too, and answers from handed-over caches; every answer is timed.
    ``say`` is told what is not measured or not scored. ``eval_rows`` are those measured.
    The built-in generator is asked for its test split unless ``data.eval_split`` says otherwise.
    """
    for override in overrides:
        # Any other field would describe another model than the one whose weights are read.
        if not override.startswith(("data.", "eval.")):
            raise KavaError(f"override={override!r}: kava eval takes data.* and eval.* fields only")
    directory = place(model, "model")
    check_access(directory, "model")
    if any((directory / name).is_file() for name in (MANIFEST_NAME, OLD_MANIFEST_NAME)):
        lost = {} if handoff else gone(config_of(directory, overrides))
        run = reopen_student(directory, overrides) if lost else reopen(directory, overrides)
        held = _held_out(run, data, rows)
        if lost:
            params: dict[str, Any] = {"student": restore_student(run, checkpoint)[1]}
            params["projector"], teachers, statistics = {}, {}, None
        else:
            state = restore(run, checkpoint)
            params, statistics = state.params, state.statistics
            teachers = run.blueprint.load_teachers()
        _say_of(run, data, held, say)
        chosen = choice_note(run.config)
        if checkpoint == "best" and chosen:
            say(chosen)
        for field, path in lost.items():
            say(f"{field}={path!r} is gone: alignment with the teachers is not measured")
        # First, since it refuses runs that hand nothing over.
        handed = assess_handed(run, held, params, teachers) if handoff else {}
        found = evaluate(run, held, params, teachers, statistics, answers=not handoff)
        return _told(held, found | handed, say)
    if handoff:
        raise KavaError(f"handoff: {model!r} is not a run directory; give one, or leave it out")
    if checkpoint != "last":
        raise KavaError(
            f"checkpoint={checkpoint!r}: {model!r} is not a run directory; leave it out"
        )
    fields = {
        # Otherwise it would be runs/run, and a run there would give its date to chat templates.
        "run": {"dir": model},
        "student": {"path": model},
        "data": {"path": data, "batch_size": 32},
    }
    run = prepare(parse_config(fields, overrides))
    held = _held_out(run, data, rows)
    params = {"student": run.blueprint.load_student(), "projector": {}}
    _say_of(run, data, held, say)
    return _told(held, evaluate(run, held, params, {}), say)


def _told(held: HeldOut, found: dict[str, float], say: Callable[[str], None]) -> dict[str, Any]:
    """The figures, and what to say of those that are none.

    Raises StoppedError for a loss that is not finite: the weights were, as they were looked at.
    """
    if not math.isfinite(found["eval_loss"]):
        raise StoppedError(
            f"eval_loss={found['eval_loss']}: the weights are finite, and what is computed with "
            f"them overflows; use another checkpoint"
        )
    none = [name for name, value in found.items() if not math.isfinite(value)]
    if none:
        say(f"not measurable on these rows: {', '.join(none)}")
    return {"eval_rows": len(held.measured)} | found


def _held_out(run: Run, data: str, rows: int | None) -> HeldOut:
    settings = run.config.data
    split = settings.eval_split or ("test" if data.startswith("builtin:") else settings.split)
    return HeldOut.of(data_loader(run)(data, split=split, rows=rows), run.encoder)


def _say_of(run: Run, data: str, held: HeldOut, say: Callable[[str], None]) -> None:
    for note in (f"{data}: {held.sentence}", *answer_notes(run.config, data, held)):
        say(note)
