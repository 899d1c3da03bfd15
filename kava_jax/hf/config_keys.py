"""Every key of a ``config.json``: read, without a say here, or refused by name.

A key on none of the lists is not guessed at: it is named in a notice for a downloaded model, and is
an error in ``student.geometry``, which somebody wrote by hand.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from kava_jax.errors import KavaError
from kava_jax.hf.families import Family

# Keys of config.json that ``spec`` reads and writes, with the field of DecoderSpec for each.
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
}
OPTIONAL_SIZES = {"num_key_value_heads", "head_dim", "max_position_embeddings"}
READ = {*SIZES} | {
    "architectures",
    "attention_bias",
    "eos_token_id",
    "hidden_act",
    "hidden_activation",
    "initializer_range",
    "layer_types",
    "max_window_layers",
    "mlp_bias",
    "model_type",
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_experts_per_tok",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "quantization_config",
    "rms_norm_eps",
    "rope_local_base_freq",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "sliding_window_pattern",
    "tie_word_embeddings",
    "use_bidirectional_attention",
    "use_sliding_window",
}

# Keys without a say. So are those that transformers gives to every model or to generation
# (``unknown_keys``).
IGNORED = {
    # who wrote the file, with what
    "is_llama_config",
    "model_name",
    "transformers.js_config",
    "unsloth_fixed",
    "unsloth_version",
    # code, which is never run
    "auto_map",
    "custom_pipelines",
    # chosen by the run: dtype, attention kernel, cache, recomputation, parallel products
    "_attn_implementation",
    "_attn_implementation_autoset",
    "attn_implementation",
    "gradient_checkpointing",
    "pretraining_tp",
    "torch_dtype",
    "torchscript",
    "use_flash_attention",
    "_flash_attn_2_enabled",
    # a loss or noise of training the router
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
    # the tokenizer's
    "tokenizer_class",
    "unk_token_id",
    # dropout or noise in training, which this trainer does not use
    "attention_dropout",
    "classifier_dropout",
    "embd_pdrop",
    "hidden_dropout",
    "neftune_noise_alpha",
    "resid_pdrop",
    # read by no class of transformers
    "_sliding_window_pattern",
    "full_attn_mod",
    "interpolate_factor",
    # lengths that transformers ignores, too
    "max_sequence_length",
    "model_max_length",
    # a default of every model in transformers 4.x, without effect in these families
    "add_cross_attention",
    "cross_attention_hidden_size",
    "finetuning_task",
    "is_decoder",
    "num_labels",
    "prefix",
    "pruned_heads",
    "sep_token_id",
    "task_specific_params",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "use_bfloat16",
    "use_return_dict",
}

REFUSED: dict[str, tuple[Any, ...]] = {
    # multipliers of Granite, MiniCPM, Cohere
    "attention_multiplier": (1.0,),
    "embedding_multiplier": (1.0,),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "residual_multiplier": (1.0,),
    "scale_emb": (1.0,),
    "scale_depth": (),
    "dim_model_base": (),
    # soft caps and scales of Gemma, clipping of OLMo
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "clip_qkv": (),
    "lm_head_bias": (),
    # mixture of experts
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
    "n_routed_experts": (0,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    # other rotations, layers without one, norms that the family does not have
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (0,),
    "rope_interleaved": (),
    "rotary_pct": (1.0,),
    "use_mrope": (),
    "qk_layernorm": (),
    "use_qk_norm": (),
}
"""Keys of other models that change what the layers compute, with the values that change nothing
(null and false never do)."""


def refused(config: Mapping[str, Any], family: Family) -> list[str]:
    """What to say of keys that ask for layers which the family does not have."""
    return [
        f"{key}={config[key]!r} is not supported; use a model without it"
        for key, neutral in REFUSED.items()
        if config.get(key) not in (None, False, *neutral) and not family.reads(key)
    ]


def unknown_keys(config: Mapping[str, Any]) -> list[str]:
    """Keys on none of the lists, in the order of the file.

    Keys that transformers has for every model, or for generation, say nothing of these layers.
    """
    unknown = [key for key in config if key not in READ | IGNORED | REFUSED.keys()]
    if not unknown:
        return []
    # transformers is slow to import, and most configs have no key that needs it.
    from transformers import GenerationConfig, PretrainedConfig

    general = PretrainedConfig().to_dict().keys() | GenerationConfig().to_dict().keys()
    return [key for key in unknown if key not in general]


def refuse_unknown(config: Mapping[str, Any], where: str) -> None:
    """Raise a ``KavaError`` that names the keys on none of the lists, with the closest match."""
    for key in unknown_keys(config):
        close = difflib.get_close_matches(key, sorted(READ), 1)
        meant = f"did you mean {close[0]}?" if close else "remove it"
        raise KavaError(f"{where}: {key}={config[key]!r} is no key of these models; {meant}")


def note_unknown(config: Mapping[str, Any], who: str) -> str | None:
    """What to say of the keys on none of the lists."""
    if (inner := config.get("text_config")) is not None:
        further = note_unknown(inner, who)
        said = f"{who}: of this model the text part alone is read, not what reads images"
        return f"{said}; {further}" if further else said
    unknown = unknown_keys(config)
    if not unknown:
        return None
    return f"{who}: config.json has keys that are not known here and not read: {', '.join(unknown)}"
