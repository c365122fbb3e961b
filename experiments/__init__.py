"""Command lines: thin `main`s over functions that notebooks and tests call, too."""
