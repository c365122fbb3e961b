"""Recipes: whole training stages, put together from objectives, steps and the loop.

A recipe is two functions: one builds the compiled `Stage` (shared by all seeds
and methods, so that it compiles once), one trains with it.
"""
