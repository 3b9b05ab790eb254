"""Does the JAX port do what the PyTorch Kangaroo does? `python -m conversion.parity`.

inputs.py   the cases: weights, adapter, prompts     runs.py   the implementations that are compared
compare.py  stages, ids and accept lengths side by side        __main__.py   the command line and its tables
"""

from __future__ import annotations
