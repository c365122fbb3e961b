"""Rival reward models behind one interface, `(data, config, key) -> RewardModel`; docs/baselines.md compares them."""
