"""``generation_config.json``: where answers end, and what of it an export passes on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kava_jax.errors import KavaError
from kava_jax.hf.locate import read_json

GENERATION = "generation_config.json"
# What transformers reads only while it samples, or only with several beams. It ignores them
# otherwise, and up to 4.x refuses to save a model that has them.
_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "top_h",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
_BEAMS = ("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty")


def end_ids(directory: Path) -> frozenset[int]:
    """The ids that end an answer by ``generation_config.json``, without one by ``config.json``.

    Absent and null mean none: the tokenizer's own end is left.

    Raises:
        KavaError: ``eos_token_id`` is neither an id nor a list of ids.
    """
    name = GENERATION if (directory / GENERATION).is_file() else "config.json"
    given = read_json(directory / name).get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise KavaError(
            f"{directory.name}/{name}: eos_token_id={given!r} is neither an id nor a list of ids; "
            "write the number of the token, or null"
        )
    return frozenset(ids)


def passed_on(source: Mapping[str, Any]) -> dict[str, Any]:
    """A model's generation config without what it does not use."""
    # transformers decodes greedily and with one beam where these keys are absent or null.
    unused = () if source.get("do_sample") is True else _SAMPLING
    if (source.get("num_beams") or 1) == 1:
        unused = (*unused, *_BEAMS)
    kept = {key: value for key, value in source.items() if key not in unused}
    pad = kept.get("pad_token_id")
    if isinstance(pad, int) and pad < 0:  # how the first Llama files said that there is none
        del kept["pad_token_id"]
    return kept
