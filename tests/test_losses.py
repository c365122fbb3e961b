"""Every loss against an independent one in NumPy, values and gradients in fp64; and the losses' invariances.

All losses are compiled together once: each test calls that one function on other numbers of the same shapes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deconfound_jax.align.losses import dpo, kto, likelihood, off_policy, policy_gradient, reference_free, weighted_mean
from deconfound_jax.align.losses import reward_model as rm
from deconfound_jax.align.losses.dro import dro, reward_precision
from deconfound_jax.models.tokenizer import PAD

BETA, NOISE, MARGIN, TAU, CLIP, LENGTH, CEILING = 0.3, 0.2, 0.7, 0.5, 0.2, 5.0, 1.5
FIRST, SECOND = np.array([1.0, -2.0, 0.5, 7.0, -0.3, 3.0]), np.array([0.2, 1.0, 0.4, -3.0, 2.5, -0.6])
LABEL, TOKENS = np.array([1.0, 0.0, 0.3, 0.8, 0.5, 0.1]), np.array([4.0, 7.0, 1.0, 9.0, 5.0, 3.0])
MEAN_FIRST, MEAN_SECOND = -np.array([1.0, 0.3, 2.5, 0.05, 4.0, 0.9]), -np.array([0.2, 1.5, 2.4, 3.0, 0.6, 0.8])
PRECISION, EXPOSURE = np.array([1.0, 2.0, 0.5, 4.0, 0.0, 1.5]), np.array([10.0, 1.0, 3.0, 50.0, 7.0, 2.0])
GRADE = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0.1, 0.2, 0.3, 0.4], [0.5, 0, 0.5, 0]])
CUTS = np.array([-1.0, -0.9, 2.0])  # two of them close, where differences of probabilities lose digits
LOGGED = np.array([1.0, 1.0, 1.0, 0.0, 1.0, 0.0])
# Ratios below, inside and above the clip, under advantages of both signs; the last token of two texts is padding.
DRIFT = np.array([[0.1, -0.4], [0.5, 0.05], [-0.1, 0.3], [-0.5, 0.02], [0.15, -0.12], [0.9, -0.9]])
OLD_BGL = -np.linspace(0.5, 3, 36).reshape(6, 2, 3)
NEW_BGL = OLD_BGL + DRIFT[..., None] * np.array([1.0, -0.5, 0.8])
ADVANTAGE = np.array([[1.0, -1.0], [0.7, 0.4], [-0.6, -1.3], [2.0, -0.2], [0.0, 1.1], [-0.8, 0.9]])
MASK = np.ones((6, 2, 3))
MASK[1, 0, 2] = MASK[4, 1, 2] = 0


def log_sigmoid(x):
    return -np.log(1 + np.exp(-x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def mixed(hard, first, second, label):
    """A loss of a hard preference, averaged over who is preferred."""
    return label * hard(first, second) + (1 - label) * hard(second, first)


def hand_dpo(first, second, label):
    return mixed(lambda good, bad: -log_sigmoid(BETA * (good - bad)), first, second, label)


def hand_robust(first, second, label):
    def hard(good, bad):
        m = BETA * (good - bad)
        return (-(1 - NOISE) * log_sigmoid(m) + NOISE * log_sigmoid(-m)) / (1 - 2 * NOISE)

    return mixed(hard, first, second, label)


def hand_conservative(first, second, label):
    def hard(good, bad):
        m = BETA * (good - bad)
        return -(1 - NOISE) * log_sigmoid(m) - NOISE * log_sigmoid(-m)

    return mixed(hard, first, second, label)


def hand_ipo(first, second, label):
    # The published loss of both answers, less the variance of the answer, which is the same for every policy.
    published = mixed(lambda good, bad: (good - bad - 1 / (2 * BETA)) ** 2, first, second, label)
    return published - label * (1 - label) / BETA**2


def hand_orpo(first, second, label):
    def hard(good, bad):
        odds = [np.exp(a) / (1 - np.exp(a)) for a in (good, bad)]
        return -good - 0.4 * np.log(sigmoid(np.log(odds[0] / odds[1])))

    return mixed(hard, first, second, label)


def hand_bradley_terry(first, second, label):
    m = np.abs(EXPOSURE) / 10
    return mixed(lambda good, bad: -log_sigmoid(good - bad - m), first, second, label) + 0.1 * (first + second) ** 2


def hand_ordinal(reward, cuts):
    up_to = sigmoid(np.concatenate([[-500.0], cuts, [500.0]]) - reward[:, None])
    return -(GRADE * np.log(np.diff(up_to, axis=1))).sum(1)


def hand_kto(logratio, label):
    good, bad = 1.2 * (1 - sigmoid(BETA * (logratio - 0.4))), 0.9 * (1 - sigmoid(BETA * (0.4 - logratio)))
    return label * good + (1 - label) * bad


def our_dr_cpo(logratio, gain):
    normaliser = off_policy.log_mean_ratio(logratio, LOGGED * EXPOSURE)
    return off_policy.dr_cpo(logratio, gain, normaliser * LOGGED, CEILING)


def hand_dr_cpo(logratio, gain):
    weight = LOGGED * EXPOSURE
    mean = (weight * np.exp(logratio)).sum() / weight.sum()
    ratio = np.where(LOGGED > 0, np.exp(logratio) / mean, np.exp(logratio))
    return -np.minimum(ratio, np.exp(CEILING)) * gain


def hand_outcome_weights(draws):
    raised = EXPOSURE * np.exp(draws.T / TAU)
    return (raised / raised.sum(1, keepdims=True)).mean(0) / EXPOSURE * EXPOSURE.sum()


def hand_clipped(ratio, advantage):
    held = np.where(advantage > 0, np.minimum(ratio, 1 + CLIP), np.maximum(ratio, 1 - CLIP))
    return -held * advantage


def hand_tokens(logprob, advantage):
    return hand_clipped(np.exp(logprob - OLD_BGL), advantage[..., None]) * MASK


def hand_advantage(kind):
    def of(reward):
        weight = MASK.sum(-1) - 1  # 2 or 1
        mean = (weight * reward).sum(1, keepdims=True) / weight.sum(1, keepdims=True)
        if kind == "standardised":
            variance = (weight * (reward - mean) ** 2).sum(1, keepdims=True) / weight.sum(1, keepdims=True)
            return (reward - mean) / (np.sqrt(variance) + 1e-4)
        if kind == "centred":
            return reward - mean
        others = (weight * reward).sum(1, keepdims=True) - reward  # one copy of the text itself is no other
        return reward - others / (weight.sum(1, keepdims=True) - 1)

    return of


def pairs(loss, *knobs):
    return lambda first, second, label: loss(first, second, label, *knobs)


ADVANTAGES = {
    "standardised": policy_gradient.standardised,
    "centred": policy_gradient.centred,
    "leave_one_out": policy_gradient.leave_one_out,
}
PAIR, POINT, TOKEN = (FIRST, SECOND, LABEL), (FIRST, LABEL), (NEW_BGL, ADVANTAGE)
SHORT = pairs(dpo.dpo, BETA)
# name -> (ours, by hand, arguments that are differentiated); the loss's other arguments are constants.
LOSSES = {
    "dpo": (pairs(dpo.dpo, BETA), hand_dpo, PAIR),
    "conservative_dpo": (pairs(dpo.conservative_dpo, BETA, NOISE), hand_conservative, PAIR),
    "robust_dpo": (pairs(dpo.robust_dpo, BETA, NOISE), hand_robust, PAIR),
    "hinge": (
        pairs(dpo.hinge, BETA),
        lambda *a: mixed(lambda good, bad: np.maximum(0, 1 - BETA * (good - bad)), *a),
        PAIR,
    ),
    "ipo": (pairs(dpo.ipo, BETA), hand_ipo, PAIR),
    "dpo_per_token": (
        lambda a, b, s: SHORT(dpo.per_token(a, TOKENS), dpo.per_token(b, TOKENS + 2), s),
        lambda a, b, s: hand_dpo(a / TOKENS, b / (TOKENS + 2), s),
        PAIR,
    ),
    "simpo": (
        pairs(reference_free.simpo, 2.0, MARGIN),
        lambda *a: mixed(lambda good, bad: -log_sigmoid(2 * good - 2 * bad - MARGIN), *a),
        (MEAN_FIRST, MEAN_SECOND, LABEL),
    ),
    "orpo": (pairs(reference_free.orpo, 0.4), hand_orpo, (MEAN_FIRST, MEAN_SECOND, LABEL)),
    "bradley_terry": (pairs(rm.bradley_terry, EXPOSURE / 10, 0.1), hand_bradley_terry, PAIR),
    "normal_nll": (
        lambda r, y: rm.normal_nll(r, y, PRECISION),
        lambda r, y: PRECISION * (r - y) ** 2 / 2,
        (FIRST, SECOND),
    ),
    "binomial_nll": (
        lambda r, s: rm.binomial_nll(r, s * EXPOSURE, EXPOSURE),
        lambda r, s: -EXPOSURE * (s * np.log(sigmoid(r)) + (1 - s) * np.log(1 - sigmoid(r))),
        POINT,
    ),
    "ordinal_nll": (lambda r, c: rm.ordinal_nll(r, GRADE, c), hand_ordinal, (FIRST, CUTS)),
    "mean_nll": (lambda a: likelihood.mean_nll(a, TOKENS), lambda a: -a / TOKENS, (FIRST,)),
    "kto": (lambda h, d: kto.kto(h, d, BETA, 0.4, 1.2, 0.9), hand_kto, POINT),
    "dro": (
        lambda h, r: dro(h, r, 0.3, TAU),
        lambda h, r: (r - 0.3 - TAU * h) ** 2 / 2,
        (FIRST, SECOND),
    ),
    "reward_precision": (lambda sd: reward_precision(sd, 0.8), lambda sd: 1 / (1 + (sd / 0.8) ** 2), (TOKENS,)),
    "dr_cpo": (our_dr_cpo, hand_dr_cpo, (FIRST, SECOND)),
    "outcome_weights": (
        lambda draws: off_policy.outcome_weights(draws.T, EXPOSURE, TAU),
        hand_outcome_weights,
        (np.stack([FIRST, SECOND, LABEL], 1),),
    ),
    "grpo": (
        lambda p, a: policy_gradient.grpo(p, OLD_BGL, a, MASK, CLIP),
        lambda p, a: hand_tokens(p, a).sum(-1) / MASK.sum(-1),
        TOKEN,
    ),
    "dr_grpo": (
        lambda p, a: policy_gradient.dr_grpo(p, OLD_BGL, a, MASK, CLIP, LENGTH),
        lambda p, a: hand_tokens(p, a).sum(-1) / LENGTH,
        TOKEN,
    ),
    "rloo": (
        lambda p, a: policy_gradient.rloo(p, OLD_BGL, a, MASK, CLIP),
        lambda p, a: hand_clipped(np.exp((MASK * (p - OLD_BGL)).sum(-1)), a),
        TOKEN,
    ),
    "kl_k1": (lambda p: policy_gradient.kl_k1(p, OLD_BGL), lambda p: np.log(np.exp(p) / np.exp(OLD_BGL)), (NEW_BGL,)),
    "kl_k2": (lambda p: policy_gradient.kl_k2(p, OLD_BGL), lambda p: (p - OLD_BGL) ** 2 / 2, (NEW_BGL,)),
    "kl_k3": (
        lambda p: policy_gradient.kl_k3(p, OLD_BGL),
        lambda p: np.exp(OLD_BGL) / np.exp(p) - 1 - (OLD_BGL - p),
        (NEW_BGL,),
    ),
    **{
        kind: (functools.partial(advantage, weight_bg=MASK.sum(-1) - 1), hand_advantage(kind), (NEW_BGL.sum(-1),))
        for kind, advantage in ADVANTAGES.items()
    },
}
COMPARISONS = [name for name, (_, _, arguments) in LOSSES.items() if len(arguments) == 3]
ACROSS_ROWS = {"dr_cpo", "outcome_weights"}  # normalised over the batch: a row's value depends on the others


@pytest.fixture(scope="module")
def every():
    """({name: arguments} for some names) -> {name: (values, gradients of their sum weighted by `cotangent`)}."""

    @jax.jit
    def run(arguments):
        found = {}
        for name, (loss, _, _) in LOSSES.items():
            value, pull = jax.vjp(loss, *arguments[name])
            found[name] = value, pull(cotangent(value.shape))
        return found

    def call(some):
        with jax.enable_x64(True):
            return jax.tree.map(np.asarray, run({name: case[2] for name, case in LOSSES.items()} | some))

    return call


def cotangent(shape):
    return np.linspace(0.5, 1.5, int(np.prod(shape))).reshape(shape)


def slopes(loss, arguments):
    """Central differences of sum(cotangent * loss), one number at a time."""
    for i, argument in enumerate(arguments):
        slope = np.zeros_like(argument)
        for place in np.ndindex(argument.shape):
            sides = []
            for step in (1e-5, -1e-5):
                moved = argument.copy()
                moved[place] += step
                value = loss(*arguments[:i], moved, *arguments[i + 1 :])
                sides.append((cotangent(value.shape) * value).sum())
            slope[place] = (sides[0] - sides[1]) / 2e-5
        yield slope


@pytest.fixture(scope="module")
def plain(every):
    return every({})


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_by_hand(plain, name):
    _, by_hand, arguments = LOSSES[name]
    value, gradients = plain[name]
    np.testing.assert_allclose(value, by_hand(*arguments), rtol=1e-10, atol=1e-12)
    for gradient, slope in zip(gradients, slopes(by_hand, arguments), strict=True):
        np.testing.assert_allclose(gradient, slope, rtol=1e-7, atol=1e-8)
        assert np.abs(slope).max() > 1e-3, "a flat loss would test nothing"


def test_a_batch_is_its_rows_stacked(every, plain):
    def rows(argument, row):  # CUTS are no rows
        return np.repeat(argument[row : row + 1], 6, 0) if len(argument) == 6 else argument

    # Constants of the table differ from row to row, so row i is compared at its own place in a batch of rows like it.
    for row in range(6):
        found = every({name: tuple(rows(a, row) for a in case[2]) for name, case in LOSSES.items()})
        for name in LOSSES.keys() - ACROSS_ROWS:
            np.testing.assert_allclose(found[name][0][row], plain[name][0][row], rtol=1e-12, err_msg=name)


def test_swapped_texts_and_label_change_nothing(every, plain):
    # Lengths go with the texts.
    names = [name for name in COMPARISONS if name != "dpo_per_token"]
    assert len(names) == 8
    found = every({name: (b, a, 1 - s) for name in names for a, b, s in [LOSSES[name][2]]})
    for name in names:
        np.testing.assert_allclose(found[name][0], plain[name][0], rtol=1e-12, err_msg=name)


def test_a_coin_toss_between_equal_texts_pulls_nowhere(every):
    half, equal = np.full(6, 0.5), {name: LOSSES[name][2][0] for name in COMPARISONS}
    found = every({name: (a, a, half) for name, a in equal.items()} | {"kto": (np.full(6, 0.4), half)})
    for name in [name for name in COMPARISONS if name != "dpo_per_token"]:
        first, second, _ = found[name][1]
        np.testing.assert_allclose(first - second, 0, atol=1e-12, err_msg=name)
        if name not in ("orpo", "bradley_terry"):  # these pull both: up the likelihood, to the centre
            np.testing.assert_allclose(first, 0, atol=1e-12, err_msg=name)
    # The two sides of KTO have other weights in the table; at equal ones nothing is left.
    np.testing.assert_allclose(found["kto"][1][0], -BETA * 0.5 * (1.2 - 0.9) / 4 * cotangent((6,)), rtol=1e-12)


def test_dpo_at_equal_policies_is_log_two_for_every_label(every):
    found = every({name: (SECOND, SECOND, LABEL) for name in ("dpo", "conservative_dpo", "robust_dpo")})
    for name in ("dpo", "conservative_dpo", "robust_dpo"):
        np.testing.assert_allclose(found[name][0], np.log(2), rtol=1e-12)


def test_where_a_doubtful_pair_comes_to_rest(every):
    label = np.linspace(0.25, 0.75, 6)
    logit = np.log(label / (1 - label)) / BETA
    noisy = np.log((label * 0.6 + 0.2) / (1 - label * 0.6 - 0.2)) / BETA
    zero = np.zeros(6)
    rest = {"dpo": logit, "conservative_dpo": noisy, "ipo": (label - 0.5) / BETA}
    found = every({name: (at, zero, label) for name, at in rest.items()})
    for name in rest:
        np.testing.assert_allclose(found[name][1][0], 0, atol=1e-12, err_msg=name)
    # Of labels flipped with probability 0.2 the robust loss rests where the clean ones say.
    found = every({"robust_dpo": (logit, zero, label * 0.6 + 0.2)})
    np.testing.assert_allclose(found["robust_dpo"][1][0], 0, atol=1e-12)


@pytest.mark.parametrize("size", [1e5, -1e5])
def test_huge_margins_are_finite(every, size):
    def huge(name):
        first, *others = LOSSES[name][2]
        sure = name in ("simpo", "orpo")  # of these the argument is a log-probability, at most 0
        return (np.full_like(first, -abs(size) if sure else size), *others)

    for name, (value, gradients) in every({name: huge(name) for name in LOSSES}).items():
        assert np.isfinite(value).all() and all(np.isfinite(g).all() for g in gradients), name


def test_weighted_mean_reads_no_masked_value():
    values, weight = jnp.array([2.0, jnp.nan, jnp.inf]), jnp.array([3.0, 0.0, 0.0])
    assert weighted_mean(values, weight) == 2.0
    assert weighted_mean(values, jnp.zeros(3)) == 0.0
    assert weighted_mean(jnp.array([1.0, 4.0, 9.0]), jnp.array([1.0, 2.0, 0.0])) == 3.0  # 1, 4, 4
    gradient = jax.grad(lambda w: weighted_mean(w * jnp.array([1.0, 2.0, 3.0]), weight))(1.0)
    assert gradient == 1.0
    with pytest.raises(AssertionError):
        weighted_mean(values, jnp.ones((3, 1)))


# Of a batch's values and weights: one number, or one a row.
STATISTICS = {
    "reference_point": kto.reference_point,
    "log_mean_ratio": off_policy.log_mean_ratio,
    "outcome_weights": lambda a, w: off_policy.outcome_weights(jnp.stack([a, a**2]), w, TAU),
    **{kind: lambda a, w, f=advantage: f(a[None], w[None])[0] for kind, advantage in ADVANTAGES.items()},
}


@pytest.fixture(scope="module")
def statistics():
    return jax.jit(lambda a, w: {name: statistic(a, w) for name, statistic in STATISTICS.items()})


@pytest.mark.parametrize("name", STATISTICS)
def test_weight_two_is_the_row_twice_and_weight_zero_is_no_row(statistics, name):
    a, b, c, junk = 0.7, -0.2, 1.6, 40.0
    weighted = statistics(jnp.array([a, b, c, junk]), jnp.array([1.0, 2.0, 1.0, 0.0]))[name]
    repeated = statistics(jnp.array([a, b, b, c]), jnp.ones(4))[name]
    if np.ndim(repeated):
        weighted, repeated = weighted[:3], repeated[jnp.array([0, 1, 3])]
    np.testing.assert_allclose(weighted, repeated, rtol=1e-5)
    unweighted = statistics(jnp.array([a, b, c, junk]), jnp.array([1.0, 1.0, 1.0, 0.0]))[name]
    assert not np.allclose(unweighted[:3] if np.ndim(unweighted) else unweighted, weighted)


def test_a_batch_without_weight_has_finite_statistics(statistics):
    found = statistics(jnp.array([0.7, -0.2, 1.6, 40.0]), jnp.zeros(4))
    for name in STATISTICS.keys() - {"outcome_weights"}:  # nothing to normalise by: the log's weights are never all 0
        np.testing.assert_array_equal(found[name], 0, err_msg=name)


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_advantages_of_a_group_sum_to_zero_and_equal_rewards_have_none(statistics, kind):
    weight = jnp.array([1.0, 2.0, 0.5, 1.0])
    found = statistics(jnp.array([0.3, 2.0, -1.0, 7.0]), weight)[kind]
    assert abs(float((found * weight).sum())) < 1e-5 < float(jnp.abs(found).min())
    # 0.1 three times is not 0.3 in floating point: nothing may be left of it, for it would be divided by a small sd.
    np.testing.assert_array_equal(statistics(jnp.full(4, 0.1), weight)[kind], 0)


def test_rows_that_weighted_ones_are_worth():
    assert off_policy.effective_size(jnp.array([3.0, 3.0, 0.0])) == 2
    assert off_policy.effective_size(jnp.array([3.0, 1.0])) == pytest.approx(1.6)
    assert off_policy.effective_size(jnp.zeros(2)) == 0


def test_nll_is_the_mean_over_targets_wherever_the_padding_lies():
    tokens = np.array([[1, 5, 4, 2, PAD], [1, 3, 2, PAD, PAD], [PAD, PAD, PAD, 1, 2]], np.int32)
    logprob = np.array([[-1.0, -2.0, -0.5, 0.0], [-3.0, -0.25, 0.0, 0.0], [0.0, 0.0, 0.0, -0.75]], np.float32)
    np.testing.assert_allclose(likelihood.token_nll(logprob, tokens), [3.5 / 3, 3.25 / 2, 0.75], rtol=1e-6)
    assert likelihood.token_nll(np.zeros((1, 4)), np.array([[1, PAD, PAD, PAD, PAD]]))[0] == 0


def test_cut_points_rise_from_any_numbers():
    np.testing.assert_allclose(rm.rising_cuts(jnp.array([-1.0, 0.0, np.log(2.0)])), [-1, 0, 2], rtol=1e-6)
    assert (np.diff(rm.rising_cuts(jnp.array([3.0, -4.0, -9.0, 2.0]))) > 0).all()
