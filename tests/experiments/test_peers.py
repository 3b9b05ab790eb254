"""The peers: the same shape, and a way that cannot run here leaves a reason instead of stopping the others."""

from __future__ import annotations

import json
import math
import sys

import jax
import pytest
import torch

pytest.importorskip("transformers", reason="the peers need transformers")

from dvi_jax.errors import UserError
from dvi_jax.model.llama import base_shapes
from dvi_jax.presets import TINY
from experiments import peers


def test_ways(tmp_path, monkeypatch, capsys):
    """transformers 4.33.3 has the growing cache only."""
    out = tmp_path / "peers.json"
    monkeypatch.setattr(
        sys, "argv", f"peers --shape tiny --dtype float32 --prompt 8 --new-tokens 4 --out {out}".split()
    )
    monkeypatch.setattr(peers, "WAYS", peers.WAYS | {"broken": broken})
    assert peers.main() == 0
    rows = {row["way"]: row for row in json.loads(out.read_text(encoding="utf-8"))["rows"]}
    eager = rows["eager generate"]
    assert eager["tokens_per_second"] == pytest.approx(1e3 / eager["ms_per_token"])
    assert rows["broken"]["failed"] == "RuntimeError: no compiler"
    assert "no static cache" in rows["static compiled generate"]["failed"]
    assert "'StaticCache'" in rows["static compiled step"]["failed"]
    assert "no compiler" in capsys.readouterr().out


def broken(peer: object, repeats: int) -> dict:
    raise RuntimeError("no compiler\nand a long explanation")


def test_same_shape():
    """As many weights as ours, and nothing that ends a sequence early."""
    peer = peers.Peer(TINY, torch.float32, 8, 4)
    ours = sum(math.prod(shape) for shape in jax.tree.leaves(base_shapes(TINY), is_leaf=is_shape))
    assert sum(weight.numel() for weight in peer.model.parameters()) == ours
    assert peer.model.generation_config.eos_token_id is None


def is_shape(value: object) -> bool:
    return isinstance(value, tuple)


def test_one_new_token_is_no_measurement(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["peers", "--shape", "tiny", "--new-tokens", "1"])
    with pytest.raises(UserError, match="at least 2"):
        peers.main()
