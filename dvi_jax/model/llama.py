"""Early-exit Llama: one model split at `exit_layer` into `shallow` (drafts) and `deep` (verifies).

Weights come as the tree a checkpoint's `base/` holds (`base_shapes`). Letters as in `layers.py`; L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dvi_jax.config import WHOLE_KV, LlamaConfig
from dvi_jax.errors import UserError
from dvi_jax.model import attention, decode_attention, decode_products, exchange
from dvi_jax.model.attention import AnyCache, Caches
from dvi_jax.model.features import check_taps
from dvi_jax.model.layers import Block
from dvi_jax.model.products import linear
from dvi_jax.model.quantised import Matrix, frozen
from dvi_jax.model.residual import Residual
from dvi_jax.model.variables import Base

Tapped = tuple[jax.Array, ...]  # hidden states [B, T, D] of the tapped layers that ran, lowest first


class VerifyingPass(NamedTuple):
    """What a round's rows come to."""

    hidden: jax.Array  # [B, T, D], exit hidden states, not normed
    final: jax.Array  # [B, T, D], normed
    tapped: Tapped
    logits: jax.Array  # float32 [B, T, V], of a device's own part of the vocabulary
    shallow: tuple[Any, ...]  # the caches
    deep: tuple[Any, ...]


def base_shapes(config: LlamaConfig) -> dict[str, Any]:
    """Shape of every weight, as a tree with string keys. `head` is absent when the embedding is tied."""
    d, f = config.hidden_size, config.intermediate_size
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    block = {
        "attn_norm": (d,),
        "qkv": (query + 2 * kv, d),
        **({"qkv_bias": (query + 2 * kv,)} if config.qkv_bias else {}),
        "out": (d, query),
        "mlp_norm": (d,),
        "gate_up": (2 * f, d),
        "down": (d, f),
    }
    shapes: dict[str, Any] = {
        "embed": (config.vocab_size, d),
        "layers": {str(i): dict(block) for i in range(config.num_layers)},
        "norm": (d,),
    }
    if not config.tie_word_embeddings:
        shapes["head"] = (config.vocab_size, d)
    return shapes


def random_base(
    config: LlamaConfig, key: jax.Array, dtype: jnp.dtype = jnp.float32, std: float = 0.02
) -> dict[str, Any]:
    """A random weight tree (norms 1, all else normal with `std`), for tests and speed measurements."""
    shapes, tree = jax.tree.flatten_with_path(base_shapes(config), is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(shapes))
    return jax.tree.unflatten(
        tree,
        [
            jnp.ones(shape, dtype) if path[-1].key.endswith("norm") else _normal(k, shape, dtype, std)
            for k, (path, shape) in zip(keys, shapes, strict=True)
        ],
    )


@partial(jax.jit, static_argnames=("shape", "dtype", "std"))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, std: float) -> jax.Array:
    return (jax.random.normal(key, shape, dtype) * std).astype(dtype)


class Llama(nnx.Module):
    """A Llama whose layers below `exit_layer` and from it on can be run apart.

    Both halves take and return explicit KV caches; nothing is stored on the module. Both also give the hidden states
    that somebody `taps`: the stream as it enters those layers, which the first norm there adds up in any case.
    """

    def __init__(
        self,
        config: LlamaConfig,
        base: dict[str, Any],
        exit_layer: int,
        *,
        taps: tuple[int, ...] = (),
        shards: int = 1,
    ):
        """`base`: tree of `base_shapes(config)`. `exit_layer` in 0..L-1, 0 where nothing is to be split off below.

        `taps`: ascending layer numbers in 1..L-1; tap i is the hidden state after i layers. Others: `UserError`.
        `shards`: devices that have a part of the model each, of which `config` then is (`mesh.shard_config`).
        """
        last = config.num_layers - 1
        if not 0 <= exit_layer <= last:
            raise UserError(
                f"exit_layer must be between 1 and {last} for a model of {config.num_layers} layers, got {exit_layer}"
            )
        self.config = config
        self.exit_layer = exit_layer
        self.taps = check_taps(taps, config.num_layers)
        self.shards = shards
        self.kv = WHOLE_KV  # what `init_caches` keeps keys and values in, changed by `equalised.keep_kv`
        heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        self.embed = Base(base["embed"])
        self.layers = nnx.List(
            [Block(base["layers"][str(i)], heads, config.rms_norm_eps, shards) for i in range(config.num_layers)]
        )
        self.norm = Base(base["norm"])
        self.is_tied = "head" not in base
        if not self.is_tied:
            self.head = frozen(base["head"])

    @property
    def dtype(self) -> jnp.dtype:
        """Type of weights and activations, and of caches unless `kv` says otherwise."""
        return self.embed.dtype

    def head_weight(self) -> Matrix:
        """The LM head [V, D], or this device's part of it, [V/n, D]: the embedding where tied and not quantised."""
        return (self.embed if self.is_tied else self.head)[...]

    def shallow(
        self,
        tokens: jax.Array,
        caches: Sequence[AnyCache] | None,
        positions: jax.Array,
        *,
        adapted: bool = False,
        fresh: bool = False,
    ) -> tuple[jax.Array, Tapped, tuple[Any, ...]]:
        """Embedding and layers below `exit_layer`, on int tokens [B, T] at consecutive `positions` [B, T].

        Returns the exit hidden state [B, T, D] (not normed; the embedding at exit layer 0), the tapped states
        [B, T, D] of these layers, and the caches (none: ()). `adapted` turns lora_S on: in the draft pass only, never
        on the way to the verifier. Without caches, or when `fresh` (a prefill: nothing lies in the caches yet), rows
        see only the rows of this call.
        """
        fresh, layers = fresh or caches is None, range(self.exit_layer)
        return self._to_exit(layers, tokens, caches, positions, adapted=adapted, fresh=fresh)[1:]

    def deep(
        self, hidden: jax.Array, caches: Sequence[AnyCache] | None, positions: jax.Array, *, fresh: bool = False
    ) -> tuple[jax.Array, Tapped, tuple[Any, ...]]:
        """Layers from `exit_layer` on and the final norm, on exit hidden states [B, T, D]; `fresh` as in `shallow`.

        Returns the normed final hidden state [B, T, D], the tapped states of these layers, and the caches (none: ()).
        """
        fresh = fresh or caches is None
        residual = self._stream(range(self.exit_layer, self.config.num_layers), hidden, fresh=fresh)
        normed, tapped, caches = self._from_exit(residual, caches, positions, fresh=fresh)
        return decode_products.by_sequence(normed, positions), tapped, caches

    def verify(
        self, tokens: jax.Array, shallow: Sequence[AnyCache], deep: Sequence[AnyCache], positions: jax.Array
    ) -> VerifyingPass:
        """A round's tokens [B, T] through both halves and the head; it has no derivative.

        What `shallow`, `deep` and `round_logits` give one after the other, in every bit: on a GPU rows stay as the
        kernels have them between these, which spares some that only lay them out.
        """
        residual, hidden, below, shallow = self._to_exit(
            range(self.config.num_layers), tokens, shallow, positions, adapted=False, fresh=False
        )
        normed, above, deep = self._from_exit(residual, deep, positions, fresh=False)
        final = decode_products.by_sequence(normed, positions)
        return VerifyingPass(hidden, final, below + above, self.round_logits(normed, positions), shallow, deep)

    def logits(self, normed: jax.Array) -> jax.Array:
        """LM head: normed hidden [..., D] -> float32 logits [..., V], of a device's own part of the vocabulary."""
        with jax.named_scope("head"):
            return linear(normed, self.head_weight(), jnp.float32)

    def round_logits(self, normed: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """`logits` of a round's rows [B, T, D], which on a GPU do not depend on their number and have no derivative.

        The rows at `positions` [B, T] may be given as kernels have them, [R, D].
        """
        with jax.named_scope("head"):
            return decode_products.round_linear(normed, self.head_weight(), jnp.float32, positions)

    def all_logits(self, logits: jax.Array) -> jax.Array:
        """Logits over the whole vocabulary, from those of this device's part of it."""
        return logits if self.shards == 1 else exchange.whole(logits)

    def own_ids(self) -> jax.Array | None:
        """int32 [V/n], the tokens of this device's part of the vocabulary; None for all."""
        if self.shards == 1:
            return None
        rows = self.head_weight().shape[0]
        return exchange.first_id(rows) + jnp.arange(rows, dtype=jnp.int32)

    def init_caches(self, batch: int, slots: int) -> tuple[Caches, Caches]:
        """Empty caches for `shallow` and for `deep`, `slots` positions each."""
        below = self.exit_layer
        make = attention.init_caches
        return (
            make(self.config, below, batch, slots, self.dtype, self.kv),
            make(self.config, self.config.num_layers - below, batch, slots, self.dtype, self.kv),
        )

    def _to_exit(
        self,
        layers: range,
        tokens: jax.Array,
        caches: Sequence[AnyCache] | None,
        positions: jax.Array,
        *,
        adapted: bool,
        fresh: bool,
    ) -> tuple[Residual, jax.Array, Tapped, tuple[Any, ...]]:
        """The stream at the exit layer, on its way through `layers` in all, and what `shallow` returns."""
        with jax.named_scope("shallow"):
            x = self.embed[...][tokens] if self.shards == 1 else exchange.looked_up(self.embed[...], tokens)
            below, stream = range(self.exit_layer), self._stream(layers, x, fresh=fresh)
            residual, tapped, caches = self._run(below, stream, caches, positions, adapted=adapted, fresh=fresh)
            return residual, decode_products.by_sequence(residual.total(), positions), tapped, caches

    def _from_exit(
        self, stream: Residual, caches: Sequence[AnyCache] | None, positions: jax.Array, *, fresh: bool
    ) -> tuple[jax.Array, Tapped, tuple[Any, ...]]:
        """A stream from the exit layer on: what `deep` returns, the final hidden state as the stream lies."""
        with jax.named_scope("deep"):
            above = range(self.exit_layer, self.config.num_layers)
            residual, tapped, caches = self._run(above, stream, caches, positions, adapted=False, fresh=fresh)
            return residual.normed(self.norm[...], self.config.rms_norm_eps)[1], tapped, caches

    def _stream(self, layers: range, x: jax.Array, *, fresh: bool) -> Residual:
        """Rows x [B, T, D] as the stream that these `layers` take one after the other; `fresh`: without caches."""
        # A prefill has rows enough, and where there is no cache something may be differentiated.
        rows, few = x.shape[0] * x.shape[1], x.shape[1] <= decode_attention.MOST_ROUND_ROWS
        kernels = not fresh and few and attention.has_round_kernels(rows, self.config.head_dim, x.dtype)
        inbox = None
        if kernels and self.shards > 1 and layers:
            parts = max(self.layers[index].exchanged_parts() for index in layers)  # matrices may differ in form
            inbox = exchange.inbox_for(parts, rows, self.config.hidden_size)
        return Residual(decode_products.laid_flat(x) if kernels else x, kernels=kernels, inbox=inbox)

    def _run(
        self,
        layers: range,
        residual: Residual,
        caches: Sequence[AnyCache] | None,
        positions: jax.Array,
        *,
        adapted: bool,
        fresh: bool,
    ) -> tuple[Residual, Tapped, tuple[Any, ...]]:
        """Run `layers` on a stream; the other arguments are those of `shallow`, and without caches it is `fresh`."""
        config = self.config
        frequencies = attention.rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        rope = attention.rope_tables(frequencies, positions)
        tapped: list[jax.Array] = []
        updated: list[AnyCache] = []
        for index, cache in zip(layers, caches or (None,) * len(layers), strict=True):
            entered, residual, new_cache = self.layers[index](
                residual, rope, cache, positions, adapted=adapted, fresh=fresh
            )
            if index in self.taps:
                tapped.append(decode_products.by_sequence(entered, positions))
            if new_cache is not None:
                updated.append(new_cache)
        return residual, tuple(tapped), tuple(updated)
