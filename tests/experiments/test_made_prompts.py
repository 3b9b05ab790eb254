"""Prompts made of the environment's own functions: no more modules are read than give enough of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from experiments import made_prompts

FUNCTION = '''def {name}(first, second=2):
    """Return what {name} makes of the two numbers, which must be whole and of one sign."""
    total = first + second
    return total
'''


@pytest.fixture
def modules(tmp_path):
    """50 modules of two functions each, one that is no Python, and one without a docstring."""
    for number in range(50):
        text = "\n\n".join(FUNCTION.format(name=f"f{number}_{which}") for which in "ab")
        (tmp_path / f"m{number}.py").write_text(text, encoding="utf-8")
    (tmp_path / "template.py").write_text("{{ this is none }}", encoding="utf-8")
    (tmp_path / "bare.py").write_text("def bare(x):\n    y = x\n    return y\n", encoding="utf-8")
    return tmp_path


def requests(folder, seed, count):
    found = made_prompts.function_requests([folder], np.random.default_rng(seed))
    return [candidate.messages[0].content for candidate in itertools.islice(found, count)]


def test_a_module_is_read_when_its_functions_are_asked_for(modules, monkeypatch):
    read, original = [], made_prompts.functions_of

    def watched(path):
        read.append(path.name)
        yield from original(path)

    monkeypatch.setattr(made_prompts, "functions_of", watched)
    assert len(requests(modules, 0, 20)) == 20
    assert 10 <= len(read) <= 12  # two functions in each, and at most the two modules without any
    assert read != sorted(read)


def test_the_seed_says_which(modules):
    first, again, other = requests(modules, 1, 20), requests(modules, 1, 20), requests(modules, 2, 20)
    assert first == again
    assert first != other
    every = requests(modules, 3, 1000)
    assert len(every) == len(set(every)) == 100
    assert all("Return what f" in request for request in every)
