"""The original method's training loop, in PyTorch, as its users write it: the peer of the step.

Transformers' models run whole, teacher included; keys and values are stacked from their caches; an
MLP per part projects the teacher's onto the student's width; Mercator pulls; AdamW has two groups.
Needs torch, which is no dependency of this package, so it is imported inside.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kava_jax.bench.peers import peer
from kava_jax.bench.torch_loss import mercator


class TorchLoop:
    """One student, teacher and projector in PyTorch, made by ``loaded`` or ``random``.

    Args:
        student, teacher: causal language models of transformers, the student in float32.
        projector: an MLP for keys and one for values.
        layers: the teacher's layer of each student layer.
        rates: learning rates of student and projector.
        kv_weight: times the KV loss.
        compiled: whether the models go through ``torch.compile``.
        dtype: of the student's computation, as torch names it (autocast when not float32).
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        projector: dict[str, Any],
        *,
        layers: Sequence[int],
        rates: tuple[float, float] = (5e-5, 1e-3),
        kv_weight: float = 1.0,
        compiled: bool = False,
        dtype: str = "float32",
    ):
        self._torch = torch = peer("torch")
        self.student, self.teacher = student.train(), teacher.eval().requires_grad_(False)
        self.projector = projector
        ours = [p for mlp in projector.values() for p in mlp.parameters()]
        groups = [
            {"params": list(student.parameters()), "lr": rates[0]},
            {"params": ours, "lr": rates[1]},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.01)
        self._layers, self._kv_weight = list(layers), kv_weight
        self._device = next(student.parameters()).device
        self._autocast = torch.autocast(
            self._device.type, getattr(torch, dtype), enabled=dtype != "float32"
        )
        if compiled:
            self.student, self.teacher = torch.compile(self.student), torch.compile(self.teacher)

    @classmethod
    def loaded(cls, student: Path, teacher: Path, projector: Path, **settings: Any) -> "TorchLoop":
        """From Hugging Face directories and what ``KVDimensionProjector.save`` wrote, in float32.

        The projector is elastic and maps the teacher to the student.
        """
        torch = peer("torch")
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM

        load: Any = AutoModelForCausalLM.from_pretrained
        models = [load(directory, dtype=torch.float32) for directory in (student, teacher)]
        weights = load_file(projector)
        (name,) = {path.split("/")[1] for path in weights}
        mlps = {part: _mlp_of(torch, weights, f"pairs/{name}/{part}") for part in ("k", "v")}
        return cls(models[0], models[1], mlps, **settings)

    @classmethod
    def random(
        cls,
        student: dict[str, Any],
        teacher: dict[str, Any],
        *,
        device: str,
        dtype: str,
        **settings: Any,
    ) -> "TorchLoop":
        """Random weights of these ``config.json`` geometries, the teacher in ``dtype``."""
        torch = peer("torch")
        from transformers import AutoConfig, AutoModelForCausalLM

        def model(geometry: dict[str, Any], kind: Any) -> Any:
            config = AutoConfig.for_model(**geometry)
            with torch.device(device):
                return AutoModelForCausalLM.from_config(config, dtype=kind)

        models = model(student, torch.float32), model(teacher, getattr(torch, dtype))
        widths = [_kv_width(geometry) for geometry in (teacher, student)]
        mlps = {part: _mlp(torch, widths[0], widths[0], widths[1]).to(device) for part in "kv"}
        return cls(*models, mlps, dtype=dtype, **settings)

    def step(self, batch: dict[str, np.ndarray]) -> float:
        """One step on ``tokens``, ``loss_mask`` and ``kv_mask`` [B, T]; the loss before it."""
        torch = self._torch
        tokens, loss_mask, kv_mask = (
            torch.from_numpy(np.array(batch[name])).to(self._device)
            for name in ("tokens", "loss_mask", "kv_mask")
        )
        tokens = tokens.long()
        with torch.no_grad():
            target = self._cache(self.teacher(input_ids=tokens, use_cache=True))
        labels = tokens.masked_fill(~loss_mask, -100)
        with self._autocast:
            output = self.student(input_ids=tokens, labels=labels, use_cache=True)
        own = self._cache(output)
        kv = 0.0
        for part, mlp in self.projector.items():
            projected = mlp(target[part][self._layers].float())
            # Its metrics too, as the original has them and our step does; nobody reads them here.
            of_part, _ = mercator(own[part].float(), projected.float(), kv_mask)
            kv = kv + 0.5 * of_part
        loss = output.loss + self._kv_weight * kv
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in self.optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        self.optimizer.step()
        return float(loss.detach())

    def _cache(self, output: Any) -> dict[str, Any]:
        """Keys and values [L, B, T, K * H], stacked from the model's cache."""
        layers = output.past_key_values.layers
        stacked = {
            "k": self._torch.stack([layer.keys for layer in layers]),
            "v": self._torch.stack([layer.values for layer in layers]),
        }
        return {part: x.transpose(2, 3).flatten(3) for part, x in stacked.items()}


def _kv_width(geometry: dict[str, Any]) -> int:
    heads = geometry["num_attention_heads"]
    head_dim = geometry.get("head_dim") or geometry["hidden_size"] // heads
    return geometry["num_key_value_heads"] * head_dim


def _mlp(torch: Any, width: int, inner: int, out: int) -> Any:
    """LayerNorm, Linear, SiLU, Linear."""
    return torch.nn.Sequential(
        torch.nn.LayerNorm(width),
        torch.nn.Linear(width, inner),
        torch.nn.SiLU(),
        torch.nn.Linear(inner, out),
    )


def _mlp_of(torch: Any, weights: dict[str, Any], where: str) -> Any:
    """The same with the weights of one part of our projector, whose kernels are [in, out]."""
    names = ("scale", "shift", "inner/kernel", "inner/bias", "out/kernel", "out/bias")
    values = [weights[f"{where}/{name}"] for name in names]
    width, inner = values[2].shape
    mlp = _mlp(torch, width, inner, values[4].shape[1])
    with torch.no_grad():
        for parameter, value in zip(mlp.parameters(), values, strict=True):
            parameter.copy_(value.T if value.ndim == 2 else value)
    return mlp
