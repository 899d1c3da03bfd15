"""Maps from one model's flattened keys (or values) of a token to another model's.

All take and give vectors of KV width (heads times head dim) on the last axis. Parameters are
float32. Factors of products are in the dtype of what is passed in; sums, biases, the layer norm and
the result are float32: what is compared may be a small rest of a large sum.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

InitMethod = Literal["xavier", "kaiming", "normal"]
AdapterKind = Literal["elastic", "linear", "identity"]


def initial_kernel(method: InitMethod, key: Key[Array, ""], shape: tuple[int, ...]) -> Array:
    """Fresh [..., in, out] kernel: Xavier uniform, Kaiming normal, or normal with std 0.02."""
    init = {
        "xavier": jax.nn.initializers.xavier_uniform,
        "kaiming": jax.nn.initializers.he_normal,
        "normal": lambda: jax.nn.initializers.normal(0.02),
    }[method]()
    return init(key, shape, jnp.float32)


_MATMUL = "...i,io->...o"


@jax.custom_vjp
def _product(x: Float[Array, "*B I"], kernel: Float[Array, "I O"]) -> Float[Array, "*B O"]:
    """``x @ kernel`` of factors in x's dtype, summed and given in float32.

    Its gradient is written out because JAX would widen the factors of those two products.
    """
    return jnp.einsum(_MATMUL, x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)


def _product_backward(saved: tuple[Array, Array], slope: Array) -> tuple[Array, ...]:
    x, kernel = saved
    # The cast is part of what is differentiated: the kernel's gradient gets the kernel's dtype.
    _, pull = jax.vjp(lambda x, kernel: jnp.einsum(_MATMUL, x, kernel.astype(x.dtype)), x, kernel)
    # Both or neither. Nothing waits for the kernel's gradient, so XLA would put it off to the end
    # of the step and keep a slope of the whole cache's size until then.
    return jax.lax.optimization_barrier(pull(slope.astype(x.dtype)))


_product.defvjp(lambda x, kernel: (_product(x, kernel), (x, kernel)), _product_backward)


class Affine(nnx.Module):
    """``x @ kernel + bias``."""

    def __init__(
        self, sizes: tuple[int, int], axes: tuple[str, str], init: InitMethod, rngs: nnx.Rngs
    ):
        """Kernel [in, out] with logical axis names, and a bias of zeros."""
        self.kernel = nnx.Param(initial_kernel(init, rngs.params(), sizes), axes=axes)
        self.bias = nnx.Param(jnp.zeros((sizes[1],)), axes=(axes[1],))

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """Apply; float32."""
        # The bias gets its axes by hand, because the tests forbid implicit rank promotion.
        y: Array = _product(x, self.kernel[...])
        return y + self.bias[...].reshape((1,) * (y.ndim - 1) + (-1,))


class Adapter(nnx.Module):
    """One linear layer, the original's bottleneck in front of it, or nothing.

    identity  no parameters: the vectors as they are
    linear    the baseline: Linear alone
    elastic   LayerNorm, Linear, SiLU, Dropout, Linear; the hidden width is
              ``int(source width * mlp_ratio)``
    """

    def __init__(
        self,
        kind: AdapterKind,
        widths: tuple[int, int],
        init: InitMethod,
        rngs: nnx.Rngs,
        *,
        mlp_ratio: float,
        dropout: float,
    ):
        """Build for vectors of the first width, to give vectors of the second."""
        (source, target), self.kind, self.dropout = widths, kind, dropout
        if kind == "identity":
            return
        if kind == "linear":
            self.out = Affine((source, target), ("kv_in", "kv_out"), init, rngs)
            return
        # Rounded down as in the original; the 1 keeps a small ratio of a small width from giving 0.
        hidden = max(1, int(source * mlp_ratio))
        self.scale = nnx.Param(jnp.ones((source,)), axes=("kv_in",))
        self.shift = nnx.Param(jnp.zeros((source,)), axes=("kv_in",))
        self.inner = Affine((source, hidden), ("kv_in", "kv_hidden"), init, rngs)
        self.out = Affine((hidden, target), ("kv_hidden", "kv_out"), init, rngs)

    def __call__(self, x: Float[Array, "*B I"], key: Key[Array, ""] | None) -> Float[Array, "*B O"]:
        """Map; dropout only when a ``key`` is given."""
        if self.kind == "identity":
            return x.astype(jnp.float32)
        return self.out(self._hidden(x, key) if self.kind == "elastic" else x)

    def _hidden(self, x: Float[Array, "*B I"], key: Key[Array, ""] | None) -> Array:
        wide = x.astype(jnp.float32)
        # standardize's own variance is mean(x^2) - mean(x)^2, which cancels under a shared offset.
        variance = jnp.var(wide, axis=-1, keepdims=True)
        # 1e-5 is the epsilon of PyTorch's LayerNorm, which the original uses.
        normed = jax.nn.standardize(wide, axis=-1, variance=variance, epsilon=1e-5)
        lead = (1,) * (x.ndim - 1) + (-1,)
        normed = normed * self.scale[...].reshape(lead) + self.shift[...].reshape(lead)
        hidden = jax.nn.silu(self.inner(normed.astype(x.dtype)).astype(x.dtype))
        if key is not None and self.dropout > 0:
            # Scaled here, so that a call without a key needs no factor.
            kept = jax.random.bernoulli(key, 1.0 - self.dropout, hidden.shape)
            hidden = jnp.where(kept, hidden / (1.0 - self.dropout), 0)
        return hidden
