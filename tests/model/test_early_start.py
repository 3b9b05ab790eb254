"""Kernels that let the next one begin early: which of them say so, and to which GPUs."""

import jax
import jax.numpy as jnp
import pytest

from dvi_jax.model import early_start
from dvi_jax.model.attention_chunks import combine
from dvi_jax.model.decode_attention import cached_attention
from dvi_jax.model.decode_products import gated_product, product
from dvi_jax.model.peaks import peaks
from dvi_jax.model.residual import add_and_norm
from dvi_jax.model.tree_attention import Tree, tree_attention
from tests.lowering import gpu_text
from tests.model.test_quantised import FORMS, WIDTH, matrix, on_device


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def attention(heads, size):
    table = array(1, 1, 1, size // 2, dtype=jnp.float32)
    cache = array(1, heads, 64, size)
    args = (array(1, 16, 3 * heads, size), table, table, cache, cache, array(1, 1, dtype=jnp.int32))
    return (lambda qkv, cos, sin, key, value, at: cached_attention(qkv, (cos, sin), key, value, at)), args


def tree(heads, size):
    _, (qkv, _, _, key, value, _) = attention(heads, size)
    table = array(1, 2, 1, size // 2, dtype=jnp.float32)
    places = (array(1, 2, dtype=jnp.int32), array(1, 2, 2, dtype=jnp.int32), array(1, dtype=jnp.int32))

    def function(qkv, cos, sin, key, value, at, path, start):
        return tree_attention(qkv, (cos, sin), key, value, at, Tree(path, start, room=2), None)

    return function, (qkv, table, table, key, value, *places)


def chunks(heads, size):
    sums = array(3, 16, heads, size, dtype=jnp.float32), *[array(3, 16, heads, dtype=jnp.float32)] * 2
    return (lambda *parts: combine(*parts)), (*sums, array(1, 4, dtype=jnp.int32), array(16, heads, size))


def norm(width):
    return (lambda x, weight: add_and_norm(x, None, weight, 1e-5)), (array(16, width), array(width))


def products(function, out, rows=16):
    return (lambda x, weight: function(x, weight)), (array(rows, 192), array(out, 192))


def cases():
    return {
        "product": (products(product, 64), 1),
        "product of many rows": (products(product, 64, rows=64), 0),
        "gated product": (products(gated_product, 128), 0),  # before another product
        "narrow attention": (attention(2, 64), 1),
        "wide attention": (attention(32, 128), 0),
        "narrow tree": (tree(2, 64), 1),
        "wide tree": (tree(32, 128), 0),
        "narrow norm": (norm(2048), 1),
        "wide norm": (norm(4096), 0),
        "narrow chunks": (chunks(2, 64), 1),
        "wide chunks": (chunks(32, 128), 0),
        "peaks": ((lambda logits: peaks(logits, 2), (array(1, 3000, dtype=jnp.float32),)), 2),  # both kernels
    }


@pytest.fixture(params=[(9, 0), (8, 0)], ids=["Hopper", "Ampere"])
def gpu(monkeypatch, request):
    monkeypatch.setattr(early_start, "compute_capability", lambda: request.param)
    forget()  # what was traced for another GPU
    yield request.param
    forget()


def forget():
    for kernel in (cached_attention, tree_attention, gated_product, product, add_and_norm, peaks):
        kernel.clear_cache()


def test_only_hoppers_kernels_before_small_ones_say_so(gpu):
    for name, ((function, args), count) in cases().items():
        text = gpu_text(jax.jit(function), *args)
        assert text.count("griddepcontrol.launch_dependents") == (count if gpu >= (9, 0) else 0), name


@pytest.mark.parametrize("form", FORMS)
def test_products_of_fewer_bits_say_so_too(gpu, form):
    x, weight = array(16, WIDTH), on_device(matrix(form, 64))
    for kernel, count in ((product, 1), (gated_product, 0)):
        text = gpu_text(jax.jit(lambda x, weight, kernel=kernel: kernel(x, weight)), x, weight)
        assert text.count("griddepcontrol.launch_dependents") == (count if gpu >= (9, 0) else 0)
