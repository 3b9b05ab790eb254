"""The kernel of an exchange through peer memory, in Pallas for Mosaic GPU.

The protocol is that of NCCL's "LL": of each eight bytes four are data and four a flag, and they arrive together. Who
waits looks at them until the flag is the exchange's number. So nothing is fenced, signalled or cleared on the way. An
inbox has two slots that take turns: who sends exchange i + 2 has heard i + 1 from all, who sent that behind reading i.
It is new in every pass, and zero; a pass's first exchange begins with a barrier, so nobody writes before all are clear.
That barrier is one of all devices of the mesh, which therefore must make the same passes.

Letters: n devices along `model`, P parts, R rows, D hidden, U units: two numbers that travel together with their flags.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu

from dvi_jax.model.peer_memory import MOST_PROGRAMS, MOST_UNITS, THREADS

LONGEST_WAIT = 50_000_000  # looks at a flag, half a minute: then a device is lost, and the program ends
WITHOUT_BARRIER = "skip_device_barrier"  # an option of kernels that jax 0.10 does not have
Ref = Any


def is_there() -> bool:
    """Whether this jax can compile it."""
    return WITHOUT_BARRIER in {field.name for field in dataclasses.fields(plgpu.CompilerParams)}


@partial(jax.jit, static_argnames=("rows", "is_first"))  # traced and lowered once for all layers
def exchange(
    parts: jax.Array, units: jax.Array, number: jax.Array, *, rows: int, is_first: bool
) -> tuple[jax.Array, jax.Array]:
    """One exchange, the `number`-th of its pass, int32 [1]; also `units` as they are then."""
    n = units.shape[1]
    shape = (n * len(parts), rows, parts.shape[2])
    count = len(parts) * rows * shape[2] // 2
    each = next(k for k in (1, 2, 4, MOST_UNITS) if count <= MOST_PROGRAMS * THREADS * k)
    options: dict[str, Any] = {"lowering_semantics": mgpu.LoweringSemantics.Lane, WITHOUT_BARRIER: not is_first}
    box = jax.new_ref(units)
    whole = plgpu.kernel(
        partial(_kernel, n=n, each=each),
        out_type=jax.ShapeDtypeStruct(shape, jnp.float32),
        grid=(-(-count // (THREADS * each)),),
        grid_names=("programs",),
        compiler_params=plgpu.CompilerParams(**options),
        kernel_name="exchange",
    )(parts, number, box)
    return whole, jax.freeze(box)


def _kernel(parts: Ref, number: Ref, units: Ref, whole: Ref, *, n: int, each: int) -> None:
    """One program: `each` units of every thread."""
    refs = plgpu.RefType()
    plgpu.inline_mgpu(arg_types=(refs, refs, refs, refs))(partial(_program, n=n, each=each))(
        parts, number, units, whole
    )


def _program(ctx: Any, parts: Any, number: Any, units: Any, whole: Any, *, n: int, each: int) -> None:
    """What one thread does, written down operation by operation; numbers are the kernel's, of 32 bits."""
    _, padded_rows, size = parts.type.shape
    shape = whole.type.shape
    count, stride = shape[0] // n * shape[1] * size // 2, units.type.shape[2]
    own, box, out = (mgpu_utils.memref_ptr(array) for array in (parts, units, whole))

    # Which units: those of a program lie together, so that neighbours read and write together. Threads beyond the end
    # take the last one, but send nothing: it might come when the inbox is gone already.
    thread = arith.index_cast(_i32(), gpu.thread_id(gpu.Dimension.x))
    block = arith.index_cast(_i32(), gpu.block_id(gpu.Dimension.x))
    first = arith.addi(_times(block, THREADS * each), thread)
    wanted = [arith.addi(first, _constant(k * THREADS)) for k in range(each)]
    inside = [arith.cmpi(arith.CmpIPredicate.ult, unit, _constant(count)) for unit in wanted]
    mine = [arith.minui(unit, _constant(count - 1)) for unit in wanted]

    # Who is who: devices along `model` have numbers in a row.
    device = ctx.device_id()
    me = arith.remui(device, _constant(n))
    others = [arith.remui(arith.addi(me, _constant(k)), _constant(n)) for k in range(1, n)]
    flag = _run("ld.global.u32 $0, [$1];", _i32(), mgpu_utils.memref_ptr(number))
    slot = _times(arith.andi(flag, _constant(1)), n)

    # Send: own parts, without the rows that fill up a tile.
    sent = []
    for unit in mine:
        part = arith.divui(unit, _constant(shape[1] * size // 2))
        place = _at(own, arith.addi(unit, _times(part, (padded_rows - shape[1]) * size // 2)), 2)
        sent.append(_run("ld.global.v2.u32 {$0, $1}, [$2];", [_i32()] * 2, place))
    for other in others:
        there = mgpu_utils.memref_ptr(ctx.to_remote(units, arith.addi(arith.subi(device, me), other)))
        row = _times(arith.addi(slot, me), stride)
        for unit, (low, high), only in zip(mine, sent, inside, strict=True):
            place = _at(there, arith.addi(row, unit), 4)
            _run("st.volatile.global.v4.u32 [$0], {$1, $2, $3, $4};", None, place, low, flag, high, flag, only=only)

    def keep(owner: Any, values: Any) -> None:
        for unit, (low, high) in zip(mine, values, strict=True):
            place = _at(out, arith.addi(_times(owner, count), unit), 2)
            _run("st.global.v2.u32 [$0], {$1, $2};", None, place, low, high)

    # Receive: from each of the others in turn.
    keep(me, sent)
    for other in others:
        row = _times(arith.addi(slot, other), stride)
        places = [_at(box, arith.addi(row, unit), 4) for unit in mine]
        received = _run(_waiting(each), [_i32()] * (2 * each), *places, flag)
        keep(other, zip(received[::2], received[1::2], strict=True))


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)


def _constant(value: int) -> Any:
    return mgpu_utils.c(value, _i32())


def _times(value: Any, by: int) -> Any:
    return arith.muli(value, _constant(by))


def _at(pointer: Any, unit: Any, words: int) -> Any:
    """Pointer to a unit in an array whose units are so many words of 32 bits."""
    return mgpu_utils.getelementptr(pointer, [_times(unit, words)], _i32())


def _run(ptx: str, results: Any, *arguments: Any, only: Any = None) -> Any:
    """PTX, which nothing moves away; `only`: a condition for a single instruction."""
    return mgpu_utils.inline_ptx(  # type: ignore[attr-defined] # of jax 0.11
        ptx, *arguments, result_types=results, predicate=only, has_side_effects=True
    )


def _waiting(each: int) -> str:
    """PTX that loads units from `each` places until all have the flag; results, places and flag are its operands."""
    lines = [f".reg .pred stop; .reg .u32 data<{2 * each}>, flag<{2 * each}>, looks;", "mov.u32 looks, 0;", "again:"]
    for k in range(each):
        low, high = 2 * k, 2 * k + 1
        lines.append(f"ld.volatile.global.v4.u32 {{data{low}, flag{low}, data{high}, flag{high}}}, [${2 * each + k}];")
    lines += ["add.u32 looks, looks, 1;", f"setp.gt.u32 stop, looks, {LONGEST_WAIT};", "@stop trap;"]
    for word in range(2 * each):
        lines += [f"setp.ne.u32 stop, flag{word}, ${3 * each};", "@stop bra again;"]
    lines += [f"mov.u32 ${word}, data{word};" for word in range(2 * each)]  # last: results may lie where operands did
    return "{\n" + "\n".join(lines) + "\n}"
