"""Qwen2Config reads every published config.json as transformers does, and refuses the rest."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import tiny_config
from qwen2_ascend.config import DTYPES, Qwen2Config, YarnScaling
from qwen2_ascend.errors import UserError
from qwen2_ascend.planning.parameters import num_parameters

YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
"""What Qwen's model cards tell people to add for contexts beyond 32768 tokens."""


def published(
    layers: int, hidden: int, ffn: int, heads: int, groups: int, vocabulary: int, **others: Any
) -> dict[str, Any]:
    """A config.json as Qwen publishes it (transformers-4 spelling)."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "max_position_embeddings": 32768,
        "max_window_layers": layers,
        "model_type": "qwen2",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": groups,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocabulary,
        **others,
    }


LONG = {"max_position_embeddings": 131072, "sliding_window": 131072}
MATH = {"max_position_embeddings": 4096, "sliding_window": 4096, "rope_theta": 10000.0}
DISTILLED = {"max_position_embeddings": 131072, "use_mrope": False}
SHAPES = {
    "0.5B": (24, 896, 4864, 14, 2, 151936),
    "1.5B": (28, 1536, 8960, 12, 2, 151936),
    "3B": (36, 2048, 11008, 16, 2, 151936),
    "7B": (28, 3584, 18944, 28, 4, 152064),
    "14B": (48, 5120, 13824, 40, 8, 152064),
    "32B": (64, 5120, 27648, 40, 8, 152064),
    "72B": (80, 8192, 29568, 64, 8, 152064),
}
TIED = {"tie_word_embeddings": True}
PUBLISHED = {
    "Qwen2-0.5B": published(*SHAPES["0.5B"], **TIED, **LONG),
    "Qwen2-7B-Instruct": published(*SHAPES["7B"], sliding_window=131072),
    "Qwen2-72B": published(*SHAPES["72B"], **LONG, rms_norm_eps=1e-5),
    "Qwen2.5-0.5B": published(*SHAPES["0.5B"], **TIED),
    "Qwen2.5-1.5B": published(*SHAPES["1.5B"], **TIED, **LONG, use_mrope=False),
    "Qwen2.5-3B": published(*SHAPES["3B"], **TIED, use_mrope=False),
    "Qwen2.5-7B": published(*SHAPES["7B"], **LONG, use_mrope=False),
    "Qwen2.5-14B": published(*SHAPES["14B"], **LONG, rms_norm_eps=1e-5),
    "Qwen2.5-32B": published(*SHAPES["32B"], **LONG, rms_norm_eps=1e-5),
    "Qwen2.5-72B": published(*SHAPES["72B"], **LONG, rms_norm_eps=1e-5),
    "Qwen2.5-7B-Instruct with YaRN": published(*SHAPES["7B"], rope_scaling=YARN),
    "Qwen2.5-Coder-7B-Instruct": published(*SHAPES["7B"], sliding_window=131072),
    "Qwen2.5-Math-1.5B": published(*SHAPES["1.5B"], **TIED, **{**MATH, "max_window_layers": 21}),
    "Qwen2.5-Math-7B": published(*SHAPES["7B"], **MATH),
    "QwQ-32B": published(*SHAPES["32B"], max_position_embeddings=40960, rms_norm_eps=1e-5),
    "DeepSeek-R1-Distill-Qwen-1.5B": published(
        *SHAPES["1.5B"], **{**DISTILLED, "rope_theta": 10000, "max_window_layers": 21}
    ),
    "DeepSeek-R1-Distill-Qwen-7B": published(*SHAPES["7B"], **DISTILLED, rope_theta=10000),
    "DeepSeek-R1-Distill-Qwen-14B": published(*SHAPES["14B"], **DISTILLED, rms_norm_eps=1e-5),
    "DeepSeek-R1-Distill-Qwen-32B": published(*SHAPES["32B"], **DISTILLED, rms_norm_eps=1e-5),
}

NUM_PARAMETERS = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
}
"""The hub's counts."""


def as_transformers_5(raw: dict[str, Any]) -> dict[str, Any]:
    """The same config.json as transformers 5 writes it."""
    new = {k: v for k, v in raw.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    rope = {"rope_theta": raw["rope_theta"], "rope_type": "default"}
    if scaling := raw.get("rope_scaling"):
        rope |= {k: v for k, v in scaling.items() if k != "type"} | {"rope_type": "yarn"}
    return {
        **new,
        "rope_parameters": rope,
        "layer_types": ["full_attention"] * raw["num_hidden_layers"],
        "sliding_window": None,
        "dtype": raw["torch_dtype"],
    }


def transformers_config(raw: dict[str, Any]):
    from transformers import Qwen2Config as HuggingFaceConfig

    return HuggingFaceConfig.from_dict(json.loads(json.dumps(raw)))


@pytest.mark.parametrize("spelling", [lambda raw: raw, as_transformers_5], ids=["4", "5"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_as_transformers_reads_them(name: str, spelling) -> None:
    raw = spelling(PUBLISHED[name])
    ours, theirs = Qwen2Config.from_dict(raw), transformers_config(raw)
    assert ours.num_layers == theirs.num_hidden_layers
    assert ours.hidden_size == theirs.hidden_size
    assert ours.ffn_hidden_size == theirs.intermediate_size
    assert ours.num_attention_heads == theirs.num_attention_heads
    assert ours.num_query_groups == theirs.num_key_value_heads
    assert ours.kv_channels == theirs.hidden_size // theirs.num_attention_heads
    assert ours.vocab_size == theirs.vocab_size
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rotary_base == theirs.rope_parameters["rope_theta"]
    assert ours.norm_epsilon == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.init_method_std == theirs.initializer_range
    assert ours.attention_dropout == theirs.attention_dropout
    assert ours.dtype == DTYPES[str(theirs.dtype).removeprefix("torch.")] == "bf16"
    assert set(theirs.layer_types) == {"full_attention"}
    assert (ours.yarn is None) == (theirs.rope_parameters["rope_type"] == "default")


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_counted_as_transformers_counts_them(name: str) -> None:
    import torch
    from transformers import Qwen2ForCausalLM

    with torch.device("meta"):
        model = Qwen2ForCausalLM(transformers_config(PUBLISHED[name]))
    count = num_parameters(Qwen2Config.from_dict(PUBLISHED[name]))
    assert count == model.num_parameters()
    assert count == NUM_PARAMETERS.get(name, count)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "YaRN" not in name])
def test_published_models_are_known_by_name(name: str) -> None:
    """All that config.json says of each: epsilon, rotary base and positions too."""
    assert Qwen2Config.named(name) == Qwen2Config.from_dict(PUBLISHED[name])
    assert Qwen2Config.named(f"Qwen/{name.upper()}") == Qwen2Config.named(name)


@pytest.mark.parametrize("size", SHAPES)
def test_a_size_alone_is_the_base_model_of_qwen25(size: str) -> None:
    assert Qwen2Config.named(size) == Qwen2Config.from_dict(PUBLISHED[f"Qwen2.5-{size}"])
    assert Qwen2Config.named(size.lower()) == Qwen2Config.named(f"qwen2.5-{size}")
    assert Qwen2Config.named(f"Qwen2-{size}").num_layers == SHAPES[size][0]


@pytest.mark.parametrize(
    ("name", "epsilon", "rotary_base", "positions"),
    [
        ("14B-Instruct", 1e-6, 1e6, 32768),
        ("32B-Instruct", 1e-6, 1e6, 32768),
        ("72B-Instruct", 1e-6, 1e6, 32768),
        ("Qwen2-72B-Instruct", 1e-6, 1e6, 32768),
        ("Coder-32B", 1e-5, 1e6, 32768),
        ("Coder-32B-Instruct", 1e-6, 1e6, 32768),
        ("Math-72B", 1e-5, 1e4, 4096),
        ("Math-72B-Instruct", 1e-6, 1e4, 4096),
        ("QwQ-32B-Preview", 1e-5, 1e6, 32768),
    ],
)
def test_a_name_says_which_model_of_a_size_it_is(
    name: str, epsilon: float, rotary_base: float, positions: int
) -> None:
    config = Qwen2Config.named(name)
    found = (config.norm_epsilon, config.rotary_base, config.max_position_embeddings)
    assert found == (epsilon, rotary_base, positions)


@pytest.mark.parametrize("name", ["8B", "Math-14B", "Qwen2-Coder-7B", "7B-Instruct-Instruct"])
def test_an_unknown_model_names_the_known_ones(name: str) -> None:
    known = rf"'{name}' is not known; known are 0\.5B, 1\.5B, 3B, 7B.*Math-.*QwQ-32B, QwQ-"
    with pytest.raises(UserError, match=known):
        Qwen2Config.named(name)


# --- YaRN added to a config -----------------------------------------------------------------------


@pytest.mark.parametrize("spelling", [lambda raw: raw, as_transformers_5], ids=["4", "5"])
def test_yarn_that_is_added_is_read_again(spelling) -> None:
    raw = spelling(PUBLISHED["Qwen2.5-Math-7B"])
    config = Qwen2Config.from_dict(raw).with_yarn(8.0, 4096)
    assert config.max_position_embeddings == 32768
    assert Qwen2Config.from_dict(config.with_own_yarn(raw)) == config
    assert config.rotary_base == 10000
    as_published = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}
    written = {**PUBLISHED["Qwen2.5-Math-7B"], "rope_scaling": as_published}
    assert Qwen2Config.from_dict(written).yarn == config.yarn


# --- YaRN -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", [lambda raw: raw, as_transformers_5], ids=["4", "5"])
@pytest.mark.parametrize(
    "scaling",
    [
        YARN,
        {"rope_type": "yarn", "factor": 2.5},
        {**YARN, "factor": 1.0},
        {**YARN, "attention_factor": 1.25, "beta_fast": 16, "beta_slow": 2},
        {**YARN, "attention_factor": None, "beta_fast": None, "truncate": False},
    ],
)
def test_yarn_scales_as_transformers_does(scaling: dict[str, Any], spelling) -> None:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    raw = spelling(published(*SHAPES["0.5B"], rope_scaling=scaling))
    yarn = Qwen2Config.from_dict(raw).yarn
    assert yarn is not None
    rotary = Qwen2RotaryEmbedding(transformers_config(raw))
    assert yarn.attention_factor == pytest.approx(rotary.attention_scaling, rel=1e-12)
    assert yarn.factor == scaling["factor"]
    assert yarn.original_max_position_embeddings == 32768
    assert yarn.beta_fast == (scaling.get("beta_fast") or 32.0)
    assert yarn.beta_slow == (scaling.get("beta_slow") or 1.0)
    assert yarn.truncate == scaling.get("truncate", True)
    frequencies = yarn_frequencies(yarn, base=1e6, width=64)
    assert rotary.inv_freq.tolist() == pytest.approx(frequencies, rel=1e-5)


ROPES = st.one_of(
    st.none(),
    st.just({}),
    st.fixed_dictionaries(
        {}, optional={"rope_type": st.just("default"), "rope_theta": st.just(5000.0)}
    ),
    st.builds(
        lambda name, rest: {name: "yarn", **rest},
        st.sampled_from(["rope_type", "type"]),
        st.fixed_dictionaries(
            {"factor": st.sampled_from([1.0, 2, 4.0, 7.5])},
            optional={
                "original_max_position_embeddings": st.sampled_from([64, 128, 4096]),
                "rope_theta": st.sampled_from([10000, 2e5]),
                "attention_factor": st.sampled_from([None, 0.5, 1.3]),
                "beta_fast": st.sampled_from([None, 16, 40.0]),
                "beta_slow": st.sampled_from([None, 2]),
                "truncate": st.booleans(),
            },
        ),
    ),
)
"""What files have under rope_parameters or rope_scaling, and what cards tell people to add."""
SPELLINGS = st.fixed_dictionaries(
    {},
    optional={
        "rope_theta": st.sampled_from([10000.0, 1_000_000]),
        "rope_parameters": ROPES,
        "rope_scaling": ROPES,
        "original_max_position_embeddings": st.sampled_from([32, 256, 8192]),
        "max_position_embeddings": st.sampled_from([512, 32768]),
        "dtype": st.sampled_from([None, "float16", "bfloat16"]),
        "torch_dtype": st.sampled_from([None, "float32", "bfloat16"]),
        "head_dim": st.sampled_from([8, 12]),
        "num_key_value_heads": st.sampled_from([None, 1, 2]),
        "tie_word_embeddings": st.booleans(),
        "rms_norm_eps": st.sampled_from([1e-5, 1e-6]),
    },
)


@settings(max_examples=300, deadline=None)
@given(SPELLINGS)
def test_every_spelling_means_what_transformers_makes_of_it(changes: dict[str, Any]) -> None:
    """Property: sizes, dtype and rotary frequencies of any mixture of old and new keys."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    from qwen2_ascend.model.rotary_embedding import inverse_frequencies

    plain = {k: v for k, v in TINY.items() if k not in ("dtype", "torch_dtype", "rope_theta")}
    raw = {**plain, **changes}
    found, theirs = Qwen2Config.from_dict(raw), transformers_config(json.loads(json.dumps(raw)))
    rotary = Qwen2RotaryEmbedding(theirs)
    scale = found.yarn.attention_factor if found.yarn else 1.0
    assert scale == pytest.approx(rotary.attention_scaling, rel=1e-12)
    assert inverse_frequencies(found).tolist() == pytest.approx(rotary.inv_freq.tolist(), rel=1e-6)
    assert found.num_query_groups == theirs.num_key_value_heads
    assert found.tie_word_embeddings == theirs.tie_word_embeddings
    assert found.norm_epsilon == theirs.rms_norm_eps
    dtype = str(theirs.dtype or "torch.float32").removeprefix("torch.")
    assert found.dtype == DTYPES[dtype]


def test_what_users_add_to_a_file_of_transformers_5_counts() -> None:
    """YaRN as Qwen's cards write it, beside the dictionary that save_pretrained wrote."""
    raw = as_transformers_5(published(*SHAPES["0.5B"]))
    assert "rope_parameters" in raw
    assert Qwen2Config.from_dict(raw).yarn is None
    yarn = Qwen2Config.from_dict({**raw, "rope_scaling": YARN}).yarn
    assert yarn is not None and yarn.factor == 4.0
    beside = {"original_max_position_embeddings": 4096}
    yarn = Qwen2Config.from_dict({**raw, "rope_scaling": YARN, **beside}).yarn
    assert yarn is not None and yarn.original_max_position_embeddings == 4096
    both = {**raw, "dtype": "float16", "torch_dtype": "bfloat16"}
    assert Qwen2Config.from_dict(both).dtype == "fp16"


def yarn_frequencies(yarn: YarnScaling, *, base: float, width: int) -> list[float]:
    """Inverse frequencies from the paper's section 3.2, pair by pair."""

    def dimension(rotations: float) -> float:
        turns = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return width * math.log(turns) / (2 * math.log(base))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    found = []
    for pair in range(width // 2):
        plain = base ** (-2 * pair / width)
        interpolated = min(max((pair - low) / (high - low), 0.0), 1.0)
        found.append(plain / yarn.factor * interpolated + plain * (1 - interpolated))
    return found


def test_yarn_is_written_back_as_it_was_read() -> None:
    raw = {**PUBLISHED["Qwen2.5-7B-Instruct with YaRN"]}
    config = Qwen2Config.from_dict(raw)
    assert Qwen2Config.from_dict(config.to_hugging_face()) == config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    before = Qwen2RotaryEmbedding(transformers_config(raw))
    after = Qwen2RotaryEmbedding(transformers_config(config.to_hugging_face()))
    assert before.inv_freq.tolist() == after.inv_freq.tolist()
    assert before.attention_scaling == after.attention_scaling


# --- refusals -------------------------------------------------------------------------------------

TINY = published(2, 64, 96, 4, 2, 128)
REFUSED = {
    "model type": ({"model_type": "llama"}, "model_type='llama' is not \"qwen2\""),
    "no model type": ({"model_type": None}, "model_type=None"),
    "Qwen2-MoE": ({"model_type": "qwen2_moe"}, "dense models only"),
    "no size": ({"hidden_size": None}, "hidden_size=None must be a whole number"),
    "size as text": ({"vocab_size": "128"}, "vocab_size='128' must be a whole number"),
    "size as bool": ({"vocab_size": True}, "vocab_size=True must be a"),
    "no layers": ({"num_hidden_layers": 0}, "num_layers=0 must be a positive whole number"),
    "negative": ({"intermediate_size": -1}, "ffn_hidden_size=-1 must be a positive whole number"),
    "groups": ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple"),
    "heads": ({"num_attention_heads": 5}, "hidden_size=64 is not a multiple"),
    "odd head": ({"head_dim": 7}, r"kv_channels=7 \(head width\) is odd"),
    "epsilon": ({"rms_norm_eps": 0.0}, "norm_epsilon=0.0 must be above zero"),
    "theta": ({"rope_theta": 1.0}, "rotary_base=1.0 must be above one"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act='gelu' is not \"silu\""),
    "dtype": ({"torch_dtype": "float64"}, "torch_dtype='float64' is not one of bfloat16"),
    "quantized": ({"quantization_config": {"bits": 4}}, "the checkpoint is quantized"),
    "sliding window": (
        {"use_sliding_window": True, "max_window_layers": 1},
        r"sliding window attention is in use on 1 layer\(s\) \(sliding_window=32768\)",
    ),
    "sliding layers": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        r"sliding window attention is in use on 1 layer\(s\)",
    ),
    "linear rope": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope scaling type 'linear' is not implemented",
    ),
    "dynamic rope": (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}},
        "rope scaling type 'dynamic' is not implemented",
    ),
    "yarn without factor": ({"rope_scaling": {"type": "yarn"}}, "factor=None must be a number"),
    "yarn that shrinks": (
        {"rope_scaling": {"type": "yarn", "factor": 0.5}},
        "factor=0.5 must be a number >= 1",
    ),
    "yarn with mscale": (
        {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0}},
        "mscale and mscale_all_dim are not implemented",
    ),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "partial rotary, 5": (
        {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.25}},
        "partial_rotary_factor=0.25",
    ),
    "rope per layer type": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}}},
        "rope_parameters differ by layer type",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_implemented_is_refused_with_the_reason(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        Qwen2Config.from_dict({**TINY, **changes})


def test_faults_are_named_at_once() -> None:
    changes = {"hidden_act": "gelu", "torch_dtype": "int8", "use_sliding_window": True}
    with pytest.raises(UserError) as caught:
        Qwen2Config.from_dict({**TINY, **changes, "max_window_layers": 0})
    assert len(caught.value.faults) == 3


@pytest.mark.parametrize(
    ("changes", "uses_it"),
    [
        ({"use_sliding_window": True, "max_window_layers": 2}, False),
        ({"use_sliding_window": True, "max_window_layers": 5}, False),
        ({"use_sliding_window": True, "max_window_layers": 1, "sliding_window": None}, False),
        ({"use_sliding_window": False, "max_window_layers": 0}, False),
        ({"layer_types": ["full_attention"] * 2, "use_sliding_window": True}, False),
        ({"use_sliding_window": True, "max_window_layers": 0}, True),
    ],
)
def test_a_sliding_window_counts_where_transformers_uses_it(changes, uses_it: bool) -> None:
    raw = {**TINY, **changes}
    assert ("sliding_attention" in transformers_config(raw).layer_types) == uses_it
    if uses_it:
        with pytest.raises(UserError, match="sliding window"):
            Qwen2Config.from_dict(raw)
    else:
        Qwen2Config.from_dict(raw)


def test_an_unsaid_window_has_transformers_default_size() -> None:
    raw = {**TINY, "use_sliding_window": True, "max_window_layers": 1}
    del raw["sliding_window"]
    assert "sliding_attention" in transformers_config(raw).layer_types
    with pytest.raises(UserError, match="sliding window"):
        Qwen2Config.from_dict(raw)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, r"config\.json: no such file; give a Hugging Face model folder"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[1]", "holds list, not a JSON object"),
        (b"[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_files_that_are_no_config_are_refused(data, message, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(UserError, match=message):
        Qwen2Config.from_pretrained(tmp_path)


def test_a_folder_and_its_file_are_read_alike_and_faults_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    assert Qwen2Config.from_pretrained(tmp_path) == Qwen2Config.from_pretrained(path)
    path.write_text(json.dumps({**TINY, "hidden_act": "gelu", "torch_dtype": "int8"}))
    with pytest.raises(UserError) as caught:
        Qwen2Config.from_pretrained(tmp_path)
    assert [fault.startswith(f"{path}: ") for fault in caught.value.faults] == [True, True]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"config\.json: is a FIFO, not a regular file"):
        Qwen2Config.from_pretrained(tmp_path)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=4,
)
KEYS = [*TINY, "head_dim", "layer_types", "rope_parameters", "rope_scaling", "dtype"]
ROPE = st.fixed_dictionaries(
    {},
    optional={
        key: JSON_VALUES | st.just("yarn")
        for key in ("rope_type", "type", "factor", "rope_theta", "attention_factor", "beta_fast",
                    "beta_slow", "original_max_position_embeddings", "truncate")
    },
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(KEYS), JSON_VALUES | ROPE, max_size=3))
def test_any_json_is_read_or_refused(changes: dict[str, Any]) -> None:
    """Property: whatever stands in a config.json, the answer is a config or a UserError."""
    try:
        config = Qwen2Config.from_dict({**TINY, **changes})
    except UserError as error:
        assert all(error.faults)
    else:
        assert num_parameters(config) > 0
        json.dumps(config.to_hugging_face(), allow_nan=False)


@given(
    groups=st.integers(1, 4),
    per_group=st.integers(1, 4),
    kv_channels=st.integers(1, 8).map(lambda n: 2 * n),
    tied=st.booleans(),
    dtype=st.sampled_from(list(DTYPES.values())),
    factor=st.none() | st.floats(1.0, 8.0),
)
def test_what_is_written_is_read_back(groups, per_group, kv_channels, tied, dtype, factor) -> None:
    yarn = None
    if factor is not None:
        attention_factor = 0.1 * math.log(factor) + 1
        yarn = YarnScaling(
            factor=factor, original_max_position_embeddings=64, attention_factor=attention_factor
        )
    config = tiny_config(
        num_query_groups=groups,
        num_attention_heads=groups * per_group,
        kv_channels=kv_channels,
        tie_word_embeddings=tied,
        dtype=dtype,
        yarn=yarn,
    )
    written = json.loads(json.dumps(config.to_hugging_face()))
    assert Qwen2Config.from_dict(written) == config


def test_heads_wider_than_their_share_are_allowed() -> None:
    """head_dim is its own key; hidden_size / num_attention_heads is only its default."""
    config = Qwen2Config.from_dict({**TINY, "head_dim": 32})
    assert config.kv_channels == 32
    assert config.heads_per_group == 2
