"""The upstream loader on a small stand-in checkout, and upstream itself where KANGAROO_DIR names one."""

import hashlib
import os
import sys

import pytest

from dvi_jax.errors import UserError

# A checkout with upstream's file names, imports and interfaces, and nothing else of it.
STAND_IN = {
    "kangaroo/earlyexit.py": (
        "class EarlyExitLlamaForCausalLM:\n"
        "    @classmethod\n"
        "    def from_pretrained(cls, path, device_map='absent'):\n"
        "        return cls()\n"
    ),
    "kangaroo/adapter.py": "class AdapterModel:\n    pass\n",
    "kangaroo/kangaroo_model.py": (
        "import torch\n"
        "from fastchat.utils import str_to_torch_dtype\n"
        "from kangaroo.adapter import AdapterModel\n"
        "from kangaroo.earlyexit import EarlyExitLlamaForCausalLM\n"
        "class KangarooModel(torch.nn.Module):\n"
        "    def __init__(self, base, adapter, args, EARLY_STOP_LAYER):\n"
        "        super().__init__()\n"
        "        EarlyExitLlamaForCausalLM.from_pretrained(base, device_map='auto')\n"
        "        assert str_to_torch_dtype(args.dtype) is torch.float32\n"
    ),
    "evaluation/inference_kangaroo.py": (
        "from fastchat.utils import str_to_torch_dtype\n"
        "from evaluation.eval import run_eval, reorg_answer_file\n"
        "from kangaroo.kangaroo_model import KangarooModel\n"
        "def kangaroo_forward(inputs, model, tokenizer, max_new_tokens, max_length, **options):\n"
        "    assert isinstance(model, KangarooModel)\n"
        "    ids = inputs.input_ids[0].tolist()\n"
        "    seen = [tokenizer.eos_token_id, max_new_tokens, options['SPECULATIVE_DECODING_STEPS'],\n"
        "            options['EARLY_STOP_LAYER'], options['threshold']]\n"
        "    return [ids + seen], 5, 1, [1, 5]\n"
    ),
}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """The stand-in as a directory, with its own digests in place of upstream's."""
    from kangaroo_ref import upstream

    for name, source in STAND_IN.items():
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    digests = {name: hashlib.sha256(source.encode()).hexdigest() for name, source in STAND_IN.items()}
    monkeypatch.setattr(upstream, "UPSTREAM_SHA256", digests)
    return tmp_path / "checkout"


@pytest.mark.parametrize("name", STAND_IN)
def test_missing_file_is_refused_by_name(checkout, name):
    from kangaroo_ref.upstream import read_checkout

    (checkout / name).unlink()
    with pytest.raises(UserError, match=rf"{name} is missing"):
        read_checkout(checkout)


@pytest.mark.parametrize("name", STAND_IN)
def test_altered_file_is_refused_by_name_and_not_run(checkout, name):
    from kangaroo_ref.upstream import upstream_modules

    (checkout / name).write_text(STAND_IN[name] + "raise SystemExit\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"{name} is not the untouched"), upstream_modules(checkout):
        pass


def test_the_first_bad_file_is_the_one_named(checkout):
    from kangaroo_ref.upstream import read_checkout

    for name in STAND_IN:
        (checkout / name).write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=next(iter(STAND_IN))):
        read_checkout(checkout)


def test_an_unrelated_directory_is_refused(tmp_path):
    from kangaroo_ref.upstream import read_checkout

    with pytest.raises(UserError, match="earlyexit"):
        read_checkout(tmp_path)


def test_runs_with_stubs_and_cleans_up(checkout, golden, monkeypatch):
    from kangaroo_ref.upstream import PACKAGES, run_upstream

    installed = type(sys)("fastchat")
    monkeypatch.setitem(sys.modules, "fastchat", installed)
    modules, path = set(sys.modules), list(sys.path)
    base, adapter = golden[0] / "base", golden[0] / "adapter"
    ids, accept_lengths = run_upstream(checkout, base, adapter, [7, 8], 6, 0.5, 2, 3, 64)
    assert (ids, accept_lengths) == ([7, 8, 2, 64, 6, 3, 0.5], [1, 5])
    assert sys.modules["fastchat"] is installed
    assert sys.path == path
    assert not {name for name in set(sys.modules) - modules if name.split(".")[0] in PACKAGES}
    assert sorted(p.name for p in checkout.rglob("*.py*")) == sorted(name.split("/")[1] for name in STAND_IN)


@pytest.mark.skipif("KANGAROO_DIR" not in os.environ, reason="KANGAROO_DIR names no upstream checkout")
def test_upstream_equals_the_reference(golden, reference, decode_options):
    import torch

    from kangaroo_ref import kangaroo_generate, prompt_stages
    from kangaroo_ref.upstream import load_upstream

    path, record = golden
    checkout = os.environ["KANGAROO_DIR"]
    with load_upstream(checkout, path / "base", path / "adapter", record["exit_layer"]) as upstream:
        for run in record["runs"]:
            ours = kangaroo_generate(reference, run["prompt"], **decode_options(run))
            theirs = upstream.generate(run["prompt"], **decode_options(run))
            assert theirs == (ours.output_ids, ours.accept_lengths)
            stages = upstream.stages(run["prompt"])
            for name, tensor in prompt_stages(reference, run["prompt"]).items():
                torch.testing.assert_close(tensor, stages[name], rtol=0, atol=1e-5)
