"""A whole run: what `config.json` records."""

from __future__ import annotations

import dataclasses
from typing import Literal

from deconfound_jax.config.align import Align, BestOfN, Dpo, Dro, Grpo, Joint, Kto, Sft, Top
from deconfound_jax.config.causal import Causal
from deconfound_jax.config.logs import LogsSource
from deconfound_jax.config.models import Decoder, Features, Policy
from deconfound_jax.config.off_policy import DrCpo, Rejection, Rwr
from deconfound_jax.config.report import Report
from deconfound_jax.config.reward_models import RewardModel
from deconfound_jax.config.scale import Mesh
from deconfound_jax.config.simulate import Newsroom
from deconfound_jax.structs import Roles


@dataclasses.dataclass(frozen=True)
class Run:
    """One complete configuration; a preset returns one of these."""

    name: str = "newsroom"  # names the study in results.json
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # simulation and training seeds; real logs use the first
    methods: tuple[str, ...] = ("naive", "covariate", "deconfounded")  # of naive, covariate, deconfounded, joint
    roles: Roles = Roles()
    logs: LogsSource = LogsSource()
    simulation: Newsroom = Newsroom()
    causal: Causal = Causal()
    decoder: Decoder = Decoder()
    policy: Policy = Policy()
    features: Features = Features()
    sft: Sft = Sft()
    align: Align = Align()
    dpo: Dpo = Dpo()
    top: Top = Top()
    kto: Kto = Kto()
    dro: Dro = Dro()
    grpo: Grpo = Grpo()
    rejection: Rejection = Rejection()
    rwr: Rwr = Rwr()
    dr_cpo: DrCpo = DrCpo()
    reward_model: RewardModel = RewardModel()
    best_of_n: BestOfN = BestOfN()
    joint: Joint = Joint()
    report: Report = Report()
    mesh: Mesh = Mesh()
    checkpoint_every: int = 50  # steps between checkpoints of a training stage
    writers: tuple[Literal["tensorboard", "wandb"], ...] = ()  # beside metrics.jsonl
