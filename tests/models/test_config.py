"""The configuration: what is refused, in one readable line, wherever it comes from."""

import json

import pytest
from transformers import AutoConfig

from models import ByteLMConfig

LLAMA = dict(model_type="llama", hidden_size=32, num_attention_heads=4)


def make(**settings) -> ByteLMConfig:
    return ByteLMConfig(**{"core": LLAMA, "width": 64, "head_dim": 16, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(head_dim=7), "head_dim must divide width x expand = 128, got 7"),
        (dict(num_groups=3), "num_groups must divide the 8 heads, got 3"),
        (dict(conv_kernel=1), "conv_kernel must be at least 2, got 1"),
        (dict(dechunk="mean"), "dechunk must be one of hold, causal, lookahead, got 'mean'"),
        (dict(dechunk="lookahead", lookahead=False), "dechunk='lookahead' needs a lookahead router"),
        (dict(draft_head=True, lookahead=False), "draft_head=True needs lookahead=True"),
        (dict(encoder="mamba"), "encoder must be one of mamba2, attention, got 'mamba'"),
        (dict(suffix_scope="word"), "suffix_scope must be one of sequence, chunk, got 'word'"),
        (dict(suffix_scope="chunk", lookahead=False), "suffix_scope='chunk' needs lookahead=True"),
        (dict(router="own"), "router must be one of integrated, split, got 'own'"),
        (
            dict(encoder="attention", width=72),
            "encoder='attention' needs an even head_dim that divides width 72, got 16",
        ),
        (dict(encoder="attention", head_dim=1), "encoder='attention' needs an even head_dim .*, got 1"),
        (dict(encoder="attention", expand=1, state_size=8), "encoder='attention' .* expand=1 and state_size=8: raise"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make(**settings)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("width", "a", "an int of at least 1"),
        ("width", 64.0, "an int of at least 1"),
        ("width", True, "an int of at least 1"),
        ("width", None, "an int of at least 1"),
        ("encoder_layers", -1, "an int of at least 0"),
        ("router_inner", -8, "an int of at least 1"),
        ("attention_window", 0, "an int of at least 1"),
        ("router_layers", -1, "an int of at least 0"),
        ("lookahead", 1, "True or False"),
        ("dechunk", 3, "a string"),
        ("norm_eps", 0.0, "a positive number"),
        ("norm_eps", float("nan"), "a positive number"),
        ("norm_eps", "1e-5", "a positive number"),
        ("chunk_cost", -1.0, "a number from 0 to 10"),
        ("chunk_cost", 10.5, "a number from 0 to 10"),
        ("core", "llama", "the teacher's configuration as a dictionary"),
    ],
)
def test_wrong_values_are_refused_by_name(name, value, wanted, tmp_path):
    message = f"^{name} must be {wanted}, got {value!r}$"
    with pytest.raises(ValueError, match=message):
        make(**{name: value})
    config = make()
    with pytest.raises(ValueError, match=message):
        setattr(config, name, value)
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), name: value}))
    for load in (ByteLMConfig.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(widht=3), "ByteLMConfig has no setting 'widht' .*did you mean 'width'"),
        (dict(encoder_layer=3), "no setting 'encoder_layer' .*did you mean 'encoder_layers'"),
        (dict(colour="red"), "no setting 'colour' .*remove it; the settings are core, width"),
        (dict(top_k=5), "no setting 'top_k'"),
    ],
)
def test_unknown_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_transformers_own_settings_are_accepted():
    config = make(dtype="bfloat16", architectures=["ByteLM"], eos_token_id=255, attn_implementation="sdpa")
    assert str(config.dtype) == "torch.bfloat16" and config.architectures == ["ByteLM"]


def test_configuration_survives_a_file(tmp_path):
    config = make(encoder_layers=3, dechunk="causal", norm_eps=1e-6, dtype="float32")
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == {**config.to_dict(), "_name_or_path": str(tmp_path)}
    assert ByteLMConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_sizes_are_checked_again_when_saved(tmp_path):
    config = make()
    config.head_dim = 7
    with pytest.raises(ValueError, match="head_dim must divide"):
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("core", "message"),
    [
        (None, "config.core must be the teacher's configuration"),
        (dict(hidden_size=32), "with its model_type"),
        (dict(model_type="vit"), "model_type='vit', which is no causal language model: give a teacher's"),
        (
            dict(model_type="llama", hiden_size=32),
            "llama has no setting 'hiden_size' .got 32.: did you mean 'hidden_size'",
        ),
        (dict(model_type="llamma"), "model_type='llamma', which transformers .* lacks"),
        ({**LLAMA, "hidden_size": "a"}, "config.core is not a llama model's: Field 'hidden_size' expected int"),
    ],
)
def test_a_core_that_is_no_configuration_is_refused(core, message):
    config = make(core=core)
    with pytest.raises(ValueError, match=message):
        config.core_config()


# What the config.json of published teachers has beside the settings of their classes.
LEFTOVERS = {
    "llama": dict(
        *[dict(is_llama_config=True, rope_interleaved=False, rope_theta=1e4, rope_scaling=None, unsloth_fixed=True)],
        **{"transformers.js_config": {"dtype": "q4"}, "_name_or_path": "x", "torch_dtype": "bfloat16"},
        **dict(architectures=["LlamaForCausalLM"], transformers_version="4.40.0", quantization_config=None),
    ),
    "qwen2": dict(use_mrope=False, rope_theta=1e6, max_window_layers=28, use_sliding_window=False, head_dim=8),
    "olmo2": dict(clip_qkv=None, rope_theta=5e5, attention_bias=False),
    "mistral": dict(sliding_window=None, rope_theta=1e4, cache_implementation="hybrid"),
    "gpt2": dict(n_ctx=1024, n_embd=32, n_head=4, task_specific_params={}, gradient_checkpointing=False),
    "gemma": dict(hidden_activation=None, hidden_act="gelu", rope_theta=1e4),
}


@pytest.mark.parametrize("family", LEFTOVERS)
def test_what_real_teachers_bring_along_is_ignored(family):
    assert make(core=dict(model_type=family, **LEFTOVERS[family])).core_config().model_type == family
