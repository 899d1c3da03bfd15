"""``kava cut``: which layers and units of a teacher are kept, and what that costs.

Layers are named, follow from a rule, or are measured: on calibration rows, by the loss without
them. A skipped layer is one whose output projections are zero, so one compiled loss serves all.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from kava_jax.alignment.layer_map import make_layer_map
from kava_jax.config.file import parse_config
from kava_jax.data.batches import Batch
from kava_jax.data.dataset import HeldOut
from kava_jax.errors import KavaError, StoppedError
from kava_jax.evaluation.heldout import make_measure
from kava_jax.geometry import Mean
from kava_jax.hf.card import cut_card
from kava_jax.hf.config_json import FloatName
from kava_jax.hf.cut import Cut, check_uncut, cut_spec, load_cut_params, stored_dtype, write_cut
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
from kava_jax.runs.find_models import Found, Models
from kava_jax.runs.parts import place_slices
from kava_jax.runs.prepare import Run, data_loader, prepare
from kava_jax.storage import Place

Rule = Literal["evenly", "middle", "best_layers", "best_block"]
RULES: tuple[Rule, ...] = get_args(Rule)
_MEASURED = ("best_layers", "best_block")
# A mean over fewer says more of these tokens than of the model.
LEAST_TOKENS = 256


class Calibration(NamedTuple):
    """The rows that a teacher is measured on, ready to be put on the devices."""

    run: Run
    batches: list[Callable[[], Batch]]
    rows: int
    tokens: int
    """Of the rows' answers: those that the loss is a mean over."""


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
        rule: one of ``RULES``; middle by default.
        kv_heads: how many are left; all by default.
        intermediate_size: feed-forward units left in each layer; all by default.
        data: calibration rows, as ``kava eval`` reads them.
        rows: how many of them.
        overrides: of fields of ``data`` and ``mesh``.
        dtype: of the weights on disk; ``auto`` is the teacher's.
        command: the command line, for the model card.

    Raises KavaError before anything is measured or written for whatever does not fit.
    """
    check_destination(out)
    directory = resolve_model(teacher)
    check_uncut(directory, teacher)
    spec = read_spec(directory)
    named = _named_layers(layers, keep, rule, spec.num_layers)
    # An early refusal: measuring takes long.
    cut_spec(spec, Cut(named or tuple(range(spec.num_layers)), kv_heads))
    fewer = _fewer_units(intermediate_size, spec)
    if data is None and (named is None or fewer):
        needs = f"rule={rule}" if named is None else f"intermediate_size={fewer}"
        raise KavaError(f"{needs} is measured on rows of text; give --data PATH")
    if data is None and overrides:
        raise KavaError(f"override={overrides[0]!r} is of the calibration rows; give --data PATH")
    calibration = _open(teacher, data, rows, overrides) if data else None
    chosen, measured = _choose(spec, named, keep, rule, kv_heads, fewer, calibration)
    if calibration:
        measured["loss_after"] = _loss_after(calibration, directory, spec, chosen)
    name = stored_dtype(directory, spec) if dtype == "auto" else dtype
    ours = cut_spec(spec, chosen)
    found = {
        "teacher": teacher,
        "teacher_layers": spec.num_layers,
        "layers": list(chosen.layers),
        "rule": None if layers else rule or "middle",
        "teacher_kv_heads": spec.num_kv_heads,
        "kv_heads": ours.num_kv_heads,
        "keys_turned": not spec.qk_norm and ours.num_kv_heads < spec.num_kv_heads,
        "teacher_intermediate_size": spec.intermediate_size,
        "intermediate_size": ours.intermediate_size,
        "teacher_parameters": _size(spec),
        "parameters": _size(ours),
        "dtype": name,
        **measured,
    }
    card = cut_card(
        name=out.name,
        teacher=teacher,
        left=describe(found),
        command=shlex.join(command),
    )
    write_cut(out, directory, spec, chosen, teacher=teacher, dtype=name, card=card)
    return found


def describe(found: Mapping[str, Any]) -> dict[str, str]:
    """What was kept and measured, in words."""
    heads, before = found["kv_heads"], found["teacher_kv_heads"]
    told = {
        "layers": f"{_ranges(found['layers'])} of {found['teacher_layers']}"
        + (f" (rule {found['rule']})" if found["rule"] else ""),
        "KV heads": f"{before}",
        "feed-forward units": f"{found['teacher_intermediate_size']}",
        "parameters": f"{found['teacher_parameters']:,} -> {found['parameters']:,}",
        "dtype": found["dtype"],
    }
    if heads < before:
        how = "keys and values turned towards one another, then their mean"
        if not found["keys_turned"]:
            how = "values turned towards one another; keys by mean only, as a norm follows them"
        told["KV heads"] = f"{before} -> {heads} ({how})"
    if found["intermediate_size"] < found["teacher_intermediate_size"]:
        told["feed-forward units"] += f" -> {found['intermediate_size']} (by mean activation)"
    if "loss_before" in found:
        told["held-out loss"] = (
            f"{found['loss_before']:.4f} -> {found['loss_after']:.4f} "
            f"({found['rows']} rows, {found['tokens']} tokens)"
        )
    for skipped, loss in found.get("loss_without", {}).items():
        told[f"loss without {skipped}"] = f"{loss:.4f}"
    return told


def _named_layers(
    layers: str | None, keep: int | None, rule: str | None, depth: int
) -> tuple[int, ...] | None:
    """The layers that need no measuring; None where they are measured."""
    if (layers is None) == (keep is None):
        given = "neither" if layers is None else "both"
        raise KavaError(f"layers and keep: {given} given; give one, --layers 0,1,2 or --keep N")
    if keep is None:
        if rule is not None:
            raise KavaError(f"rule={rule} with layers={layers}: a rule goes with --keep N")
        if layers == "all":
            return tuple(range(depth))
        try:
            return tuple(map(int, str(layers).split(",")))
        except ValueError:
            raise KavaError(f"layers={layers!r} is no list such as 0,1,2; or write all") from None
    if rule not in (None, *RULES):
        raise KavaError(f"rule={rule!r} is unknown; use one of {', '.join(RULES)}")
    if not 1 <= keep <= depth:
        raise KavaError(f"keep={keep}: the teacher has {depth} layers; keep 1 to {depth} of them")
    if keep == depth:
        return tuple(range(depth))
    if rule == "evenly":
        return make_layer_map("ratio", depth, keep).read_layers
    if rule in _MEASURED:
        return None
    first = -(-keep // 2)
    return (*range(first), *range(depth - keep + first, depth))


def _fewer_units(wanted: int | None, spec: DecoderSpec) -> int | None:
    """How many units are chosen; None for all."""
    if wanted is None or wanted == spec.intermediate_size:
        return None
    if not 1 <= wanted < spec.intermediate_size:
        raise KavaError(
            f"intermediate_size={wanted}: the teacher has {spec.intermediate_size} units in a "
            f"layer; keep 1 to {spec.intermediate_size} of them"
        )
    return wanted


def _open(teacher: str, data: str, rows: int, overrides: Sequence[str]) -> Calibration:
    """The teacher as the student of a run without teachers, and its rows."""
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
    tokens = sum(int(row.targets.sum()) for row in held.measured)
    if len(held.measured) < rows:
        raise KavaError(
            f"rows={rows}: {data} has {held.sentence}; give more, raise data.max_length or lower "
            f"--rows"
        )
    if tokens < LEAST_TOKENS:
        raise KavaError(
            f"data={data}: {rows} rows have {tokens} tokens to predict, too few to measure by; "
            f"give at least {LEAST_TOKENS}"
        )
    return Calibration(run, held_out_batches(run, held, lambda: None), len(held.measured), tokens)


def _choose(
    spec: DecoderSpec,
    named: tuple[int, ...] | None,
    keep: int | None,
    rule: str | None,
    kv_heads: int | None,
    units: int | None,
    calibration: Calibration | None,
) -> tuple[Cut, dict[str, Any]]:
    """What is kept, and the figures of the whole teacher that decided it."""
    if calibration is None:
        assert named is not None
        return Cut(named, kv_heads), {}
    blueprint = calibration.run.blueprint
    params, every = blueprint.load_student(), np.ones((1, spec.num_layers))
    measured: dict[str, Any] = {"rows": calibration.rows, "tokens": calibration.tokens}
    measured["loss_before"] = float(losses(blueprint, params, calibration.batches, every)[0])
    if named is None:
        assert keep is not None
        width = 1 if rule == "best_layers" else spec.num_layers - keep
        firsts = range(spec.num_layers - width + 1)
        kept_ML = np.stack([_all_but(range(f, f + width), spec.num_layers) for f in firsts])
        without = losses(blueprint, params, calibration.batches, kept_ML)
        # A loss that is no number costs more than any that is one.
        order = np.argsort(np.nan_to_num(without, nan=np.inf), kind="stable")
        if rule == "best_layers":
            named = tuple(sorted(int(layer) for layer in order[spec.num_layers - keep :]))
        else:
            named = tuple(int(layer) for layer in np.flatnonzero(kept_ML[order[0]]))
        measured["loss_without"] = {
            _ranges(range(f, f + width)): float(loss)
            for f, loss in zip(firsts, without, strict=True)
        }
    rows = None
    if units is not None:
        means_LF = unit_means(blueprint, params, calibration.batches)
        largest = np.argsort(-means_LF[list(named)], axis=1, kind="stable")[:, :units]
        rows = tuple(tuple(sorted(row)) for row in largest.tolist())
    return Cut(named, kv_heads, rows), measured


def losses(
    blueprint: Blueprint,
    params: Params,
    batches: Sequence[Callable[[], Batch]],
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


def unit_means(
    blueprint: Blueprint, params: Params, batches: Sequence[Callable[[], Batch]]
) -> Float[np.ndarray, "L F"]:
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


def _loss_after(calibration: Calibration, directory: Path, spec: DecoderSpec, chosen: Cut) -> float:
    """The cut model's loss on the same rows, its weights read straight to the devices."""
    run, ours = calibration.run, cut_spec(spec, chosen)
    blueprint = make_blueprint(run.config, run.mesh, Models(Found(directory, ours), {}), {})
    put = partial(place_slices, blueprint.student.shardings)
    params = load_cut_params(directory, spec, chosen, put=put)
    every = np.ones((1, ours.num_layers))
    return float(losses(blueprint, params, calibration.batches, every)[0])


def _all_but(skipped: range, depth: int) -> np.ndarray:
    return np.where(np.isin(np.arange(depth), skipped), 0.0, 1.0)


def _ranges(layers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    starts = [n for n in layers if n - 1 not in layers]
    ends = [n for n in layers if n + 1 not in layers]
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in pairs)


def _size(spec: DecoderSpec) -> int:
    return sum(map(prod, parameter_shapes(spec).values()))
