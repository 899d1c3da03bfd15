"""``kava cut``: which layers and units of a teacher are kept, and what that costs.

Layers are named, follow from a rule, or are measured: on calibration rows, by the loss without
them. A skipped layer is one whose output projections are zero, so one compiled loss serves all.
"""

import shlex
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from kava_jax.config.file import dump_config, parse_config
from kava_jax.config.run import Config
from kava_jax.data.batches import Batch
from kava_jax.data.dataset import HeldOut
from kava_jax.data.text import Encoded
from kava_jax.errors import KavaError, StoppedError
from kava_jax.evaluation.heldout import make_measure
from kava_jax.geometry import Mean
from kava_jax.hf.card import cut_card
from kava_jax.hf.config_json import FloatName
from kava_jax.hf.cut import (
    MEASURED,
    RULES,
    Cut,
    Rule,
    check_uncut,
    cut_record,
    cut_spec,
    load_cut_params,
    plan_cut,
    stored_dtype,
    write_cut,
)
from kava_jax.hf.cut_record import CutRecord
from kava_jax.hf.export import check_destination
from kava_jax.hf.load import read_spec
from kava_jax.hf.locate import resolve_model
from kava_jax.hf.names import parameter_shapes
from kava_jax.models.decoder import Decoder, Params
from kava_jax.models.masks import attention_mask, token_positions
from kava_jax.models.spec import DecoderSpec
from kava_jax.parallel.sharding import replicated
from kava_jax.runs.blueprint import Blueprint, make_blueprint
from kava_jax.runs.evaluate import held_out_batches
from kava_jax.runs.find_models import Found, Models, cut_source, with_weights
from kava_jax.runs.parts import place_slices
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
    *,
    layers: str | None,
    keep: int | None,
    rule: str | None,
    kv_heads: int | None,
    intermediate_size: int | None,
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
        layers: layers to keep, ``0,1,2`` or ``all``; else ``keep`` of them by ``rule``.
        keep: how many.
        rule: one of ``RULES``; the first by default.
        kv_heads: how many are left; all by default.
        intermediate_size: feed-forward units left in each layer; all by default.
        data: calibration rows, as ``kava eval`` reads them.
        rows: how many of them.
        overrides: of fields of ``data`` and ``mesh``.
        dtype: of the weights on disk; ``auto`` is the teacher's.
        command: the command line, for the model card.

    Raises KavaError, before anything is measured or written, for whatever does not fit.
    """
    if layers is not None and keep is not None:
        raise KavaError("layers and keep: both given; give one, --layers 0,1,2 or --keep N")
    check_destination(out)
    directory = resolve_model(teacher)
    check_uncut(directory, teacher)
    spec = read_spec(directory)
    chosen_rule = _rule(rule, keep)
    wanted = _listed(layers) if keep is None else keep
    chosen = plan_cut(spec, wanted, chosen_rule, kv_heads, intermediate_size, field="keep")
    ours = cut_spec(spec, chosen)
    measured_rule = _measured_rule(chosen_rule, wanted, spec)
    if data is None:
        needs = f"rule={rule}" if measured_rule else f"intermediate_size={intermediate_size}"
        if measured_rule or chosen.units:
            raise KavaError(f"{needs} is measured on rows of text; give --data PATH")
        if overrides:
            raise KavaError(f"override={overrides[0]!r} is of calibration rows; give --data PATH")
    found: dict[str, Any] = {}
    if data is not None:
        run, batches, found = _calibration(teacher, data, rows, overrides)
        chosen, measured = _measured(run.blueprint, batches, chosen, measured_rule)
        found |= measured | {"loss_after": _loss_after(run, batches, directory, spec, chosen)}
    name = stored_dtype(directory, spec) if dtype == "auto" else dtype
    merged = ours.num_kv_heads < spec.num_kv_heads
    found = {
        "layers": list(chosen.layers),
        "teacher_layers": spec.num_layers,
        "kv_heads": ours.num_kv_heads,
        "teacher_kv_heads": spec.num_kv_heads,
        "keys": "mean only: a norm follows" if merged and spec.qk_norm else _MERGED[merged],
        "values": _MERGED[merged],
        "intermediate_size": ours.intermediate_size,
        "teacher_intermediate_size": spec.intermediate_size,
        "parameters": _size(ours),
        "teacher_parameters": _size(spec),
        "dtype": name,
    } | found
    card = cut_card(name=out.name, teacher=teacher, left=found, command=shlex.join(command))
    write_cut(out, directory, spec, chosen, teacher=teacher, dtype=name, card=card)
    return found


_MERGED = {True: "turned towards one another, then their mean", False: "as they were"}


def _listed(layers: str | None) -> tuple[int, ...] | None:
    """``0,1,2`` as numbers; None for all."""
    if layers is None:
        raise KavaError("layers and keep: neither given; give one, --layers 0,1,2 or --keep N")
    try:
        return None if layers == "all" else tuple(map(int, layers.split(",")))
    except ValueError:
        raise KavaError(f"layers={layers!r} is no list such as 0,1,2; or write all") from None


def _rule(rule: str | None, keep: int | None) -> Rule:
    if rule is not None and keep is None:
        raise KavaError(f"rule={rule} with layers: a rule goes with --keep N")
    for known in RULES:
        if known == (rule or RULES[0]):
            return known
    raise KavaError(f"rule={rule!r} is unknown; use one of {', '.join(RULES)}")


def _measured_rule(
    rule: Rule, layers: tuple[int, ...] | int | None, spec: DecoderSpec
) -> Rule | None:
    """The rule where it has something to measure."""
    measures = isinstance(layers, int) and rule in MEASURED and layers < spec.num_layers
    return rule if measures else None


def settled(config: Config, rows: Sequence[Encoded], fingerprint: str) -> CutRecord:
    """What ``student.cut`` keeps, measured on the first training rows where it has to be.

    Args:
        config: of a run whose student is a cut one.
        rows: its training rows.
        fingerprint: of the model that is cut.

    Raises KavaError for too few rows.
    """
    cut, source = config.student.cut, cut_source(config)
    assert cut is not None
    spec = with_weights(source).spec
    chosen = plan_cut(spec, cut.layers, cut.rule, cut.kv_heads, cut.intermediate_size)
    rule = _measured_rule(cut.rule, cut.layers, spec)
    if rule or chosen.units:
        run = prepare(_of_source(config, source))
        held = HeldOut(list(rows[:TRAINING_ROWS]), ())
        _check_tokens(held, config.data.path)
        batches = held_out_batches(run, held, lambda: None)
        chosen, _ = _measured(run.blueprint, batches, chosen, rule)
    return cut_record(spec, chosen, source, fingerprint)


def _of_source(config: Config, source: str) -> Config:
    """The run of the uncut model alone, as a student without teachers."""
    raw = dump_config(config)
    tokenizer = find_tokenizer(config)[1]
    raw["student"] |= {"path": source, "cut": None, "tokenizer": tokenizer}
    raw["loss"] |= {"ce_weight": 1.0, "kv_weight": 1.0, "kl_weight": 0.0}
    return parse_config(raw | {"teachers": []})


def _calibration(
    teacher: str, data: str, rows: int, overrides: Sequence[str]
) -> tuple[Run, Batches, dict[str, Any]]:
    """The teacher as the student of a run without teachers, and the rows it is measured on."""
    for override in overrides:
        if not override.startswith(("data.", "mesh.")):
            raise KavaError(f"override={override!r}: kava cut takes data.* and mesh.* fields only")
    fields = {
        # Otherwise it would be runs/run, and a run there would give its date to chat templates.
        "run": {"dir": teacher},
        "student": {"path": teacher},
        "data": {"path": data, "batch_size": 32},
    }
    run = prepare(parse_config(fields, overrides))
    settings = run.config.data
    split = settings.eval_split or ("dev" if data.startswith("builtin:") else settings.split)
    held = HeldOut.of(data_loader(run)(data, split=split, rows=rows), run.encoder)
    if len(held.measured) < rows:
        raise KavaError(
            f"rows={rows}: {data} has {held.sentence}; give more, raise data.max_length or lower "
            f"--rows"
        )
    tokens = _check_tokens(held, data)
    return run, held_out_batches(run, held, lambda: None), {"rows": rows, "tokens": tokens}


def _check_tokens(held: HeldOut, data: str) -> int:
    """The tokens to predict. Raises KavaError for too few."""
    tokens = sum(int(row.targets.sum()) for row in held.measured)
    if tokens < LEAST_TOKENS:
        raise KavaError(
            f"data={data}: {len(held.measured)} rows have {tokens} tokens to predict, too few to "
            f"measure by; give at least {LEAST_TOKENS}"
        )
    return tokens


def _measured(
    blueprint: Blueprint, batches: Batches, chosen: Cut, rule: Rule | None
) -> tuple[Cut, dict[str, Any]]:
    """What is kept once the rule and the units are measured, and the figures that decided it."""
    params, depth = blueprint.load_student(), blueprint.student_spec.num_layers
    keep, layers, units = len(chosen.layers), chosen.layers, chosen.units
    figures: dict[str, Any] = {}
    figures["loss_before"] = float(losses(blueprint, params, batches, np.ones((1, depth)))[0])
    if rule is not None:
        width = 1 if rule == "best_layers" else depth - keep
        skipped = [range(first, first + width) for first in range(depth - width + 1)]
        kept_ML = np.array([[float(n not in block) for n in range(depth)] for block in skipped])
        without = losses(blueprint, params, batches, kept_ML)
        for block, loss in zip(skipped, without.tolist(), strict=True):
            name = f"{block[0]}-{block[-1]}" if width > 1 else f"{block[0]}"
            figures[f"loss_without/{name}"] = loss
        # A loss that is no number costs more than any that is one.
        order = np.argsort(np.nan_to_num(without, nan=np.inf), kind="stable").tolist()
        gone = skipped[order[0]] if rule == "best_block" else order[: depth - keep]
        layers = tuple(layer for layer in range(depth) if layer not in gone)
    if units is not None:
        means_LF = unit_means(blueprint, params, batches)[list(layers)]
        largest = np.argsort(-means_LF, axis=1, kind="stable")[:, : len(units[0])]
        units = tuple(tuple(sorted(row)) for row in largest.tolist())
    return Cut(layers, chosen.kv_heads, units), figures


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
    graph = blueprint.student.graph
    sums = jax.jit(partial(_unit_sums, graph), out_shardings=replicated(blueprint.mesh))
    total, tokens = 0.0, 0
    for make in batches:
        batch = make()
        total = total + np.asarray(jax.device_get(sums(params, batch)), np.float64)
        tokens += int(batch.valid.sum())
    return np.asarray(total / tokens)


def _unit_sums(graph: nnx.GraphDef[Decoder], params: Params, batch: Batch) -> Float[Array, "L F"]:
    model = nnx.merge(graph, params)
    positions_BT = token_positions(batch.valid)
    mask = attention_mask(positions_BT, positions_BT, batch.valid, model.spec.sliding_window)
    rotation = model.rotation(positions_BT)
    assert model.blocks is not None  # a whole model
    blocks, layers = nnx.split(model.blocks)

    def layer(x_BTD: Array, own: Any) -> tuple[Array, Array]:
        block = nnx.merge(blocks, own)
        y_BTD, _ = block.attention(block.attention_norm(x_BTD), rotation, mask, None)
        units_BTF = jnp.abs(block.mlp.units(block.mlp_norm(x_BTD + y_BTD)))
        counted = jnp.where(batch.valid[..., None], units_BTF.astype(jnp.float32), 0)
        # The compiler computes the attention once, here and in the block.
        return block(x_BTD, rotation, mask, None)[0], counted.sum(axis=(0, 1))

    embedded = model.embed.embedding[...][batch.tokens].astype(model.dtype)
    return jax.lax.scan(layer, embedded, layers)[1]


def _skipping(params: Params, kept_L: Float[Array, "L"]) -> Params:
    """The parameters with the output projections of skipped layers times 0: they add nothing."""
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    for path, leaf in flat.items():
        if path.startswith(("blocks/attention/o/", "blocks/mlp/down/")):
            flat[path] = leaf * kept_L.reshape(-1, *(1,) * (leaf.ndim - 1))
    return unflatten_dict(flat, sep="/")


def _loss_after(
    run: Run, batches: Batches, directory: Path, spec: DecoderSpec, chosen: Cut
) -> float:
    """The cut model's loss on the same rows, its weights read straight to the devices."""
    models = Models(Found(directory, cut_spec(spec, chosen)), {})
    blueprint = make_blueprint(run.config, run.mesh, models, {})
    put = partial(place_slices, blueprint.student.shardings)
    params = load_cut_params(directory, spec, chosen, put=put)
    return float(losses(blueprint, params, batches, np.ones((1, len(chosen.layers))))[0])


def _size(spec: DecoderSpec) -> int:
    return sum(map(prod, parameter_shapes(spec).values()))
