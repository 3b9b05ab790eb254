"""Golden cases recorded from the original. Torch is imported when a test needs it, not at collection."""

import json
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ("mha", "gqa_tied")


@pytest.fixture(scope="session", params=CASES)
def golden(request):
    """One golden directory: (path, the parsed golden.json)."""
    path = GOLDEN / request.param
    return path, json.loads((path / "golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def reference(golden):
    """The reference in float32 on the golden weights."""
    import torch

    from kangaroo_ref import load_kangaroo

    path, record = golden
    # Matrices this small lose time to a second thread, much of it on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_kangaroo(path / "base", path / "adapter", record["exit_layer"])
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def decode_options():
    """From a golden run to the keyword arguments of `kangaroo_generate` and `Upstream.generate`."""
    return lambda run: {
        "max_new_tokens": run["max_new_tokens"],
        "draft_steps": run["speculative_steps"],
        "threshold": run["threshold"],
        "eos_id": run["eos_token_id"],
    }
