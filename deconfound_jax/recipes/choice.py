"""A recipe by its config: one way in for scripts that offer all of them."""

from __future__ import annotations

from typing import Any

from jax.sharding import Mesh

from deconfound_jax.align.scoring import TextReward
from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.reward import Reward, residual_form
from deconfound_jax.causal.spec import Prepared
from deconfound_jax.config import Align, Dpo, DrCpo, Dro, Features, Grpo, Kto, Rejection, Run, Rwr, Top
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.recipes.off_policy import align_dr_cpo, align_rwr, dr_cpo_stage, rwr_stage
from deconfound_jax.recipes.preference import align_dpo, dpo_stage
from deconfound_jax.recipes.rejection import align_rejection, rejection_stage
from deconfound_jax.recipes.rounds import OWN, align_grpo, grpo_stage
from deconfound_jax.recipes.singles import align_singles, single_stage
from deconfound_jax.recipes.stage import Record, Stage, batch_of
from deconfound_jax.recipes.texts import Texts
from deconfound_jax.train.mesh import check_rows

Config = Dpo | Top | Kto | Dro | Grpo | Rejection | Rwr | DrCpo
SCORES_OWN = ("grpo", "rejection", "dr_cpo")  # recipes that ask the reward of texts that no log holds


def config_of(run: Run) -> Config:
    """The knobs of the recipe that `run.align.recipe` names.

    Raises:
      ValueError: best-of-n, which trains nothing.
    """
    if run.align.recipe == "best_of_n":
        raise ValueError("align.recipe: expected one that trains, got 'best_of_n'")
    recipes = {"dpo": run.dpo, "top": run.top, "kto": run.kto, "dro": run.dro, "grpo": run.grpo}
    return (recipes | {"rejection": run.rejection, "rwr": run.rwr, "dr_cpo": run.dr_cpo})[run.align.recipe]


def stage_of(
    decoder: Decoder, config: Config, features: Features, dispatch: int = 1, accumulate: int = 1,
    mesh: Mesh | None = None,
) -> Stage:  # fmt: skip
    """The compiled step of a recipe; `features` are those of the recipes whose texts no log holds.

    Raises:
      ValueError naming the knob: `dispatch`, `accumulate` or the mesh does not divide what it must.
    """
    if isinstance(config, Dpo):
        stage = dpo_stage(decoder, config, accumulate)
    elif isinstance(config, Grpo):
        stage = grpo_stage(decoder, config, features, accumulate=accumulate)
    elif isinstance(config, Rejection):
        stage = rejection_stage(decoder, config, features, accumulate=accumulate)
    elif isinstance(config, DrCpo):
        stage = dr_cpo_stage(decoder, config, features, accumulate)
    elif isinstance(config, Rwr):
        stage = rwr_stage(decoder, config, accumulate)
    else:
        stage = single_stage(decoder, config, accumulate)
    return stage.dispatched(dispatch).on(mesh)


def check_scale(run: Run, mesh: Mesh) -> None:
    """Refuses by the knob's name, before anything is trained, what a run's mesh, `align.accumulate` and
    `align.dispatch` do not divide: there is a state to save and to look at only between dispatches."""
    config, align = config_of(run), run.align
    (name, rows), steps = batch_of(config), "rounds" if isinstance(config, Grpo) else "steps"
    check_rows(name, rows, mesh, align.accumulate)
    if not run.policy.source:
        check_rows(*batch_of(run.sft), mesh, align.accumulate)
    periods = {f"{name.split('.')[0]}.{steps}": vars(config)[steps], "align.evaluate_every": align.evaluate_every,
               "checkpoint_every": run.checkpoint_every}  # fmt: skip
    for period, length in periods.items():
        if align.dispatch < 1 or length % align.dispatch:
            raise ValueError(f"align.dispatch: expected a divisor of {period} = {length}, got {align.dispatch}")


def align_policy(decoder: Decoder, stage: Stage, reference: Any, texts: Texts, reward: Reward,
                 anywhere: TextReward | None, config: Config, align: Align, seed: int, record: Record,
                 evaluators=(), residual: Reward | None = None) -> Any:  # fmt: skip
    """Trains `reference` on a reward by the recipe that `config` is of; returns the policy, or its adapters.

    Args:
      reward: of the log's texts.
      anywhere: the same reward of any text: only recipes of `SCORES_OWN` ask it.
      residual: see `residual_of`; only DR-CPO asks it.

    Raises:
      ValueError: a reward that the recipe asks for is None; and what the recipe itself refuses.
    """
    rest = config, align, seed, record, evaluators
    if isinstance(config, Grpo | Rejection | DrCpo) and anywhere is None:
        name = batch_of(config)[0].partition(".")[0]
        raise ValueError(f"anywhere: expected a reward of any text for {name} (`scoring.text_reward`), got None")
    if isinstance(config, Grpo | Rejection):
        prompts_nq = OWN if texts.prompt_nq is None else texts.prompt_nq
        if prompts_nq.shape[1] > 1:  # `stage_of` leaves room for one token before a text
            name = batch_of(config)[0].partition(".")[0]
            raise ValueError(f"prompt: expected one token before a text for {name}, got {prompts_nq.shape[1]}; "
                             f"{name}_stage with fewer new_tokens, and align_{name}, take longer ones")  # fmt: skip
        align_own = align_grpo if isinstance(config, Grpo) else align_rejection
        return align_own(decoder, stage, reference, anywhere, reward, *rest, prompts_nq)
    if isinstance(config, DrCpo):
        if residual is None:
            raise ValueError("residual: expected a reward of the log's outcomes for dr_cpo (`residual_of`), got None")
        return align_dr_cpo(decoder, stage, reference, texts, reward, residual, anywhere, *rest)
    align_texts = align_dpo if isinstance(config, Dpo) else align_rwr if isinstance(config, Rwr) else align_singles
    return align_texts(decoder, stage, reference, texts, reward, *rest)


def residual_of(config: Config, posterior: Posterior, prepared: Prepared) -> Reward | None:
    """What the log's outcomes are without the confounders' part, for the recipe that asks it; else None."""
    return residual_form(posterior, prepared)[0] if isinstance(config, DrCpo) else None
