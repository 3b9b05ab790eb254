"""`python -m conversion` as a user runs it: outcome, one-line errors, memory, and what it never imports."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from conversion.__main__ import main
from conversion.importing import import_model
from dvi_jax.checkpoint import read_checkpoint
from dvi_jax.errors import UserError, run_cli

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def run(monkeypatch, capsys):
    """run(...): the command with these arguments; exit status and what it said on stderr."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["conversion", *map(str, arguments)])
        capsys.readouterr()
        return run_cli(main), capsys.readouterr().err

    return command


def test_import_and_export(run, helpers, tmp_path):
    golden = helpers.golden / "mha"
    assert run("import", "--from", golden / "base", "--adapter", golden / "adapter", "--out", tmp_path / "a") == (0, "")
    manifest = read_checkpoint(tmp_path / "a").manifest
    assert (manifest.exit_layer, manifest.dtype, manifest.drafter) == (2, "float32", "kangaroo")
    assert run("export", "--from", tmp_path / "a", "--to", "hf", "--out", tmp_path / "hf") == (0, "")
    assert (tmp_path / "hf" / "adapter" / "pytorch_model.bin").exists()


def test_errors_are_one_line_and_status_2(tmp_path, make_hf):
    """In a process, as a shell sees it; tests/test_command_line.py has more, without a process for each."""
    out = tmp_path / "out"
    truncated = make_hf()
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    command = [sys.executable, "-m", "conversion", "import", "--from", str(truncated), "--out", str(out)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "is truncated" in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not out.exists()


def test_exit_layer_bounds_of_a_two_layer_model(tmp_path, make_hf):
    source = make_hf(num_hidden_layers=2)
    assert import_model(source, tmp_path / "default").exit_layer == 1
    assert import_model(source, tmp_path / "given", exit_layer=1).exit_layer == 1
    for layer in (-1, 0, 2):
        with pytest.raises(UserError, match=rf"must be in 1\.\.1 for 2 layers, got {layer}"):
            import_model(source, tmp_path / "out", exit_layer=layer)


MEASURE = """
import sys
from pathlib import Path

def resident(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

from conversion.importing import import_model
import dvi_jax.importing.tokenizer, dvi_jax.importing.gguf
for small in sys.argv[2:3]:
    import_model(Path(small), Path(small + "-out"))
before = resident("VmRSS")
import_model(Path(sys.argv[1]), Path(sys.argv[1] + "-out"))
assert not {"transformers", "sentencepiece"} & sys.modules.keys()
assert "torch" not in sys.modules or sys.argv[1].endswith("bin")
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("kind", ["safetensors", pytest.param("bin", marks=pytest.mark.full)])
def test_peak_memory_is_the_output_and_one_tensor(helpers, make_hf, kind):
    """Beyond what a tiny import of the same kind leaves resident: 1.3 outputs and the largest tensor."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 8000, "num_hidden_layers": 3}
    tensors = helpers.tensors({**helpers.tiny, **sizes})
    small, large = make_hf(name="small-" + kind), make_hf(tensors, name="large-" + kind, **sizes)
    if kind == "bin":
        as_torch_file(small)
        as_torch_file(large)
    command = [sys.executable, "-c", MEASURE, str(large), str(small)]
    peak = int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    output = sum(array.nbytes for array in tensors.values())
    largest = max(array.nbytes for array in tensors.values())
    assert output > 200 << 20
    assert output < peak < 1.3 * output + largest


def as_torch_file(directory):
    import torch

    weights = directory / "model.safetensors"
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in safetensors.numpy.load_file(weights).items()}
    torch.save(tensors, directory / "pytorch_model.bin")
    weights.unlink()


def test_manifest_names_the_source_by_its_content(helpers, tmp_path, make_hf):
    source = make_hf()
    import_model(source, tmp_path / "a")
    manifest = json.loads((tmp_path / "a" / "MANIFEST.json").read_text())
    assert manifest["source"] == "model"
    assert manifest["source_sha256"] == hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
