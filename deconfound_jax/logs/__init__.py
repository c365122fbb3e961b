"""Logs: reading a file, naming every bad row, splitting what is left.

`read` needs DuckDB; `check` and `split` need numpy and scipy only, so import the
module that is wanted: `from deconfound_jax.logs.split import split`.
"""
