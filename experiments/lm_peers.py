"""The peers' side of the language model benchmark: the same weights, token rows and precision in torch.

    python -m experiments.lm_peers '{"job": "dpo_torch", "folder": "...", "rows": "rows.npz", "steps": 3}'

`folder` holds safetensors that `transformers` loads; `rows.npz` holds prompt (b, p), chosen and rejected (b, c), every
row full: no padding on either side. Needs torch, transformers, trl (`make peers`).
"""

from __future__ import annotations

import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.bench_jobs import WARM_STEPS, median_seconds, peak_gb

LEARNING_RATE, BETA = 1e-5, 0.1


def dpo_trl(folder: str, rows: dict[str, np.ndarray], steps: int, **options: Any) -> dict[str, float]:
    """TRL's DPOTrainer; options are DPOConfig's (`gradient_checkpointing`, `precompute_ref_log_probs`)."""
    from trl import DPOConfig, DPOTrainer

    class OnTokens(DPOTrainer):
        """Takes rows of ids as they are."""

        def _prepare_dataset(self, dataset, *_):
            return dataset

    columns = {"prompt_ids": rows["prompt"], "chosen_ids": rows["chosen"], "rejected_ids": rows["rejected"]}
    arguments = DPOConfig(beta=BETA, **_arguments(len(rows["prompt"]), steps), **options)
    trainer = OnTokens(
        _model(folder), args=arguments, train_dataset=_repeated(columns, steps), processing_class=_tokenizer()
    )
    return _train(trainer)


def sft_trl(folder: str, rows: dict[str, np.ndarray], steps: int, **options: Any) -> dict[str, float]:
    """TRL's SFTTrainer on prompt and chosen text as one row; options are SFTConfig's."""
    from trl import SFTConfig, SFTTrainer

    tokens = np.concatenate([rows["prompt"], rows["chosen"]], 1)
    arguments = SFTConfig(**_arguments(len(tokens), steps), dataset_kwargs={"skip_prepare_dataset": True}, **options)
    data = _repeated({"input_ids": tokens, "labels": tokens}, steps)
    trainer = SFTTrainer(_model(folder), args=arguments, train_dataset=data, processing_class=_tokenizer())
    return _train(trainer)


def dpo_torch(folder: str, rows: dict[str, np.ndarray], steps: int) -> dict[str, float]:
    """A plain loop: nothing recomputed, the reference's log-probabilities known."""
    import torch

    model = _model(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    prompt, *answers = (torch.tensor(rows[name]) for name in ("prompt", "chosen", "rejected"))
    tokens = torch.cat([torch.cat([prompt, answer], 1) for answer in answers])
    begin, half = prompt.shape[1] - 1, len(prompt)

    def log_prob():
        logits = model(tokens[:, :-1], logits_to_keep=tokens.shape[1] - 1 - begin, use_cache=False).logits
        picked = torch.log_softmax(logits, -1).gather(-1, tokens[:, begin + 1 :, None])[..., 0]
        return picked.sum(-1)

    with torch.no_grad():
        reference = log_prob()

    def step():
        ratio = log_prob() - reference
        loss = -torch.nn.functional.logsigmoid(BETA * (ratio[:half] - ratio[half:])).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # as TRL and our side do
        optimizer.step()
        optimizer.zero_grad()

    return median_seconds(step, steps)


def generate(folder: str, rows: dict[str, np.ndarray], steps: int, samples: int, new_tokens: int) -> dict[str, float]:
    """`generate` of transformers: samples of one prompt, each of `new_tokens`."""
    import torch

    model, prompt = _model(folder).eval(), torch.tensor(rows["prompt"][:1])

    def sample():
        found = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            num_return_sequences=samples, max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0,
        )  # fmt: skip
        assert found.shape == (samples, prompt.shape[1] + new_tokens)

    return median_seconds(sample, steps)


JOBS: dict[str, Callable[..., dict[str, float]]] = {
    "dpo_trl": dpo_trl, "sft_trl": sft_trl, "dpo_torch": dpo_torch, "generate": generate,
}  # fmt: skip


def _model(folder: str):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _tokenizer():
    """A trainer asks for one, though rows come as ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[pad]": 0, "[end]": 1, "[unk]": 2}, unk_token="[unk]"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[pad]", eos_token="[end]", unk_token="[unk]")


def _arguments(batch: int, steps: int) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": batch, "max_steps": steps + WARM_STEPS,
        "learning_rate": LEARNING_RATE, "bf16": False, "use_cpu": True, "report_to": [], "save_strategy": "no",
        "logging_strategy": "no", "disable_tqdm": True, "seed": 0,
    }  # fmt: skip


def _repeated(columns: dict[str, np.ndarray], steps: int):
    from datasets import Dataset

    return Dataset.from_dict({name: np.tile(a, (steps + WARM_STEPS, 1)).tolist() for name, a in columns.items()})


def _train(trainer) -> dict[str, float]:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.ends = []

        def on_step_end(self, *_, **__):
            self.ends.append(time.perf_counter())

    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    times = np.diff(clock.ends)[WARM_STEPS - 1 :]
    return {"seconds": float(statistics.median(times)), "steps": len(times)}


def main() -> None:
    """Runs the job that the one argument names and prints its result as JSON."""
    arguments = json.loads(sys.argv[1])
    job, folder, rows = (arguments.pop(name) for name in ("job", "folder", "rows"))
    if job not in JOBS:
        raise ValueError(f"lm_peers: expected a job of {sorted(JOBS)}, got {job!r}")
    with np.load(pathlib.Path(rows), allow_pickle=False) as data:
        found = JOBS[job](folder, dict(data), **arguments)
    print(json.dumps(found | {"peak_gb": peak_gb()}))


if __name__ == "__main__":
    main()
