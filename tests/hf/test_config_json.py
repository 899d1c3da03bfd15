"""Geometry against transformers' own configuration classes, in both directions."""

import json
from dataclasses import replace

import pytest
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kava_jax.errors import KavaError
from kava_jax.hf.config_json import FAMILIES, config_from_spec, spec_from_config
from kava_jax.hf.rope_keys import ROPE_TYPES
from kava_jax.models.spec import DecoderSpec, Llama3RopeScaling
from tests.tiny_models import CONFIGS

MIXED = ["full_attention", "sliding_attention", "full_attention"]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


ORIGINAL_KEY = "original_max_position_embeddings"
ORIGINAL = {ORIGINAL_KEY: 64}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0} | ORIGINAL
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 10,
    "long_factor": [1.0 + i for i in range(10)],
} | ORIGINAL
SCALED = {
    rope["rope_type"]: CONFIGS["llama3"] | {"rope_scaling": rope}
    for rope in (
        {"rope_type": "linear", "factor": 2.0},
        DYNAMIC,
        YARN | {"beta_fast": 16.0, "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False},
        LONGROPE | {"attention_factor": 1.25},
    )
}


def read(config: dict) -> DecoderSpec:
    return spec_from_config(config, where="models.0")


def windows(config) -> tuple[int | None, ...]:
    """How far a token of each layer sees, as the families' classes in transformers have it."""
    depth, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    if config.model_type in ("mistral", "phi3", "mixtral", "qwen3_moe"):  # one mask for all layers
        return (window,) * depth
    types = getattr(config, "layer_types", None) or ["full_attention"] * depth
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def agrees(spec: DecoderSpec, config) -> None:
    """Every field of the spec against a transformers config object."""
    rope, sliding = config.rope_parameters, None
    if "full_attention" in rope:
        rope, sliding = rope["full_attention"], rope["sliding_attention"]
        assert sliding["rope_type"] == "default"
    family = config.model_type
    qwen2 = family == "qwen2"
    attention_bias = getattr(config, "attention_bias", False)
    heads = config.num_attention_heads
    expected = {
        "family": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.moe_intermediate_size
        if family == "qwen3_moe"
        else config.intermediate_size,
        "num_experts": getattr(config, "num_local_experts", 0),
        "experts_per_token": getattr(config, "num_experts_per_tok", 0),
        "experts_normalised": getattr(config, "norm_topk_prob", family == "mixtral"),
        "num_layers": config.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "rope_theta": rope["rope_theta"],
        "norm_eps": config.rms_norm_eps,
        "tie_embeddings": config.tie_word_embeddings,
        "qkv_bias": qwen2 or attention_bias,
        "output_bias": attention_bias,
        "mlp_bias": getattr(config, "mlp_bias", False),
        "qk_norm": config.model_type in ("qwen3", "gemma3_text", "olmo2", "qwen3_moe"),
        "layer_windows": windows(config),
        "layer_ropes": tuple(
            None
            if not rotated
            else replace(spec.layer_ropes[layer], theta=float(sliding["rope_theta"]), scaling=None)
            if sliding and config.layer_types[layer] == "sliding_attention"
            else replace(spec.layer_ropes[layer], theta=float(rope["rope_theta"]))
            for layer, rotated in enumerate(
                getattr(config, "no_rope_layers", None) or [1] * config.num_hidden_layers
            )
        ),
        "attention_scale": getattr(config, "attention_multiplier", None)
        or (getattr(config, "query_pre_attn_scalar", 0) ** -0.5 if "gemma" in family else None),
        "attention_cap": getattr(config, "attn_logit_softcapping", None),
        "logit_cap": getattr(config, "final_logit_softcapping", None),
        "logit_scale": 1 / getattr(config, "logits_scaling", 1),
        "embedding_scale": getattr(config, "embedding_multiplier", 1),
        "residual_scale": getattr(config, "residual_multiplier", 1),
        "rotary_dim": None
        if rope.get("partial_rotary_factor", 1.0) == 1.0
        else int(spec.head_dim * rope["partial_rotary_factor"]),
        "initializer_range": config.initializer_range,
        "max_position_embeddings": config.max_position_embeddings,
    }
    assert {key: getattr(spec, key) for key in expected} == expected
    if spec.rope_scaling is None:
        assert rope["rope_type"] == "default"
        return
    assert ROPE_TYPES[rope["rope_type"]] is type(spec.rope_scaling)
    given = json.loads(json.dumps(vars(spec.rope_scaling)))  # tuples to lists
    absent = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
    if given.get("attention_factor") and "attention_factor" not in rope:
        pytest.importorskip("torch", reason="torch, the oracle, is not installed")
        absent["attention_factor"] = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)[1]
    assert {key: rope.get(key, absent.get(key)) for key in given} == given


def hf_config(config: dict):
    fields = {key: value for key, value in config.items() if key != "model_type"}
    return AutoConfig.for_model(config["model_type"], **json.loads(json.dumps(fields)))


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_reading_agrees_with_transformers(name):
    agrees(read(CONFIGS[name]), hf_config(CONFIGS[name]))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_absent_keys_get_the_defaults_of_transformers(name):
    bare = {
        "architectures": [FAMILIES[name].architecture],
        "model_type": name,
        "vocab_size": 1000,
        "hidden_size": 2048,
        "intermediate_size": 256,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
    }
    agrees(read(bare), hf_config(bare))
    # transformers refuses null there
    if name in ("mistral", "ministral", "gemma2", "gemma3_text", "qwen3_moe", "mixtral"):
        return
    null = bare | {"num_key_value_heads": None, "rope_scaling": None}
    agrees(read(null), hf_config(null))


@pytest.mark.parametrize("name", [*sorted(CONFIGS), *SCALED])
def test_what_we_write_loads_in_transformers_and_reads_back_the_same(name, tmp_path):
    spec = read((CONFIGS | SCALED)[name])
    ids = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None}
    config = config_from_spec(spec, dtype="bfloat16") | ids
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoConfig.from_pretrained(tmp_path)
    agrees(spec, loaded)
    assert str(loaded.dtype).endswith("bfloat16")
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, [2, 3], None)
    assert read(config) == spec
    # Each generation reads its own spelling alone.
    new = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling")}
    old = {k: v for k, v in config.items() if k != "rope_parameters"}
    assert read(new) == read(old) == spec
    # And what transformers writes back is read the same, too.
    loaded.save_pretrained(tmp_path)
    assert read(json.loads((tmp_path / "config.json").read_text())) == spec


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_llama3_scaling_in_both_spellings(key):
    base = CONFIGS["smollm"] | {"rope_theta": 500000.0}
    spec = read(base | {key: LLAMA3})
    assert spec.rope_scaling == Llama3RopeScaling(32.0, 1.0, 4.0, 8192)
    assert spec.rope_theta == 500000.0
    legacy = {"type" if k == "rope_type" else k: v for k, v in LLAMA3.items()}
    assert read(base | {key: legacy}) == spec
    assert read(base | {key: legacy | LLAMA3}) == spec  # as transformers 4.4x wrote it


def test_rope_parameters_by_type_of_layer_are_read():
    base = CONFIGS["qwen2"] | {"rope_theta": None, "rope_scaling": None}
    flat = read(base | {"rope_parameters": {"rope_theta": 1e6} | YARN})
    assert flat.rope_theta == 1e6
    keyed = {"full_attention": {"rope_theta": 1e6} | YARN}
    assert read(base | {"rope_parameters": keyed}) == flat
    both = keyed | {"sliding_attention": {"rope_theta": 1e4}}
    with pytest.raises(KavaError, match="rope_theta twice"):
        read(base | {"rope_parameters": both})


def test_the_original_length_may_stand_beside_the_scaling():
    """As Phi-3 has it, where transformers gives it precedence."""
    within = CONFIGS["llama3"] | {"rope_scaling": LONGROPE}
    bare = {key: value for key, value in LONGROPE.items() if key != ORIGINAL_KEY}
    beside = CONFIGS["llama3"] | {"rope_scaling": bare} | ORIGINAL
    assert read(beside) == read(within)
    theirs = hf_config({k: v for k, v in beside.items() if k != "architectures"})
    theirs.standardize_rope_params()  # as its rotary module does first of all
    assert theirs.rope_parameters[ORIGINAL_KEY] == 64
    # Scalings without an original length do not read it; in transformers neither.
    assert read(CONFIGS["qwen2"] | ORIGINAL) == read(CONFIGS["qwen2"])


def test_a_note_of_the_authors_of_yarn_is_no_setting():
    noted = YARN | {"finetuned": True}
    assert read(CONFIGS["llama3"] | {"rope_scaling": noted}) == read(
        CONFIGS["llama3"] | {"rope_scaling": YARN}
    )


@pytest.mark.parametrize(
    ("size", "numbers", "rows", "tied", "kv_width"),
    [
        ("14B", (48, 5120, 13824, 40, 8), 152064, False, 1024),
        ("7B", (28, 3584, 18944, 28, 4), 152064, False, 512),
        ("1.5B", (28, 1536, 8960, 12, 2), 151936, True, 256),
        ("0.5B", (24, 896, 4864, 14, 2), 151936, True, 128),
    ],
)
def test_qwen25_kv_width_is_not_the_hidden_size(size, numbers, rows, tied, kv_width):
    layers, hidden, inner, heads, kv_heads = numbers
    spec = read(
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "vocab_size": rows,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "rope_theta": 1000000.0,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": tied,
            "use_sliding_window": False,
            "sliding_window": 131072,
            "max_window_layers": layers,
        }
    )
    assert spec.kv_width == kv_width
    assert spec.head_dim == (64 if size == "0.5B" else 128)
    assert (spec.num_layers, spec.vocab_size) == (layers, rows)
    assert spec.qkv_bias
    assert not spec.output_bias
    assert spec.sliding_window is None
    assert (spec.rope_theta, spec.tie_embeddings) == (1e6, tied)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("qwen2", {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "LlamaForCausalLM"),
        ("qwen2", {"architectures": ["Qwen2ForSequenceClassification"]}, "Qwen2ForCausalLM"),
        ("qwen2", {"model_type": "llama"}, "model_type='llama'"),
        ("qwen2", {"architectures": None, "model_type": None}, "Qwen3ForCausalLM"),
        ("qwen2", {"layer_types": MIXED}, "no sliding_window in this Qwen2ForCausalLM"),
        ("qwen2_sliding", {"layer_types": MIXED[:2]}, "is no list of num_hidden_layers=3"),
        ("qwen2_sliding", {"layer_types": ["chunked_attention"] * 3}, "has chunked_attention"),
        ("qwen2_sliding", {"sliding_window": 0}, "sliding_window=0"),
        ("mistral", {"layer_types": MIXED}, "layer_types mixes types"),
        ("llama3", {"layer_types": MIXED}, "no sliding_window in this LlamaForCausalLM"),
        ("qwen2_sliding", {"layer_types": 3}, "layer_types=3 is no list"),
        ("qwen2_sliding", {"max_window_layers": "two"}, "max_window_layers='two'"),
        ("gemma3", {"sliding_window_pattern": 0}, "sliding_window_pattern=0"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers=[1, 0] is no list of"),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "interval=0"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
        ("granite", {"residual_multiplier": None}, "residual_multiplier=None"),
        ("llama3", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("llama3", {"rope_scaling": {"type": "su", "factor": 2.0}}, "called longrope now"),
        ("llama3", {"rope_scaling": {"type": "mrope", "mrope_section": [2]}}, "'mrope'"),
        ("llama3", {"rope_scaling": {"type": "linear"}}, "linear lacks factor"),
        ("llama3", {"rope_scaling": {"rope_type": "longrope"}}, "short_factor, long_factor"),
        ("llama3", {"rope_scaling": {"factor": 2.0}}, "rope_type=None does not take factor=2.0"),
        ("llama3", {"rope_scaling": {"type": "default", "factor": 2.0}}, "does not take factor"),
        ("llama3", {"rope_scaling": YARN | {"attn_factor": 1.0}}, "does not take attn_factor=1.0"),
        ("llama3", {"rope_scaling": YARN | {"beta_fast": 0.5}}, "below beta_slow"),
        ("llama3", {"rope_scaling": YARN | {"truncate": 1}}, "truncate=1"),
        ("llama3", {"rope_scaling": YARN, "rope_theta": 1.0}, "above 1"),
        ("llama3", {"rope_scaling": YARN | {"factor": float("inf")}}, "factor=inf"),
        ("llama3", {"rope_scaling": DYNAMIC | ORIGINAL}, "max_position_embeddings=256"),
        ("llama3", {"rope_scaling": DYNAMIC, "head_dim": 2}, "head_dim=2"),
        ("llama3", {"rope_scaling": LONGROPE | {"short_factor": [1.0]}}, "needs 10 of each"),
        ("llama3", {"rope_scaling": LONGROPE | {"long_factor": 2.0}}, "not a list"),
        ("llama3", {"rope_scaling": LONGROPE, ORIGINAL_KEY: 65}, "twice, 64 and 65"),
        ("llama3", {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "not above"),
        ("llama3", {"rope_parameters": {"full_attention": None}}, "full_attention=None"),
        ("qwen2", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_theta twice"),
        ("qwen2", {"rope_parameters": {"chunked_attention": {}}}, "chunked_attention"),
        ("llama3", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ("llama3", {"rope_parameters": {"rope_theta": 1e4}}, "rope_theta twice"),
        ("llama3", {"rope_scaling": "llama3"}, "not an object"),
        ("llama3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama3", {"num_key_value_heads": 4}, "num_key_value_heads=4"),
        ("llama3", {"head_dim": 7}, "head_dim=7"),
        ("llama3", {"vocab_size": "many"}, "vocab_size='many'"),
        ("llama3", {"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ("llama3", {"rms_norm_eps": 0}, "rms_norm_eps=0"),
        ("llama3", {"hidden_size": None, "vocab_size": None}, "vocab_size, hidden_size"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(name, change, words):
    with pytest.raises(KavaError) as error:
        read(CONFIGS[name] | change)
    message = str(error.value)
    assert words in message
    assert message.startswith("models.0: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("qwen2", {"qkv_bias": False}, "qkv_bias=False"),
        ("llama3", {"qk_norm": True}, "qk_norm=True"),
        ("llama3", {"qkv_bias": True}, "qkv_bias=True"),
        ("qwen3", {"qk_norm_over_heads": True}, "qk_norm_over_heads=True"),
        ("llama3", {"sliding_window": 4}, "sliding_window=4"),
        ("gemma3", {"norm_places": "after"}, "norm_places=after"),
        ("smollm3", {"rotary_dim": 4}, "rotary_dim=4"),
        ("qwen3", {"family": "gpt2"}, "gpt2"),
    ],
)
def test_a_spec_its_family_cannot_express_is_not_written(name, change, words):
    with pytest.raises(KavaError, match=words):
        config_from_spec(replace(read(CONFIGS[name]), **change), dtype="float32")
