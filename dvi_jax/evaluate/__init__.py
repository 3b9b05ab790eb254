"""Measuring a drafter.

questions (spec_bench) -> plain and speculative generations (runner) -> traces (trace) -> numbers (acceptance, summary)
-> pictures and one page (plots, report); `python -m dvi_jax.evaluate` does all of it.
"""
