"""The names that users import: none is two things, and README's sample of the Python API works."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import dvi_jax

ROOT = Path(__file__).parents[1]


def test_no_public_name_is_a_module_as_well():
    modules = {module.name for module in pkgutil.iter_modules(dvi_jax.__path__)}
    assert modules & set(dvi_jax.__all__) == set()
    assert set(dvi_jax.__all__) <= set(dir(dvi_jax))


ORDERS = (
    "import dvi_jax.generate, dvi_jax.train; from dvi_jax import *; generate_batch, train_online, load, Stream",
    "from dvi_jax import *; import dvi_jax.train, dvi_jax.generate; assert callable(dvi_jax.train.main)",
    "from dvi_jax import generate, load, train, train_online; assert callable(generate.main) and callable(load)",
)
# Each begins without the package, in one process: what it imports from elsewhere takes seconds.
EACH_ANEW = """
import sys
for code in sys.argv[1:]:
    for name in [name for name in sys.modules if name.partition(".")[0] == "dvi_jax"]:
        del sys.modules[name]
    exec(code, {})
"""


def test_modules_and_functions_in_any_order():
    subprocess.run([sys.executable, "-c", EACH_ANEW, *ORDERS], check=True, cwd=ROOT)


def test_the_readme_sample_works(byte_checkpoint, capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    sample = re.search(r"From Python:\n\n((?:    .*\n|\n)+)", text).group(1).replace("\n    ", "\n").strip()
    assert "runs/online/checkpoint" in sample
    exec(sample.replace("runs/online/checkpoint", str(byte_checkpoint)), {})
    shown = capsys.readouterr().out
    prompts = ["Why is the sky blue?", "Tell me a story."]
    model = dvi_jax.load(byte_checkpoint)
    ids = [model.tokenizer.encode(f"User: {prompt}\nAssistant:") for prompt in prompts]
    sampling = dvi_jax.SamplingConfig(temperature=0.8)
    plain = dvi_jax.DecodeConfig(draft_steps=0, max_new_tokens=64)
    expected, _ = dvi_jax.generate_batch(model, ids, plain, sampling=sampling)
    assert shown == "".join(f"{model.tokenizer.decode(g.new_ids)} {g.accept_lengths}\n" for g in expected)
