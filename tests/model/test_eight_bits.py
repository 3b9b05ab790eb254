"""What a GPU's instructions make of eight bits, followed bit by bit, against ml_dtypes; every value there is."""

import re

import ml_dtypes
import numpy as np
import pytest

from dvi_jax.model.eight_bits import FLOATS, INTEGERS

BYTES = np.arange(256, dtype=np.uint8)


def run(assembly: str, word: int) -> list[int]:
    """The output registers after PTX's instructions, as its manual defines them, with `word` in the input."""
    registers = {"$2": word}

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for line in re.findall(r"^\s*(\w[\w.]* .*);", assembly, re.MULTILINE):
        name, operands = line.split(" ", 1)
        target, *sources = operands.split(", ")
        a, *others = map(value, sources)
        if name == "prmt.b32":
            pool = [*a.to_bytes(4, "little"), *others[0].to_bytes(4, "little")]
            found = int.from_bytes(bytes(pool[others[1] >> 4 * i & 7] for i in range(4)), "little")
        elif name == "lop3.b32":
            b, c, table = others
            found = sum((table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32))
        elif name == "fma.rn.bf16x2":
            halves = (np.array([x], np.uint32).view(ml_dtypes.bfloat16).astype(np.float64) for x in (a, *others))
            x, y, z = halves
            exact = x * y + z  # in 53 bits
            found = int(exact.astype(ml_dtypes.bfloat16).view(np.uint32)[0])
        elif name == "shr.u32":
            found = a >> others[0]
        elif name == "and.b32":
            found = a & others[0]
        else:
            assert name == "mov.b32"
            found = a
        registers[target] = found
    return [registers["$0"], registers["$1"]]


@pytest.mark.parametrize(("assembly", "kind"), [(INTEGERS, np.int8), (FLOATS, ml_dtypes.float8_e4m3fn)])
def test_every_value_is_exact(assembly, kind):
    """Each byte in each of the four places, sign of zero included; a float's two NaN are left out."""
    for shift in range(4):
        four = np.stack([np.roll(BYTES, shift * 64 + i) for i in range(4)], axis=1)
        words = np.ascontiguousarray(four).view("<u4")[:, 0]
        found = np.array([run(assembly, int(word)) for word in words], "<u4").view(ml_dtypes.bfloat16)
        expected = four.view(kind).astype(ml_dtypes.bfloat16)
        known = ~np.isnan(expected.astype(np.float32))
        np.testing.assert_array_equal(found.view(np.uint16)[known], expected.view(np.uint16)[known])
