"""The core at work where no file format, no log reader and no command line is installed."""

from tests.test_layers import ABSENT, run_python

SCRIPT = (
    f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"{{name}} is absent here", name=name)
sys.meta_path.insert(0, Absent())
"""
    + """
import tempfile
import jax, numpy as np
from deconfound_jax.causal.fit import fit
from deconfound_jax.causal.reward import model_form
from deconfound_jax.config import Align, Causal, Decoder as Config, Dpo, Sft
from deconfound_jax.models import tokenizer
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.lora import init_lora, merge_lora
from deconfound_jax.models.sample import generate
from deconfound_jax.recipes.preference import align_dpo, dpo_stage
from deconfound_jax.recipes.texts import Texts
from deconfound_jax.recipes.reference import sft_stage, train_reference
from deconfound_jax.recipes.stage import Record
from deconfound_jax.structs import Logs, Roles

rng = np.random.default_rng(0)
words = tokenizer.closed([f"w{i}" for i in range(12)])
texts = np.asarray([" ".join(f"w{i}" for i in rng.integers(12, size=3)) for _ in range(80)], object)
features_nd = np.stack([[t.count(f"w{i}") for i in (1, 2)] for t in texts]).astype(float)
c_n = rng.normal(size=80) + features_nd[:, 0]
columns = {"text": texts, "y": features_nd[:, 0] + c_n + 0.1 * rng.normal(size=80), "c": c_n}
logs = Logs.of(columns, Roles(text="text", outcome="y", confounders=("c",)))
posterior = fit(logs, features_nd, Causal(design="linear(c)", draws=64))
reward = model_form(posterior, features_nd)
decoder = Decoder(Config(width=8, layers=1, heads=2, length=8), words.size)
tokens_nl = words.encode(list(texts), 8)
sft, dpo = Sft(steps=2, batch=16), Dpo(steps=2, groups=4, group_size=2)
record = Record(tempfile.mkdtemp(), "core", 0)
reference = train_reference(decoder, sft_stage(decoder, sft), tokens_nl, sft, 0, record)
risky = Align(accept_risk=True, equal_texts="drop")
policy = align_dpo(decoder, dpo_stage(decoder, dpo), reference, Texts(tokens_nl), reward, dpo, risky, 0, record)
policy = merge_lora(policy, init_lora(jax.random.key(0), policy, rank=1))
drawn = generate(decoder, policy, jax.random.key(1), tokens_nl[:2, :2], 4, stop=(tokenizer.END,))
assert np.isfinite(drawn.logprob).all() and drawn.mask.any()
"""
)


def test_a_log_is_fitted_and_a_policy_trained_without_them():
    run_python(SCRIPT)
