"""kava_jax: KV-cache distillation in JAX."""
