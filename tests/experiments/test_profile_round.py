"""Reading a profile: hand-made events and program text, and a real trace of the CPU."""

from __future__ import annotations

import json
import sys
from collections import Counter

import pytest

from dvi_jax.errors import UserError
from experiments import profile_round
from experiments.profile_round import summarise
from experiments.trace_events import Event, Trace, instructions, read_trace

# As XLA prints it: what a GPU runs as a library call, as a fusion and as a copy, and a loop around them.
PROGRAM = """
  %p.1 = bf16[1,4096]{1,0} parameter(0)
  %w.1 = bf16[12288,4096]{1,0} parameter(1)
  %cublas-gemm.7 = (bf16[1,12288]{1,0}, s8[4194304]{0}) custom-call(%p.1, %w.1), custom_call_target="__cublas$gemm", \
metadata={op_name="jit(decode)/while/body/deep/dot_general" stack_frame_id=3}
  ROOT %loop_fusion.2 = bf16[1,4096]{1,0} fusion(%p.1), kind=kLoop, calls=%fused.2, \
metadata={op_name="jit(decode)/while/body/while/body/shallow/mlp/mul"}
  %gemm_fusion_dot.3 = f32[1,32000]{1,0} fusion(%p.1, %head.1), kind=kCustom, calls=%fused.3, \
metadata={op_name="jit(decode)/while/body/while/body/cond/branch_1_fun/drafter/draft_head/dot_general"}
  %head.1 = bf16[32000,4096]{1,0} parameter(2)
  %dot.9 = f32[1,32000]{1,0} dot(%p.1, %head.1), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %while.5 = (s32[], bf16[1,4096]{1,0}, /*index=5*/f32[2]{0}) while(%tuple.1), condition=%c, body=%b
"""


def event(name: str, start: float, duration: float, **stats: object) -> Event:
    return Event(name, start, duration, stats)


def test_events_find_their_part_of_the_program():
    program = instructions(PROGRAM)
    groups = {
        event("nvjet_tst_64x8", 0, 1, hlo_op="cublas-gemm.7").group(program),
        event("loop_fusion_2", 0, 1).group(program),
        event("gemm_fusion_dot_3", 0, 1).group(program),
        event("nvjet_tst_64x8", 0, 1).group(program),
        event("MemcpyD2H", 0, 1, memcpy_details="kind_src:device size:4 dest:0").group(program),
    }
    assert groups == {
        "deep: matrix product 12288x4096",
        "shallow mlp: the rest",
        "draft_head: matrix product 32000x4096",
        "matrix product, library kernel",
        "MemcpyD2H",
    }
    assert event("dot.9", 0, 1).group(program) == "without a place: matrix product 32000x4096"
    assert {event(name, 0, 1).group(program) for name in ("surprise", "surprise__12")} == {"kernel surprise"}


def test_summary_by_hand():
    """Two rounds in 100 us: two kernels that overlap, a gap of 20 us, a copy, a gap of 10 us, a kernel."""
    events = [
        event("loop_fusion_2", 1000, 30_000),
        event("gemm_fusion_dot_3", 11_000, 30_000),
        event("MemcpyD2H", 61_000, 10_000, memcpy_details="size:4", hlo_op="while.5"),
        event("loop_fusion_2", 81_000, 20_000),
        event("while.5", 0, 200_000),
    ]
    found = summarise(Trace(events, Counter({"cuGraphLaunch": 6}), {}), instructions(PROGRAM), rounds=2)
    assert found["traced_round_ms"] == pytest.approx(0.05)
    assert found["busy_ms"] == pytest.approx(0.035)
    assert found["gap_ms"] == pytest.approx(0.015)
    assert (found["gaps"], found["longest_gap_us"]) == (1.0, pytest.approx(20))
    assert found["groups"] == {
        "shallow mlp: the rest": {"ms": pytest.approx(0.025), "count": 1.0},
        "draft_head: matrix product 32000x4096": {"ms": pytest.approx(0.015), "count": 0.5},
        "MemcpyD2H": {"ms": pytest.approx(0.005), "count": 0.5},
    }
    assert found["copies"] == {"MemcpyD2H 4 bytes": {"ms": pytest.approx(0.005), "count": 0.5}}
    assert found["driver_calls"] == {"cuGraphLaunch": 3.0}


def test_a_trace_with_nothing_in_it():
    found = summarise(Trace([], Counter(), {}), {}, rounds=1)
    assert (found["traced_round_ms"], found["groups"], found["longest_gap_us"]) == (0.0, {}, 0.0)


def test_no_trace(tmp_path):
    with pytest.raises(UserError, match="wrote no trace"):
        read_trace(tmp_path)


@pytest.mark.full
def test_real_trace(tmp_path, monkeypatch, capsys):
    """Every layer's products are found, as often as the model runs them: the deep ones once a round."""
    sizes = "--shape tiny --dtype float32 --draft-steps 2 --prompt 20 --slots 48 --rounds 7"
    out = tmp_path / "profile.json"
    monkeypatch.setattr(sys, "argv", f"profile_round {sizes} --out {out} --keep {tmp_path / 'raw'}".split())
    monkeypatch.setenv("XLA_FLAGS", "")
    assert profile_round.main() == 0
    plain, speculative = json.loads(out.read_text(encoding="utf-8"))["profiles"]
    assert (plain["drafts"], plain["rounds"], speculative["drafts"]) == (0, 7, 2)
    assert plain["groups"]["head: matrix product 64x32"]["count"] == 1  # V x D
    assert plain["groups"]["deep mlp: matrix product 96x32"]["count"] == 2  # 2F x D, two deep layers
    assert not any(name.startswith("draft") for name in plain["groups"])
    assert any(name.startswith("draft") for name in speculative["groups"])
    assert 0 < plain["busy_ms"] <= plain["traced_round_ms"]
    assert len(list((tmp_path / "raw").glob("*.xplane.pb"))) == 2
    assert "gaps between kernels" in capsys.readouterr().out
