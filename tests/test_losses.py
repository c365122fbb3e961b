"""Every loss against an independent one in NumPy, values and gradients in fp64; and the losses' invariances.

All losses are compiled together once: each test calls that one function on other numbers of the same shapes.
"""

import jax
import numpy as np
import pytest
from losses_by_hand import ACROSS_ROWS, BETA, COMPARISONS, LABEL, LOSSES, SECOND


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
