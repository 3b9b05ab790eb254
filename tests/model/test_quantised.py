"""Matrices in fewer bits: what they stand for, and the kernels that read them, interpreted, beside NumPy in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dvi_jax.importing.rounding import rounded
from dvi_jax.model.decode_products import gated_product, product
from dvi_jax.model.product_blocks import blocks_for, part_count, sum_parts
from dvi_jax.model.products import linear
from dvi_jax.model.quantised import Quantised
from dvi_jax.quantisation import Quantisation
from tests.lowering import gpu_text

FORMS = ("int8", "float8", "int4", "int4 in bytes", "int4 with minima", "int8 in groups")
ROWS, OUT, WIDTH, GROUP = 32, 40, 768, 64


def matrix(form, out=OUT):
    """Random integers and scales; the widest of a form, so that nothing is only right for small numbers."""
    rng = np.random.default_rng(out)
    scales = rng.uniform(0.5, 2, (out, WIDTH // GROUP)).astype(np.float16) / 64
    if form.startswith("int4"):
        minima = (-8 * scales).astype(np.float16) if "minima" in form else None
        if "bytes" in form:
            return Quantised(rng.integers(0, 256, (out, WIDTH // 2), np.uint8), scales)
        return Quantised(rng.integers(0, 65536, (out, WIDTH // 4), np.uint16), scales, minima)
    integers = rng.integers(-127, 128, (out, WIDTH), np.int8)
    if form == "int8 in groups":
        return Quantised(integers, scales)
    values = integers if form == "int8" else (integers * 3.5).astype(ml_dtypes.float8_e4m3fn)
    return Quantised(values, scales[:, 0].astype(np.float32))


def stands_for(quantised):
    """float64 [out, in], weight by weight."""
    out, width = quantised.shape
    whole = np.empty((out, width))
    for row in range(out):
        for column in range(width):
            group, place = divmod(column, quantised.group)
            if quantised.values.dtype == np.uint16:
                word = int(quantised.values[row, group // 4 * quantised.group + place])
                integer = (word >> 4 * (group % 4) & 15) - (8 if quantised.minima is None else 0)
            elif quantised.values.dtype == np.uint8:
                half = quantised.group // 2
                byte = int(quantised.values[row, group * half + place % half])
                integer = (byte >> 4 if place >= half else byte & 15) - 8
            else:
                integer = float(quantised.values[row, column])
            at = (row, group) if quantised.is_grouped else row
            whole[row, column] = integer * float(quantised.scales[at])
            if quantised.minima is not None:
                whole[row, column] += float(quantised.minima[at])
    return whole


def on_device(quantised):
    return jax.tree.map(jnp.asarray, quantised)


@pytest.fixture(scope="module")
def rows():
    return jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, WIDTH)), jnp.bfloat16)


@pytest.mark.parametrize("form", FORMS)
def test_kernels_are_the_formula_and_rows_do_not_meet(form, rows):
    quantised = matrix(form)
    whole = stands_for(quantised)
    np.testing.assert_array_equal(quantised.dequantised(np.float32), whole.astype(np.float32))
    np.testing.assert_array_equal(on_device(quantised).dequantised(jnp.float32), whole.astype(np.float32))
    weight, parts = on_device(quantised), 2
    found = product(rows, weight, parts=parts, out_dtype=jnp.float32, interpret=True)
    # Words of four groups are not divided: of three times 256 terms the first part has two.
    middle = 512 if quantised.values.dtype == np.uint16 else WIDTH // 2
    halves = (np.s_[:, :middle], np.s_[:, middle:])
    expected = np.stack([np.asarray(rows, np.float64)[half] @ whole[half].T for half in halves])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    # Other rows change, and none of this one's bits; nor do they for another number of rows.
    other = product(rows.at[3].multiply(-2), weight, parts=parts, out_dtype=jnp.float32, interpret=True)
    np.testing.assert_array_equal((np.asarray(found) != other).any(axis=(0, 2)), np.arange(ROWS) == 3)
    fewer = product(rows[:16], weight, parts=parts, out_dtype=jnp.float32, interpret=True)
    np.testing.assert_array_equal(fewer, found[:, :16])


@pytest.mark.parametrize("form", FORMS)
def test_linear_is_the_product_with_what_it_stands_for(form, rows):
    quantised = matrix(form)
    x = rows[:3].astype(jnp.float32)
    expected = np.asarray(x, np.float64) @ stands_for(quantised).T
    np.testing.assert_allclose(linear(x, on_device(quantised)), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_swiglu_of_quantised_gates(form, rows):
    weight = on_device(matrix(form, 2 * OUT))
    gate, up = (
        np.asarray(product(rows, weight.rows(half), interpret=True)[0], np.float64)
        for half in (slice(OUT), slice(OUT, None))
    )
    silu = (gate / (1 + np.exp(-gate))).astype(ml_dtypes.bfloat16).astype(np.float64)
    found = np.asarray(gated_product(rows, weight, interpret=True), np.float64)
    np.testing.assert_allclose(found, (silu * up).astype(ml_dtypes.bfloat16), rtol=2.0**-7, atol=1e-30)


@pytest.mark.parametrize("form", FORMS)
def test_kernels_lower_for_a_gpu(form):
    """What Pallas refuses shows without one."""
    weight = on_device(matrix(form, 64))
    x = jax.ShapeDtypeStruct((16, WIDTH), jnp.bfloat16)
    for kernel in (product, gated_product):
        assert gpu_text(kernel, x, weight)


def test_parts_are_whole_groups():
    assert part_count((4096, 11008)) == part_count((4096, 11008), 128) == 2
    assert part_count((1024, 11008), 64) == 4
    assert part_count((1024, 11008), 128) == 2  # 43 groups of 128 are no two parts
    weight = Quantised(np.zeros((1024, 2752), np.uint16), np.zeros((1024, 172), np.float16))
    assert sum_parts(weight) == 4
    weight = Quantised(np.zeros((1024, 5504), np.uint8), np.zeros((1024, 86), np.float16))
    assert sum_parts(weight) == 2
    assert {blocks_for(weight.shape, 2, count).parts for count in (16, 64, 256)} == {2}


@pytest.mark.parametrize(
    ("how", "most"),  # error, of the largest weight that shares a scale
    [
        (Quantisation(weights="int8"), 1 / 254),
        (Quantisation(weights="float8"), 1 / 28),  # four bits of mantissa, the last of which is rounded
        (Quantisation(weights="int4", group=32), 0.31),  # cut off, at most by what the range shrinks by
        (Quantisation(weights="int4", group=128), 0.31),
    ],
    ids=str,
)
def test_rounding_is_near(how, most):
    rows = np.random.default_rng(1).normal(size=(16, WIDTH)).astype(np.float32)
    rows[3] = 0
    found = rounded(rows, how)
    assert found.group == (how.group if how.weights == "int4" else WIDTH)
    error = np.abs(found.dequantised(np.float32) - rows)
    assert error[3].max() == 0
    largest = np.abs(rows.reshape(16, -1, found.group)).max(axis=2).repeat(found.group, axis=1)
    assert (error <= most * largest + 1e-6).all()


def test_four_bits_take_the_range_of_least_error():
    rows = np.random.default_rng(2).normal(size=(64, WIDTH)).astype(np.float32)
    found = rounded(rows, Quantisation(weights="int4", group=128)).dequantised(np.float32)
    grouped = rows.reshape(64, -1, 128)
    scales = np.abs(grouped).max(axis=2, keepdims=True) / 7
    whole_range = (np.rint(grouped / scales) * scales).reshape(rows.shape)
    assert np.square(found - rows).sum() < 0.95 * np.square(whole_range - rows).sum()


def test_rows_without_groups_are_kept_in_eight_bits():
    found = rounded(np.ones((4, 48), np.float32), Quantisation(weights="int4"))
    assert found.values.dtype == np.int8
    assert not found.is_grouped
