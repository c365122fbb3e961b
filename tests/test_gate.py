"""Which rewards may train: the verdict's gate in front of the preference update."""

import numpy as np
import pytest

from deconfound_jax.causal.reward import Reward
from deconfound_jax.causal.verdict import Verdict
from deconfound_jax.recipes.preference import signed_pairs
from deconfound_jax.recipes.texts import require

DRAWS = np.zeros((3, 2))


def _reward(status: str) -> Reward:
    return Reward(DRAWS, "model", True, Verdict(status, ("because of a failed check.",), (), (), ()))


def test_a_consistent_reward_trains():
    require(_reward("consistent"), accept_risk=False)


@pytest.mark.parametrize("status", ["bounded", "not_identified"])
def test_others_are_refused_by_name_unless_the_risk_is_accepted(status):
    with pytest.raises(ValueError, match=f"{status}: because of a failed check.*accept_risk"):
        require(_reward(status), accept_risk=False)
    require(_reward(status), accept_risk=True)


def test_a_bounded_reward_trains_on_pairs_of_one_sign():
    require(_reward("bounded"), accept_risk=False, bounded=True)
    with pytest.raises(ValueError, match="not_identified"):
        require(_reward("not_identified"), accept_risk=False, bounded=True)


def test_a_reward_that_nobody_judged_is_refused():
    with pytest.raises(ValueError, match="reward.verdict: expected a verdict, got none"):
        require(Reward(DRAWS, "model"), accept_risk=False)


def test_pairs_without_a_sign_are_masked():
    groups_mg = np.asarray([[0, 1, 2], [3, 4, -1]])

    def sign(a, b):
        return np.where((a == 0) & (b == 1), 0, np.where(a == 1, -1, 1))

    np.testing.assert_array_equal(signed_pairs(groups_mg, sign), [[0, 1, -1], [1, 0, 0]])
    with pytest.raises(ValueError, match="no pair has one sign"):
        signed_pairs(groups_mg, lambda a, b: np.zeros(len(a)))


def test_lower_bound_of_an_improvement_cancels_shared_errors():
    shared_s = np.linspace(-5.0, 5.0, 101)
    reward = Reward(np.stack([shared_s, shared_s + 0.1], 1), "model")
    np.testing.assert_allclose(reward.lower(over=np.asarray([0, 0])), [0.0, 0.1], atol=1e-12)
    assert reward.lower()[1] < -4
