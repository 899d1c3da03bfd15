"""Every tolerance of the test-suite, by what is compared. Rows are added, never loosened."""

TOL = {
    # float32 against numpy float64, elementwise formulas
    "float32": 1e-5,
    # bf16 inputs against float64 on the same rounded inputs (the maths is float32 inside)
    "bf16_inputs": 1e-5,
    # logits, keys and values against transformers in float32
    "parity": 1e-4,
    # layer norm of vectors whose mean is some hundred times their spread: float32 keeps 1e-7 * 300
    "offset_norm": 1e-3,
    # the same float32 computation arranged differently: scan or loop, cut or whole, remat or not
    "rearranged": 2e-6,
    # one loss on different device meshes, relative
    "across_meshes": 2e-6,
    # first gradients on different device meshes, of the largest entry of each parameter's
    "gradients_across_meshes": 1e-5,
    # what one process logs of a run and what several do: losses, cosines, gradient norms, of
    # max(1, |value|)
    "across_processes": 1e-5,
    # the same for other diagnostics (ranks, CKA, retrieval), of their range
    "diagnostics": 1e-3,
    # kernels and biases of a ridge fit from float32 moments, against float64 and on other meshes
    "ridge": 1e-4,
    # parameters after one plain gradient step, on other meshes or in other microbatches
    "after_one_step": 1e-5,
    # a bf16 forward pass against the same in float32, relative error of the hidden states
    "bf16_model": 3e-2,
    # a float32 decoder by a kernel or by XLA: hidden states, cache and gradients of a few units
    "by_kernel": 1e-5,
    # attention in bf16 against float64 on the same rounded inputs: entries up to 6 are rounded to
    # 1/64, and a kernel rounds its weights, too
    "bf16_attention": 5e-2,
    # a step in bf16 beside the same in float32: the loss, relative, and 1 - cosine of gradients
    "bf16_loss": 1e-2,
    "bf16_gradient": 1e-2,
    # keys without a bias 200 times as long, and gradients through them: 1 - cosine with float32's
    "bf16_keys": 1e-4,
    "bf16_kv_gradient": 1e-3,
    # keys with that bias: what bf16 adds to them, beside the length of the rest
    "bf16_content": 1e-2,
    # gradients that are sums over 16384 tokens, relative
    "bf16_sums": 2e-3,
}
