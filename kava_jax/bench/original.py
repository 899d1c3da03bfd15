"""The original method in PyTorch, as its users write it: a peer of the step and of the KV loss.

Transformers' models run whole; keys and values are stacked from their caches; an MLP for each maps
the teacher's to the student's width. Torch is no dependency, so it is imported inside.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kava_jax.bench.harness import peer_version
from kava_jax.bench.pairs import Geometry
from kava_jax.data.batches import Batch
from kava_jax.errors import KavaError
from kava_jax.hf.config_json import spec_from_config
from kava_jax.models.decoder import Params

# The original's own eps, and the beta that it found best.
BETA, EPS = 0.01, 1e-8
PEERS = {None: (), "torch": ("torch_eager", "torch_compiled"), "torch-eager": ("torch_eager",)}


def peer_sides(peer: str | None) -> tuple[str, ...]:
    """Names of PyTorch's sides; KavaError for an unknown peer, and without PyTorch."""
    if peer not in PEERS:
        raise KavaError(f"--peer={peer!r} is unknown; use torch or torch-eager, or leave it out")
    if peer:
        peer_version("torch")
    return PEERS[peer]


def mercator(student: Any, target: Any, mask: Any) -> tuple[Any, dict[str, Any]]:
    """KV loss and all its metrics, op by op, of vectors [..., H]; the mask broadcasts to [...].

    Masked, which the original's is not: it counts padding. As there, directions are taken first,
    lengths for the magnitude term next, and lengths for the metrics once more.
    """
    torch: Any = importlib.import_module("torch")
    normalize = torch.nn.functional.normalize
    keep = mask.expand(student.shape[:-1])

    count = keep.sum()

    def mean(values: Any) -> Any:
        return (values * keep).sum() / count

    cos = mean((normalize(student, dim=-1) * normalize(target, dim=-1)).sum(-1))
    lengths = [torch.log(torch.norm(x, dim=-1) + EPS) for x in (student, target)]
    direction, magnitude = 1 - cos, mean((lengths[0] - lengths[1]) ** 2)
    loss = direction + BETA * magnitude
    with torch.no_grad():
        of_student, of_target = (mean(torch.norm(x, dim=-1)) for x in (student, target))
        metrics = {
            "loss": loss,
            "cos_sim": cos,
            "dir_loss": direction,
            "mag_loss": magnitude,
            "s_magnitude": of_student,
            "t_magnitude": of_target,
            "mag_ratio": of_student / of_target,
        }
    return loss, metrics


# Student, teacher and projector: an MLP for keys and one for values.
Modules = tuple[Any, Any, dict[str, Any]]


def loaded(folder: Path, projector: Params) -> Modules:
    """The Hugging Face directories ``student`` and ``teacher`` in float32, and our projector.

    ``projector`` holds the weights for one teacher; it is elastic and maps the teacher.
    """
    torch: Any = importlib.import_module("torch")
    load = importlib.import_module("transformers").AutoModelForCausalLM.from_pretrained
    student, teacher = (load(folder / n, dtype=torch.float32) for n in ("student", "teacher"))
    mlps = {}
    for part, own in projector.items():
        layers = own["inner"], own["out"]
        (width, inner), (_, out) = (layer["kernel"].shape for layer in layers)
        mlps[part] = _mlp(torch, width, inner, out)
        # In the order of ``parameters()``: the norm's, then each Linear's weight and bias.
        values = [own["scale"], own["shift"]]
        # Our kernels are [in, out], PyTorch's [out, in].
        values += [array for layer in layers for array in (layer["kernel"].T, layer["bias"])]
        for parameter, value in zip(mlps[part].parameters(), values, strict=True):
            parameter.data = torch.from_numpy(value.copy())
    return student, teacher, mlps


def random(student: Geometry, teacher: Geometry, dtype: str, device: str) -> Modules:
    """Random weights of these ``config.json`` geometries, the teacher in ``dtype``."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")

    def model(geometry: Geometry, kind: Any) -> Any:
        config = transformers.AutoConfig.for_model(**geometry)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=kind)

    inner, out = (spec_from_config(g, where="bench").kv_width for g in (teacher, student))
    with torch.device(device):
        models = model(student, torch.float32), model(teacher, getattr(torch, dtype))
        return *models, {part: _mlp(torch, inner, inner, out) for part in ("k", "v")}


def train_step(
    modules: Modules, layers: list[int], compiled: bool = False, dtype: str = "float32"
) -> Callable[[Batch], float]:
    """One step on a batch, which returns the loss before it.

    ``layers`` are the teacher's of each student layer; the student computes in ``dtype``.
    """
    torch: Any = importlib.import_module("torch")
    student, teacher, projector = modules
    student.train()
    teacher.eval().requires_grad_(False)
    # Learning rates, weight decay and the clip of each group are the original's.
    trained = {5e-5: student, 1e-3: torch.nn.ModuleDict(projector)}
    groups = [{"params": list(module.parameters()), "lr": lr} for lr, module in trained.items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.01)
    device, heads = student.device, student.config.num_key_value_heads
    cast = torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")
    if compiled:
        student, teacher = torch.compile(student), torch.compile(teacher)

    def cache(output: Any) -> dict[str, Any]:
        """Keys and values [L, B, T, K * H], stacked from the model's cache."""
        pairs = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
        stacked = map(torch.stack, zip(*pairs, strict=True))
        return dict(zip("kv", (x.transpose(2, 3).flatten(3) for x in stacked), strict=True))

    def step(batch: Batch) -> float:
        arrays = (batch.tokens, batch.loss_mask, batch.kv_mask)
        tokens, loss_mask, kv_mask = (torch.from_numpy(np.array(x)).to(device) for x in arrays)
        tokens = tokens.long()
        with torch.no_grad():
            target = cache(teacher(input_ids=tokens, use_cache=True))
        # Transformers leaves labels of -100 out of the loss, and shifts all of them itself.
        labels = tokens.masked_fill(~loss_mask, -100)
        # The teacher's weights are in ``dtype`` already; the student's are float32.
        with cast:
            output = student(input_ids=tokens, labels=labels, use_cache=True)
        own, loss = cache(output), output.loss
        for part, mlp in projector.items():
            projected = mlp(target[part][layers].float())
            # Metrics too, because the original and our step compute them; here they are not read.
            ours, theirs = (x.float().unflatten(-1, (heads, -1)) for x in (own[part], projected))
            of_part, _ = mercator(ours, theirs, kv_mask[..., None])
            loss = loss + 0.5 * of_part
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        # Reading the number waits for all that was queued on a GPU, the optimizer included.
        return float(loss.detach())

    return step


def _mlp(torch: Any, width: int, inner: int, out: int) -> Any:
    """LayerNorm, Linear, SiLU, Linear."""
    return torch.nn.Sequential(
        torch.nn.LayerNorm(width),
        torch.nn.Linear(width, inner),
        torch.nn.SiLU(),
        torch.nn.Linear(inner, out),
    )
