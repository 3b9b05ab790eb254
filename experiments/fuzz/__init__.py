"""Fuzzing of everything that reads files from strangers: `python -m experiments.fuzz`.

mutate.py     valid files as tokens, and how they are damaged        seeds.py    the valid files
parsers.py    what is fuzzed: a name, its seeds, the call            harness.py  one case: outcome, time, reduction
worker.py     a limited process that runs many cases
"""
