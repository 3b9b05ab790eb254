"""The command of meshes, on devices made up on the CPU."""

import json
from dataclasses import replace

import pytest

from dvi_jax.errors import UserError
from dvi_jax.mesh import bytes_of
from dvi_jax.presets import TINY
from experiments import scaling


@pytest.mark.full
def test_tables_over_meshes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "RUNS", 1)
    monkeypatch.setitem(scaling.SHAPES, "tiny", replace(TINY, num_layers=2))
    out = tmp_path / "scaling.json"
    meshes = ["model=1", "data=2,model=2"]
    sizes = ["--batch", "2", "--rows", "4", "--length", "16"]
    assert scaling.main(["--shape", "tiny", "--mesh", *meshes, "--what", "plain", *sizes, "--out", str(out)]) == 0
    one, four = json.loads(out.read_text())["rows"]
    assert [row["mesh"] for row in (one, four)] == ["data=1,model=1", "data=2,model=2"]
    assert all(row["ms"] > 0 and row["floor_ms"] > 0 for row in (one, four))
    assert one["exchange_us"] == 0 < four["exchange_us"]
    assert four["bytes_read"] < one["bytes_read"]
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert out.with_suffix(".png").stat().st_size > 1000


def test_an_update(monkeypatch):
    monkeypatch.setitem(scaling.SHAPES, "tiny", replace(TINY, num_layers=2))
    model = scaling.random_model(scaling.SHAPES["tiny"], None, "exit_head", "float32")
    assert bytes_of(None, model.params.base) == 4 * sum(x.size for x in scaling.jax.tree.leaves(model.params.base))
    assert (
        scaling.main(["--shape", "tiny", "--mesh", "data=2", "--what", "distill", "--rows", "4", "--length", "8"]) == 0
    )


def test_unknown_shapes():
    with pytest.raises(UserError, match="--shape 8b: known are tiny, "):
        scaling.main(["--shape", "8b"])
