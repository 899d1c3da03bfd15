"""The original method's KV loss in PyTorch, op by op with all its metrics: a peer.

Masked, which the original's is not: it counts padding. Needs torch, which is no dependency.
"""

from typing import Any

from kava_jax.bench.peers import peer

EPS = 1e-8


def mercator(
    student: Any, target: Any, mask: Any, *, alpha: float = 1.0, beta: float = 0.01
) -> tuple[Any, dict[str, Any]]:
    """Loss and metrics of vectors [..., H]; the mask broadcasts to the leading axes.

    As there, directions are taken first, lengths for the magnitude term next, and lengths for the
    metrics once more.
    """
    torch, normalize = peer("torch"), peer("torch.nn.functional").normalize
    keep = mask.expand(student.shape[:-1])
    count = keep.sum()

    def mean(values: Any) -> Any:
        return (values * keep).sum() / count

    cos = mean((normalize(student, dim=-1) * normalize(target, dim=-1)).sum(-1))
    lengths = [torch.log(torch.norm(x, dim=-1) + EPS) for x in (student, target)]
    direction, magnitude = 1 - cos, mean((lengths[0] - lengths[1]) ** 2)
    loss = alpha * direction + beta * magnitude
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
