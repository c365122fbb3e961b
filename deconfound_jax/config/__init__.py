"""Every knob of the project: nested frozen dataclasses, one file a layer.

A knob exists in one place, with one comment saying why it is there. Presets
(`experiments/presets/`) are functions that return a complete `Run`.
"""

from deconfound_jax.config.align import Align, BestOfN, Dpo, Dro, Grpo, Joint, Kto, Lora, Sft, Top
from deconfound_jax.config.baselines import Adam, CausalRewards, CausalRm, InfoRm, Lowess, Odin, Rrm
from deconfound_jax.config.causal import Causal
from deconfound_jax.config.logs import LogsSource, Split
from deconfound_jax.config.models import Decoder, Features, Policy
from deconfound_jax.config.off_policy import DrCpo, Rejection, Rwr
from deconfound_jax.config.report import Report
from deconfound_jax.config.reward_models import RewardModel
from deconfound_jax.config.run import Run
from deconfound_jax.config.scale import Mesh
from deconfound_jax.config.simulate import Newsroom
from deconfound_jax.config.verdict import Checks

__all__ = [
    "Adam",
    "Align",
    "BestOfN",
    "Causal",
    "CausalRewards",
    "CausalRm",
    "Checks",
    "Decoder",
    "Dpo",
    "DrCpo",
    "Dro",
    "Features",
    "Grpo",
    "InfoRm",
    "Joint",
    "Kto",
    "LogsSource",
    "Lora",
    "Lowess",
    "Mesh",
    "Newsroom",
    "Odin",
    "Policy",
    "Rejection",
    "Report",
    "RewardModel",
    "Rrm",
    "Run",
    "Rwr",
    "Sft",
    "Split",
    "Top",
]
