"""Our decoder beside transformers' on the same folder: logits and greedy text of twenty prompts.

    python -m experiments.lm_parity '{"job": "parity", "folder": "...", "new_tokens": 16}'

Runs where torch and transformers are (`make peers`); the folder has safetensors and tokenizer.json.
"""

from __future__ import annotations

import json
import sys

import jax
import numpy as np

from deconfound_jax.models.language_model import load_language_model
from deconfound_jax.models.sample import generate
from deconfound_jax.models.tokenizer import PAD

PROMPTS = (
    "Write a headline about the sea.",
    "What is the capital of France?",
    "Name three fruits.",
    "Say hello in Spanish.",
    "Why is the sky blue?",
    "Give a title for a story about a lost dog.",
    "Translate 'good night' to German.",
    "What comes after Tuesday?",
    "Explain what a vote is in one sentence.",
    "List two colours.",
    "How many legs has a spider?",
    "Finish: Once upon a time",
    "Is ice colder than steam?",
    "Which planet is the largest?",
    "Write a slogan for a bakery.",
    "What do bees make?",
    "Give a synonym of 'quick'.",
    "Who wrote Hamlet?",
    "Add 12 and 30.",
    "Describe rain in five words.",
)


def parity(folder: str, new_tokens: int) -> dict[str, float]:
    """Largest difference of a logit at any token, and how many greedy continuations agree token by token."""
    import torch
    from transformers import AutoModelForCausalLM

    lm = load_language_model(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = [lm.tokenizer.chat([{"role": "user", "content": prompt}]) if lm.tokenizer.chat_template else prompt
             for prompt in PROMPTS]  # fmt: skip
    length = 1 + max(len(row[row != PAD]) for row in lm.tokenizer.encode(texts, 256, add_eos=False, marks=True))
    tokens_bl = lm.tokenizer.encode(texts, length, add_eos=False, marks=True)
    logits_blv = np.asarray(jax.jit(lambda p, t: lm.decoder.apply(p, t)[0])(lm.params, tokens_bl))
    greedy = jax.jit(lambda p, t: generate(lm.decoder, p, jax.random.key(0), t, new_tokens, temperature=0.0, stop=()))
    drawn_bt = np.asarray(greedy(lm.params, tokens_bl).tokens[:, 0])
    worst, size, same = 0.0, 0.0, 0
    for row, logits_lv, drawn_t in zip(tokens_bl, logits_blv, drawn_bt, strict=True):
        ids = torch.tensor(row[row != PAD].astype(np.int64))[None]
        with torch.no_grad():
            expected_lv = theirs(ids).logits[0].numpy()
            found = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                                    max_new_tokens=new_tokens, min_new_tokens=new_tokens, repetition_penalty=1.0,
                                    eos_token_id=None)  # fmt: skip
        worst = max(worst, float(np.abs(logits_lv[: len(expected_lv)] - expected_lv).max()))
        size = max(size, float(np.abs(expected_lv).max()))
        same += found[0, ids.shape[1] :].tolist() == drawn_t.tolist()
    return {"prompts": len(PROMPTS), "largest_logit": size, "largest_difference": worst, "greedy_equal": same}


def main() -> None:
    """Runs with the one argument's options and prints the result as JSON."""
    arguments = json.loads(sys.argv[1])
    arguments.pop("job")  # `bench_jobs.in_child` names one
    print(json.dumps(parity(**arguments)))


if __name__ == "__main__":
    main()
