"""Every tolerance of the test-suite, by what is compared. Rows are added, never loosened."""

TOL = {
    # float32 against numpy float64, elementwise formulas
    "float32": 1e-5,
    # bf16 inputs against float64 on the same rounded inputs (the maths is float32 inside)
    "bf16_inputs": 1e-5,
    # logits, keys and values against transformers in float32
    "parity": 1e-4,
}
