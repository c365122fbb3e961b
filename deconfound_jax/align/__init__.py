"""Alignment: losses, log-probabilities, baselines and the joint step."""
