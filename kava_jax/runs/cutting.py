"""``kava cut``: which layers and units of a teacher are kept, and what that costs.

Layers are named, follow from a rule, or are measured: on calibration rows, by the loss without
them. A skipped layer is one whose output projections are zero, so one compiled loss serves all.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from kava_jax.config.file import parse_config, without_teachers
from kava_jax.config.pair import CutConfig
from kava_jax.config.run import Config
from kava_jax.data.batches import Batch
from kava_jax.data.dataset import HeldOut
from kava_jax.data.sources import BUILTIN_PROBLEMS
from kava_jax.data.text import Encoded
from kava_jax.errors import KavaError, StoppedError
from kava_jax.evaluation.heldout import make_measure
from kava_jax.geometry import Mean
from kava_jax.hf.card import cut_card
from kava_jax.hf.config_json import FloatName
from kava_jax.hf.cut import MEASURED, Rule, cut_on_disk, cut_spec, keys_stay, stored_dtype
from kava_jax.hf.cut_record import CutRecord
from kava_jax.hf.export import check_destination, export_model
from kava_jax.hf.load import read_spec
from kava_jax.hf.locate import model_fingerprint
from kava_jax.hf.names import parameter_shapes
from kava_jax.models.decoder import Params
from kava_jax.models.layers import Activations
from kava_jax.models.masks import attention_mask, token_positions
from kava_jax.models.spec import DecoderSpec
from kava_jax.parallel.sharding import replicated
from kava_jax.runs.blueprint import Blueprint
from kava_jax.runs.evaluate import held_out_batches
from kava_jax.runs.find_models import cut_source, find_models, planned, with_weights
from kava_jax.runs.prepare import Run, data_loader, find_tokenizer, prepare
from kava_jax.storage import Place

# A mean over fewer says more of these tokens than of the model.
LEAST_TOKENS = 256
# Training rows that ``student.cut`` is measured on.
TRAINING_ROWS = 128

# What puts each batch on the devices, when it is its turn.
Batches = Sequence[Callable[[], Batch]]


def cut(
    teacher: str,
    out: Place,
    kept: Mapping[str, Any],
    *,
    data: str | None,
    rows: int,
    overrides: Sequence[str],
    dtype: FloatName | Literal["auto"],
    command: Sequence[str],
) -> dict[str, Any]:
    """Cut a model and write it; what was kept and measured, as plain data.

    Args:
        teacher: directory, hub id or built-in name.
        out: the directory to write.
        kept: fields of ``student.cut``; None is the field's default.
        data: calibration rows, as ``data.path`` names them; None where nothing is measured.
        rows: how many of them.
        overrides: of fields of ``data`` and ``mesh``.
        dtype: of the weights on disk; ``auto`` is the teacher's.
        command: the command line, for the model card.

    Raises KavaError, before anything is measured or written, for whatever does not fit.
    """
    check_destination(out)
    for override in overrides:
        if not override.startswith(("data.", "mesh.")):
            raise KavaError(f"override={override!r}: kava cut takes data.* and mesh.* fields only")
    fields = {
        # Otherwise it would be runs/run, and a run there would give its date to chat templates.
        "run": {"dir": teacher},
        "student": {"cut": {"path": teacher}},
        "data": {"path": data or BUILTIN_PROBLEMS, "rows": rows, "batch_size": 32},
    }
    asked = [f"student.cut.{name}={value}" for name, value in kept.items() if value is not None]
    config = parse_config(fields, [*asked, *overrides])
    # Also refuses what does not fit the teacher.
    directory, wanted = find_models(config).student.directory, config.student.cut
    assert directory is not None
    assert wanted is not None
    spec = read_spec(directory)
    measures = [f"{name}={value}" for name, value in _measures(wanted, spec).items()]
    if measures and data is None:
        raise KavaError(f"{measures[0]} is measured on rows of text; give --data PATH")
    if not measures and (unread := [*overrides, *([f"data={data}"] if data else [])]):
        raise KavaError(f"{unread[0]} does nothing, since nothing is measured; leave it out")
    record, figures = settled(config, model_fingerprint(directory))
    name = stored_dtype(directory, spec) if dtype == "auto" else dtype
    found = _left(spec, record) | {"dtype": name} | figures
    card = cut_card(name=out.name, teacher=teacher, left=found, command=shlex.join(command))
    export_model(
        out,
        cut_on_disk(directory, spec, record, name),
        cut_spec(spec, record),
        dtype=name,
        tokenizer=None,
        source_dir=directory,
        card=card,
        cut=record,
    )
    return found


def _left(spec: DecoderSpec, record: CutRecord) -> dict[str, Any]:
    """What is left of a teacher, next to what there was."""
    ours = cut_spec(spec, record)
    merged = ours.num_kv_heads < spec.num_kv_heads
    turned = "turned towards one another, then their mean" if merged else "as they were"
    why = keys_stay(spec) if merged else None
    return {
        "layers": list(record.layers),
        "teacher_layers": spec.num_layers,
        "kv_heads": ours.num_kv_heads,
        "teacher_kv_heads": spec.num_kv_heads,
        "keys": f"mean only: {why}" if why else turned,
        "values": turned,
        "intermediate_size": ours.intermediate_size,
        "teacher_intermediate_size": spec.intermediate_size,
        "parameters": _size(ours),
        "teacher_parameters": _size(spec),
    }


def _size(spec: DecoderSpec) -> int:
    return sum(map(prod, parameter_shapes(spec).values()))


def _measures(cut: CutConfig, spec: DecoderSpec) -> dict[str, Any]:
    """The fields of a cut that have to be measured, with their values."""
    chooses = isinstance(cut.layers, int) and cut.layers < spec.num_layers and cut.rule in MEASURED
    narrower = cut.intermediate_size not in (None, spec.intermediate_size)
    fields = {"rule": chooses, "intermediate_size": narrower}
    return {name: getattr(cut, name) for name, measured in fields.items() if measured}


def settled(
    config: Config, fingerprint: str, rows: Sequence[Encoded] | None = None
) -> tuple[CutRecord, dict[str, Any]]:
    """What ``student.cut`` keeps, and the figures that decided it where it is measured.

    Args:
        config: of a run whose student is a cut one.
        fingerprint: of the model that is cut.
        rows: the run's training rows, of which the first are taken; None reads ``data.rows``.

    Raises KavaError for too few rows.
    """
    cut, source = config.student.cut, cut_source(config)
    assert cut is not None
    spec = with_weights(source).spec
    chosen = planned(cut, source, spec, fingerprint)
    figures: dict[str, Any] = {}
    if measures := _measures(cut, spec):
        # The uncut model alone, as a student without teachers.
        uncut = {"path": source, "cut": None, "tokenizer": find_tokenizer(config)[1]}
        run = prepare(parse_config(without_teachers(config, **uncut)))
        if rows is None:
            data = run.config.data
            examples = data_loader(run)(data.path, split=data.split, rows=data.rows)
            rows = HeldOut.of(examples, run.encoder).measured
        else:
            rows = rows[:TRAINING_ROWS]
        chosen, figures = _measured(run, measures.get("rule"), chosen, rows)
    return chosen, figures


def _measured(
    run: Run, rule: Rule | None, chosen: CutRecord, rows: Sequence[Encoded]
) -> tuple[CutRecord, dict[str, Any]]:
    """What is kept once rule and units are measured, and the figures that decided it.

    ``run`` is of the uncut model; without a rule the layers stay those that were chosen.
    """
    tokens = sum(int(row.targets.sum()) for row in rows)
    if tokens < LEAST_TOKENS:
        raise KavaError(
            f"data={run.config.data.path}: {len(rows)} rows have {tokens} tokens to predict, too "
            f"few to measure by; give at least {LEAST_TOKENS}"
        )
    batches = held_out_batches(run, rows)
    params, depth = run.blueprint.load_student(), run.blueprint.student_spec.num_layers
    keep, layers, units = len(chosen.layers), chosen.layers, chosen.units
    whole = losses(run.blueprint, params, batches, np.ones((1, depth)))
    figures: dict[str, Any] = {"rows": len(rows), "tokens": tokens, "loss_before": float(whole[0])}
    if rule is not None:
        width = 1 if rule == "best_layers" else depth - keep
        skipped = [range(first, first + width) for first in range(depth - width + 1)]
        kept_ML = np.array([[float(n not in block) for n in range(depth)] for block in skipped])
        without = losses(run.blueprint, params, batches, kept_ML)
        for block, loss in zip(skipped, without.tolist(), strict=True):
            name = f"{block[0]}-{block[-1]}" if width > 1 else f"{block[0]}"
            figures[f"loss_without/{name}"] = loss
        # A loss that is no number costs more than any that is one.
        order = np.argsort(np.nan_to_num(without, nan=np.inf), kind="stable").tolist()
        gone = skipped[order[0]] if rule == "best_block" else order[: depth - keep]
        layers = tuple(layer for layer in range(depth) if layer not in gone)
    if units is not None:
        means_LF = unit_means(run.blueprint, params, batches)[list(layers)]
        largest = np.argsort(-means_LF, axis=1, kind="stable")[:, : len(units[0])]
        units = tuple(tuple(sorted(row)) for row in largest.tolist())
    return chosen.model_copy(update={"layers": layers, "units": units}), figures


def losses(
    blueprint: Blueprint,
    params: Params,
    batches: Batches,
    kept_ML: Float[np.ndarray, "M L"],
) -> Float[np.ndarray, "M"]:
    """Cross-entropy of a run's student with some layers only: 1 keeps a layer, 0 skips it."""
    measure = make_measure(blueprint.objective, blueprint.mesh)

    def loss(params: Params, kept_L: Float[Array, "L"], batch: Batch) -> Mean:
        student = _skipping(params, kept_L)
        return measure({"student": student, "projector": {}}, {}, {}, batch)["ce"]

    jitted = jax.jit(loss, out_shardings=replicated(blueprint.mesh))
    total = np.zeros((len(kept_ML), 2))
    for make in batches:
        batch = make()
        for number, kept_L in enumerate(kept_ML):
            total[number] += jax.device_get(tuple(jitted(params, jnp.float32(kept_L), batch)))
    found = total[:, 0] / total[:, 1]
    if not np.isfinite(found).any():
        raise StoppedError("the loss on the calibration rows overflows; use another teacher")
    return found


def unit_means(blueprint: Blueprint, params: Params, batches: Batches) -> Float[np.ndarray, "L F"]:
    """Mean ``|silu(gate) * up|`` of every feed-forward unit of a run's student, over all tokens."""

    def sums(params: Params, batch: Batch) -> Float[Array, "L F"]:
        model = nnx.merge(blueprint.student.graph, params)
        positions_BT = token_positions(batch.valid)
        mask = attention_mask(positions_BT, positions_BT, batch.valid, model.spec.windows)

        def summed(new: Activations) -> Array:
            assert new.units is not None
            units_BTF = jnp.abs(new.units.astype(jnp.float32))
            return jnp.where(batch.valid[..., None], units_BTF, 0).sum(axis=(0, 1))

        return model.keeping(batch.tokens, positions_BT, mask, summed)[1]

    jitted = jax.jit(sums, out_shardings=replicated(blueprint.mesh))
    total, tokens = 0.0, 0
    for make in batches:
        batch = make()
        total = total + np.asarray(jax.device_get(jitted(params, batch)), np.float64)
        tokens += int(batch.valid.sum())
    return np.asarray(total / tokens)


def _skipping(params: Params, kept_L: Float[Array, "L"]) -> Params:
    """The parameters with the output projections of skipped layers times 0: they add nothing."""
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    for path, leaf in flat.items():
        if path.startswith(("blocks/attention/o/", "blocks/mlp/down/")):
            flat[path] = leaf * kept_L.reshape(-1, *(1,) * (leaf.ndim - 1))
    return unflatten_dict(flat, sep="/")
