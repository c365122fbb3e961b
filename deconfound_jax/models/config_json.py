"""Hugging Face's config.json <-> `config.Decoder`, by the tables of `models.families`.

    family, decoder = read_config(json.loads(text))
    record = write_config("qwen3", decoder)  # what transformers reads as the same model

A value that would change the model and is not supported is refused by its field's name; a field that a file leaves
out has transformers' default. What is written is read back and compared, so a decoder that a family cannot hold is
refused, not bent. Both styles of rotary fields are read (`rope_theta` and `rope_scaling`; `rope_parameters`, since
transformers 5); the first is written, which every version reads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from deconfound_jax.config import Decoder
from deconfound_jax.models.decoder import check, local_layers
from deconfound_jax.models.families import FAMILIES, Family
from deconfound_jax.models.layers import head_width

_ACTIVATIONS = {
    **{"silu": "silu", "swish": "silu", "gelu": "gelu"},
    **{"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"},  # the same formula twice
}
_WRITTEN = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_NULLABLE = ("kv_heads", "head_width", "inner", "attention_cap", "logit_cap")  # null: from the others, or no cap
_KINDS = {int: "an integer above zero", float: "a number above zero", bool: "true or false", str: "a name"}
_BASE, _GEMMA3_BASE = 10_000.0, 1_000_000.0  # of global layers, where a file is silent
_RUN_TIME = ("dtype", "remat", "chunk", "attention")  # Decoder's fields that are no part of the model


def read_config(record: Mapping[str, Any]) -> tuple[str, Decoder]:
    """A config.json -> (its family, the decoder it describes).

    Raises ValueError naming the field, what was expected and what was found.

        read_config({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257,
                     "n_positions": 1024})[1].width
        768
    """
    if record.get("quantization_config"):
        raise _wrong("quantization_config", "none: the weights as numbers", record["quantization_config"])
    if record.get("model_type") == "gemma3":  # with images: its text model
        record = {"model_type": "gemma3_text", **_object(record, "text_config", null=False)}
    name = record.get("model_type")
    family = _family(name)
    for field, value in family.only.items():
        found = record.get(field)
        if found is not None and found != value and (found or value):  # false and null are one
            raise _wrong(field, repr(value), found)
    values = {**family.fixed, **{field: _value(family, record, field) for field in family.fields}}
    if "bias" in family.fields and values["bias"] != values["qkv_bias"]:
        raise _wrong(family.fields["bias"], f"{values['qkv_bias']}, {family.fields['qkv_bias']}'s", values["bias"])
    if "query_scale" in values:
        values["query_scale"] **= -0.5
    if family.fixed.get("norm_plus_one"):  # both are Gemma's
        values["embedding_scale"] = math.sqrt(values["width"])
    if values.get("positions") == "rotary":
        values |= _rotary(family, record, values["length"])
    decoder = check(Decoder(**values, forbidden=()))
    if decoder.positions == "rotary" and head_width(decoder) % 2:
        raise _wrong("head_dim", "an even number, as rotary positions turn pairs", head_width(decoder))
    full = {"head_width": head_width(decoder), "kv_heads": decoder.kv_heads or decoder.heads}
    full["inner"] = decoder.inner or 4 * decoder.width
    return name, _with_window(family, record, dataclasses.replace(decoder, **full))


def write_config(family: str, decoder: Decoder) -> dict[str, Any]:
    """The config.json that transformers reads as this decoder; tokens' ids and the dtype are the caller's.

    Raises ValueError naming the first field of the decoder that the family cannot hold.
    """
    row = _family(family)
    record: dict[str, Any] = {"model_type": family, "architectures": [row.causal]}
    full = _meaning(decoder)
    for field, name in row.fields.items():
        value = full[field]
        if field == "activation":
            value = _WRITTEN[value]
        elif field == "query_scale":
            value = round(value**-2)
        record[name] = value if value != 0 or isinstance(value, bool) else None
    if "positions" in row.fixed:
        record |= _rotary_record(row, decoder)
    if row.window != "none":
        record |= _window_record(row, decoder)
    read = _meaning(read_config(record)[1])
    for field, value in full.items():
        if read[field] != value:
            raise ValueError(f"Decoder.{field}: expected {read[field]!r}, all that {family!r} can hold, got {value!r}")
    return record


def _family(name: Any) -> Family:
    if not isinstance(name, str) or name not in FAMILIES:
        raise _wrong("model_type", f"one of {', '.join(sorted(FAMILIES))}, gemma3", name)
    return FAMILIES[name]


def _value(family: Family, record: Mapping[str, Any], field: str) -> Any:
    """A field of the decoder; 0 for null."""
    name, kind = family.fields[field], type(getattr(Decoder(), field))
    if name not in record and name not in family.defaults:
        raise _wrong(name, f"{_KINDS[kind]}, as it has no default", None)
    value = record[name] if name in record else family.defaults[name]
    if value is None and field in _NULLABLE and name in family.defaults:
        return kind(0)
    if field == "activation":
        if not isinstance(value, str) or value not in _ACTIVATIONS:
            raise _wrong(name, f"one of {', '.join(_ACTIVATIONS)}", value)
        return _ACTIVATIONS[value]
    return _checked(name, kind, value)


def _checked(name: str, kind: type, value: Any) -> Any:
    """The value as the kind, numbers above zero; ValueError for another."""
    number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not (isinstance(value, bool) if kind is bool else number and 0 < value < math.inf):
        raise _wrong(name, _KINDS[kind], value)
    return kind(value)


def _first(name: str, default: float, *places: Mapping[str, Any]) -> float:
    """The number of that name in the first of the objects that has one."""
    return _checked(name, float, next((of[name] for of in places if of.get(name) is not None), default))


def _object(record: Mapping[str, Any], name: str, null: bool = True) -> Mapping[str, Any]:
    """A field that holds fields; empty where there is none."""
    found = record.get(name, {})
    if found is None and null:
        return {}
    if not isinstance(found, Mapping):
        raise _wrong(name, "an object", found)
    return found


def _rotary(family: Family, record: Mapping[str, Any], length: int) -> dict[str, Any]:
    given, scaling = _object(record, "rope_parameters"), _object(record, "rope_scaling")
    if not family.two_bases:
        of = dict(scaling or given)
        if _GLOBAL in of or _LOCAL in of:
            raise _wrong("rope_parameters", "one set of fields for all layers", of)
        base = _first("rope_theta", _BASE, of, record)
        return {"rotary_base": base, "rotary_scaling": _scaling(of, record, length)}
    if given and not {_GLOBAL, _LOCAL} & given.keys():
        raise _wrong("rope_parameters", f"fields under {_GLOBAL} and {_LOCAL}", given)
    of, local = {**_object(given, _GLOBAL), **scaling}, _object(given, _LOCAL)
    if _scaling(local, record, length):
        raise _wrong(f"rope_parameters.{_LOCAL}.rope_type", "default", local.get("rope_type"))
    return {
        "rotary_base": _first("rope_theta", _GEMMA3_BASE, of, record),
        "rotary_scaling": _scaling(of, record, length),
        "local_base": _first("rope_theta", _first("rope_local_base_freq", _BASE, record), local),
    }


def _scaling(of: Mapping[str, Any], record: Mapping[str, Any], length: int) -> tuple[float, ...]:
    if (share := _first("partial_rotary_factor", 1.0, of, record)) != 1.0:
        raise _wrong("partial_rotary_factor", "1.0", share)
    kind = of.get("rope_type") or of.get("type") or "default"
    names = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    if not isinstance(kind, str) or kind not in names:
        raise _wrong("rope_scaling.rope_type", "one of default, linear, llama3", kind)
    numbers = tuple(_checked(f"rope_scaling.{name}", float, of.get(name)) for name in names[kind])
    return (*numbers, _first("original_max_position_embeddings", length, of)) if kind == "llama3" else numbers


def _with_window(family: Family, record: Mapping[str, Any], decoder: Decoder) -> Decoder:
    if family.window == "none":
        return decoder
    width = record.get("sliding_window", family.defaults["sliding_window"])
    if family.window == "upper" and not _checked("use_sliding_window", bool, record.get("use_sliding_window", False)):
        width = None
    first = record.get("max_window_layers", family.defaults.get("max_window_layers", 0))
    if type(first) is not int:
        raise _wrong("max_window_layers", "an integer", first)
    pattern = record.get("sliding_window_pattern", family.pattern)
    every = family.pattern and _checked("sliding_window_pattern", int, pattern)
    local = [(i + 1) % every != 0 if every else bool(width) and i >= first for i in range(decoder.layers)]
    types = record.get("layer_types")
    if types is not None:
        known = isinstance(types, list) and all(kind in (_LOCAL, _GLOBAL) for kind in types)
        if not known or len(types) != decoder.layers:
            raise _wrong("layer_types", f"{_LOCAL} or {_GLOBAL} for each of {decoder.layers} layers", types)
        local = [kind == _LOCAL for kind in types]
    if not any(local):
        return dataclasses.replace(decoder, local_base=0.0)
    if type(width) is not int or width < 1:
        raise _wrong("sliding_window", "a number of tokens, as there are layers of sliding_attention", width)
    for every in (0, *range(2, decoder.layers + 1)):
        found = dataclasses.replace(decoder, window=width, global_every=every)
        if local_layers(found).tolist() == local:
            return found
    shown = "".join("l" if one else "g" for one in local)
    raise _wrong("layer_types", "every n-th layer to be global or none", f"{shown} (l local, g global)")


def _rotary_record(family: Family, decoder: Decoder) -> dict[str, Any]:
    record: dict[str, Any] = {"rope_theta": decoder.rotary_base, "rope_scaling": None}
    if family.two_bases:
        record["rope_local_base_freq"] = decoder.local_base or decoder.rotary_base
    if len(decoder.rotary_scaling) == 1:
        record["rope_scaling"] = {"rope_type": "linear", "factor": decoder.rotary_scaling[0]}
    if len(decoder.rotary_scaling) == 4:
        factor, low, high, length = decoder.rotary_scaling
        numbers = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
        record["rope_scaling"] = {
            "rope_type": "llama3", **numbers, "original_max_position_embeddings": round(length)
        }  # fmt: skip
    return record


def _window_record(family: Family, decoder: Decoder) -> dict[str, Any]:
    local = local_layers(decoder)
    record: dict[str, Any] = {"sliding_window": decoder.window if local.any() else None}
    if family.window != "every":
        record["layer_types"] = [_LOCAL if one else _GLOBAL for one in local]
    if family.window == "upper":
        record["use_sliding_window"] = bool(local.any())
        record["max_window_layers"] = 0 if local.any() else decoder.layers
    if family.two_bases:  # what versions before 4.53 read in place of layer_types
        record["sliding_window_pattern"] = decoder.global_every or decoder.layers + 1
    return record


def _meaning(decoder: Decoder) -> dict[str, Any]:
    """The decoder's fields, each default filled in and each that changes nothing put to zero: equal if models are."""
    c = decoder
    local, rotary = local_layers(c), c.positions == "rotary"
    full = {field.name: getattr(c, field.name) for field in dataclasses.fields(c) if field.name not in _RUN_TIME}
    full |= {"kv_heads": c.kv_heads or c.heads, "head_width": head_width(c), "inner": c.inner or 4 * c.width}
    full |= {"query_scale": c.query_scale or head_width(c) ** -0.5, "forbidden": tuple(c.forbidden)}
    full |= {"window": c.window if local.any() else 0, "global_every": local.tolist() if local.any() else []}
    own = rotary and local.any() and c.local_base
    full["local_base"] = c.local_base if own and (c.local_base != c.rotary_base or c.rotary_scaling) else 0.0
    if not rotary:
        full |= {"rotary_base": 0.0, "rotary_scaling": ()}
    if c.norm != "rms" and not c.qk_norm:
        full["norm_plus_one"] = False
    return full


def _wrong(field: str, expected: str, found: Any) -> ValueError:
    return ValueError(f"config.json: {field}: expected {expected}, found {found!r}")
