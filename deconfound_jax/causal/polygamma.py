"""Digamma and trigamma of positive numbers in elementary functions: every derivative is as cheap.

    psi(x) = psi(x + 8) - sum_{i<8} 1 / (x + i),   then the asymptotic series at x + 8

Source: Abramowitz and Stegun 6.3.18 and 6.4.12; relative error below 1e-10 in double precision.
"""

from __future__ import annotations

import jax.numpy as jnp

_SHIFT = 8


def polygammas(x):
    """First and second derivative of log gamma, elementwise: they share their divisions."""
    inverse = [1 / (x + i) for i in range(_SHIFT + 1)]
    r = inverse.pop()
    u = r * r
    first = u * (1 / 12 - u * (1 / 120 - u * (1 / 252 - u * (1 / 240 - u / 132))))
    second = u * (1 / 6 - u * (1 / 30 - u * (1 / 42 - u * (1 / 30 - u * 5 / 66))))
    digamma = jnp.log(x + _SHIFT) - 0.5 * r - first - sum(inverse)
    return digamma, (1 + 0.5 * r + second) * r + sum(one * one for one in inverse)
