"""Every loss beside an independent one in NumPy, written as its paper has it, and numbers to compare them on."""

import functools

import numpy as np

from deconfound_jax.align.losses import dpo, kto, likelihood, off_policy, policy_gradient, reference_free
from deconfound_jax.align.losses import reward_model as rm
from deconfound_jax.align.losses.dro import dro, reward_precision

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
