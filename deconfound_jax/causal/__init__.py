"""The shared causal layer: one NumPyro model, its fits, and the reward that is left.

Order of reading: `terms` (a design and a log become arrays), `families`, `model`
(the NumPyro model), `conditional` (its algebra given a few scalars), `fit`,
`posterior`, `reward`.
"""
