"""What a GPU would run: counted in a program's text, and refused in one line where there is no compiler."""

import jax
import pytest

from dvi_jax.errors import UserError
from experiments import gpu_programs
from experiments.gpu_programs import Launched, launched

# As XLA writes it, cut to what counts: a loop of one product of ours, one fusion and one copy, after another fusion.
PROGRAM = """\
HloModule jit_decode_rounds, is_scheduled=true

%fused_add (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %add = f32[8]{0} add(%p, %p)
}

%body.1 (state: (f32[8], s32[])) -> (f32[8], s32[]) {
  %state = (f32[8]{0}, s32[]) parameter(0)
  %x = f32[8]{0} get-tuple-element(%state), index=0
  %kernel.2 = (f32[8]{0}, /*index=1*/f32[8]{0}) custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", \
metadata={op_name="jit(f)/while/body/deep/jit(product)/product/pallas_call"}
  %y = f32[8]{0} get-tuple-element(%kernel.2), index=0
  %sum = f32[8]{0} fusion(%y), kind=kLoop, calls=%fused_add, metadata={op_name="jit(f)/while/body/head/add"}
  %count = s32[] get-tuple-element(%state), index=1
  %copy.3 = s32[] copy(%count)
  ROOT %out = (f32[8]{0}, s32[]) tuple(%sum, %copy.3)
}

%condition.1 (state.1: (f32[8], s32[])) -> pred[] {
  %state.1 = (f32[8]{0}, s32[]) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %before = f32[8]{0} fusion(%a), kind=kLoop, calls=%fused_add
  %zero = s32[] constant(0)
  %begin = (f32[8]{0}, s32[]) tuple(%before, %zero)
  %while = (f32[8]{0}, s32[]) while(%begin), condition=%condition.1, body=%body.1
  ROOT %result = f32[8]{0} get-tuple-element(%while), index=0
}
"""


def test_a_loops_kernels():
    assert launched(PROGRAM) == [
        Launched("kernel.2", "(f32[8], f32[8])", "deep/product/pallas_call", is_ours=True),
        Launched("sum", "f32[8]", "head/add", is_ours=False),
        Launched("copy.3", "s32[]", "", is_ours=False),
    ]
    with pytest.raises(UserError, match="has no loop"):
        launched(PROGRAM.replace(" while(", " call("))


def test_without_a_compiler(monkeypatch):
    def missing(*_, **__):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(jax.sharding, "AbstractDevice", object, raising=False)
    monkeypatch.setattr(gpu_programs.topologies, "get_topology_desc", missing)
    with pytest.raises(UserError, match=r"^XLA's compiler for GPUs is missing: python -m pip install jax-cuda"):
        gpu_programs.hopper()
    monkeypatch.delattr(jax.sharding, "AbstractDevice")
    with pytest.raises(UserError, match=r"takes jax 0\.11 or newer"):
        gpu_programs.hopper()
    with pytest.raises(UserError, match="--layers must be between 2 and 30, got 1"):
        gpu_programs.main(["--layers", "1"])
