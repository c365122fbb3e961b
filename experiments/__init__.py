"""Command lines: thin `main`s over functions that notebooks and tests call, too."""

import os

# The linear algebra under the exact fits has threads of its own, which fight with XLA's over small
# matrices: up to ten times slower on few cores. Must be said before numpy is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
