"""Published families as data: one row each for what config.json and the tensors are called.

`models.config_json` reads and writes the first by these tables, `models.pretrained` and `models.export` the second.
A new family whose features `config.Decoder` has is one more row here and one more fixture.

Source: the configuration classes and modules of transformers 4.45 to 5.23.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple


@dataclasses.dataclass(frozen=True)
class Family:
    """One model_type: its classes, its config.json and its tensors' names."""

    causal: str  # transformers' class of the language model
    classifier: str  # and of the sequence classifier
    fields: Mapping[str, str]  # Decoder's field -> config.json's
    defaults: Mapping[str, Any]  # config.json's fields that a file may leave out; None: follows from the others
    only: Mapping[str, Any]  # fields of which one value is supported; also a default
    fixed: Mapping[str, Any]  # Decoder's fields that all of the family share
    modules: Mapping[str, str]  # our module -> theirs, {} for the layer, [i/n] for the i-th of n column blocks
    transposed: bool = True  # kernels lie (out, in), torch's order
    window: Literal["none", "every", "upper", "pattern"] = "none"  # which layers are local where no list says it
    pattern: int = 0  # every so many-th layer is global
    two_bases: bool = False  # rotary base of its own for local layers
    ignored: str = "$^"  # pattern of tensors' names that are buffers, or of another modality


class Place(NamedTuple):
    """Where a leaf of a layer lies in a checkpoint: one of `parts` equal blocks of columns of a tensor."""

    name: str  # with {} for the layer
    transposed: bool
    part: int = 0
    parts: int = 1


SCORE = "score.weight"  # a sequence classifier's head, (labels, width)
_BLOCK = re.compile(r"(.*?)(?:\[(\d)/(\d)\])?")
_FIELDS = {
    **{"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"},
    **{"kv_heads": "num_key_value_heads", "head_width": "head_dim", "inner": "intermediate_size"},
    **{"vocabulary": "vocab_size", "length": "max_position_embeddings", "norm_epsilon": "rms_norm_eps"},
    **{"activation": "hidden_act", "tied": "tie_word_embeddings"},
}
_CAPS = {"logit_cap": "final_logit_softcapping", "query_scale": "query_pre_attn_scalar"}
_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "head_dim": None}
_GEMMA = {
    **{"hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
    **{"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096},
}
_ROTARY = {"norm": "rms", "positions": "rotary", "gated": True, "bias": False, "qkv_bias": False}
_MODULES = {
    **{"embed_tokens": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"},
    **{name: f"model.layers.{{}}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{name: f"model.layers.{{}}.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
    **{name: f"model.layers.{{}}.self_attn.{name}" for name in ("q_norm", "k_norm")},
    "attention_norm": "model.layers.{}.input_layernorm",
}
_TWO_NORMS = {**_MODULES, "mlp_norm": "model.layers.{}.post_attention_layernorm"}
_FOUR_NORMS = {
    **_MODULES,
    "attention_out_norm": "model.layers.{}.post_attention_layernorm",
    "mlp_norm": "model.layers.{}.pre_feedforward_layernorm",
    "mlp_out_norm": "model.layers.{}.post_feedforward_layernorm",
}
_BUFFERS = r"\.rotary_emb\.inv_freq$"

FAMILIES = {
    "gpt2": Family(
        causal="GPT2LMHeadModel",
        classifier="GPT2ForSequenceClassification",
        fields={
            **{"width": "n_embd", "layers": "n_layer", "heads": "n_head", "inner": "n_inner"},
            **{"vocabulary": "vocab_size", "length": "n_positions", "norm_epsilon": "layer_norm_epsilon"},
            **{"activation": "activation_function", "tied": "tie_word_embeddings"},
        },
        defaults={
            **{"n_inner": None, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"},
            "tie_word_embeddings": True,
        },
        only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        fixed={},
        modules={
            **{"embed_tokens": "transformer.wte", "positions": "transformer.wpe", "norm": "transformer.ln_f"},
            **{"lm_head": "lm_head", "o_proj": "transformer.h.{}.attn.c_proj"},
            **{f"{name}_proj": f"transformer.h.{{}}.attn.c_attn[{i}/3]" for i, name in enumerate("qkv")},
            **{"up_proj": "transformer.h.{}.mlp.c_fc", "down_proj": "transformer.h.{}.mlp.c_proj"},
            **{"attention_norm": "transformer.h.{}.ln_1", "mlp_norm": "transformer.h.{}.ln_2"},
        },
        transposed=False,
        ignored=r"\.attn\.(masked_)?bias$",
    ),
    "llama": Family(
        causal="LlamaForCausalLM",
        classifier="LlamaForSequenceClassification",
        fields={**_FIELDS, "qkv_bias": "attention_bias", "bias": "mlp_bias"},
        defaults={**_DEFAULTS, "num_key_value_heads": None, "attention_bias": False, "mlp_bias": False},
        only={},
        fixed=_ROTARY,
        modules=_TWO_NORMS,
        ignored=_BUFFERS,
    ),
    "mistral": Family(
        causal="MistralForCausalLM",
        classifier="MistralForSequenceClassification",
        fields=_FIELDS,
        defaults={**_DEFAULTS, "num_key_value_heads": 8, "sliding_window": 4096},
        only={"layer_types": None},
        fixed=_ROTARY,
        modules=_TWO_NORMS,
        window="every",
        ignored=_BUFFERS,
    ),
    "qwen2": Family(
        causal="Qwen2ForCausalLM",
        classifier="Qwen2ForSequenceClassification",
        fields=_FIELDS,
        defaults={**_DEFAULTS, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
        only={},
        fixed={**_ROTARY, "qkv_bias": True},
        modules=_TWO_NORMS,
        window="upper",
        ignored=_BUFFERS,
    ),
    "qwen3": Family(
        causal="Qwen3ForCausalLM",
        classifier="Qwen3ForSequenceClassification",
        fields=_FIELDS,
        defaults={
            **_DEFAULTS,
            **{"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
        },
        only={"attention_bias": False},
        fixed={**_ROTARY, "qk_norm": True},
        modules=_TWO_NORMS,
        window="upper",
    ),
    "gemma2": Family(
        causal="Gemma2ForCausalLM",
        classifier="Gemma2ForSequenceClassification",
        fields={**_FIELDS, **_CAPS, "activation": "hidden_activation", "attention_cap": "attn_logit_softcapping"},
        defaults={**_GEMMA, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "num_key_value_heads": 4},
        only={"attention_bias": False, "use_bidirectional_attention": None},
        fixed={**_ROTARY, "norm_plus_one": True, "norm_after": True},
        modules=_FOUR_NORMS,
        window="pattern",
        pattern=2,
    ),
    "gemma3_text": Family(
        causal="Gemma3ForCausalLM",
        classifier="Gemma3TextForSequenceClassification",
        fields={**_FIELDS, **_CAPS, "activation": "hidden_activation"},
        # The multimodal checkpoints' files leave even sizes out.
        defaults={
            **{**_GEMMA, "final_logit_softcapping": None, "max_position_embeddings": 131_072},
            **{"vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4},
        },
        only={"attention_bias": False, "use_bidirectional_attention": None, "attn_logit_softcapping": None},
        fixed={**_ROTARY, "norm_plus_one": True, "norm_after": True, "qk_norm": True},
        modules=_FOUR_NORMS,
        window="pattern",
        pattern=6,
        two_bases=True,
        ignored=r"^(model\.)?(vision_tower|multi_modal_projector)\.",
    ),
}


def place(family: str, path: tuple[str, ...]) -> Place:
    """Where the leaf at a path of the parameter tree, ("layers", "q_proj", "kernel"), lies in a checkpoint.

    Raises KeyError for a module that the family has not.
    """
    row, leaf = FAMILIES[family], path[-1]
    module = leaf if leaf in row.modules else path[-2]  # lm_head and positions are leaves themselves
    name, part, parts = _BLOCK.fullmatch(row.modules[module]).groups()
    suffix = "bias" if leaf == "bias" else "weight"
    transposed = leaf == "lm_head" or (leaf == "kernel" and row.transposed)
    return Place(f"{name}.{suffix}", transposed, int(part or 0), int(parts or 1))


def canonical_name(family: str, name: str) -> str | None:
    """A tensor's name as the language model's own checkpoint has it; None for one that the model does not read.

    Checkpoints of the bare base model lack its prefix, those of Gemma 3 with images have a longer one.
    """
    row = FAMILIES[family]
    if re.search(row.ignored, name):
        return None
    name = re.sub(r"^(model\.language_model|language_model\.model)\.", "model.", name)
    name = name.removeprefix("language_model.")
    prefix = row.modules["norm"].partition(".")[0]
    return name if name.partition(".")[0] in (prefix, "lm_head", SCORE.partition(".")[0]) else f"{prefix}.{name}"
