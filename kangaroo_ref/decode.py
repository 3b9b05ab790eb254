"""Greedy decoding with the reference: one speculative round, the loop around it, and plain decoding.

Batch 1, the host reads each draft's confidence and each round's tokens, caches grow by concatenation: all as
in the original.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dvi_jax.errors import UserError
from kangaroo_ref.layers import KVCache
from kangaroo_ref.model import KangarooModel, crop

NO_EOS = -1


@dataclass
class DecodeState:
    """Where a generation stands; the base model's caches are on the base model.

    `start` is the position of the newest committed token, and the number of cached rows in the base model.
    """

    tokens: Tensor  # int64 [1, max_length]; committed up to `start`
    positions: Tensor  # int64 [1, max_length], 0, 1, 2, ...
    start: int
    adapter_cache: KVCache  # `start` rows, or one fewer after a fully accepted round
    exited: Tensor | None = None  # [1, W, D] exit hidden states of the last round's rows


@dataclass(frozen=True)
class Round:
    """What one round did: the tokens drafted, how many tokens it committed, whether it ended in eos."""

    drafted_ids: list[int]
    accept_length: int
    hit_eos: bool


@dataclass
class Generation:
    """Ids with the prompt; `accept_lengths` opens with the 1 of the prefill, then has one per round."""

    output_ids: list[int]
    accept_lengths: list[int] = field(default_factory=lambda: [1])
    drafted_ids: list[list[int]] = field(default_factory=list)  # one list per round

    @property
    def drafted(self) -> list[int]:
        """Number of tokens drafted in each round."""
        return [len(ids) for ids in self.drafted_ids]


@torch.no_grad()
def _run_prompt(model: KangarooModel, prompt: Tensor) -> tuple[dict[str, Tensor], KVCache]:
    # The whole prompt [1, T] through base and adapter, from empty caches.
    model.base.reset()
    hidden_exit = model.base.forward_draft_or_large_model(in_tokens_small=prompt)
    _, hidden_last = model.base.forward_draft_or_large_model(in_features_large=hidden_exit)
    logits = model.logits(hidden_last)
    adapter_out, cache = model.adapter.forward_early_stop(hidden_exit)
    stages = {"logits": logits, "hidden_exit": hidden_exit, "hidden_last": hidden_last}
    return {**stages, "adapter_out": adapter_out}, cache


def _as_rows(model: KangarooModel, prompt_ids: Sequence[int]) -> Tensor:
    if not prompt_ids:
        raise UserError("the prompt is empty; expected at least one token id")
    last = model.base.config.vocab_size - 1
    outside = [token for token in prompt_ids if not 0 <= token <= last]
    if outside:
        raise UserError(f"prompt token {outside[0]} is outside the vocabulary; expected 0 to {last}")
    return torch.tensor([list(prompt_ids)], dtype=torch.long, device=model.device)


def prompt_stages(model: KangarooModel, prompt_ids: Sequence[int]) -> dict[str, Tensor]:
    """Stage tensors of a prompt of T tokens, to compare with another implementation.

    `logits` and `adapter_logits` float32 [T, V]; `hidden_exit` (not normed), `hidden_last` (normed) and
    `adapter_out` (normed) [T, D] in the model's dtype.
    """
    stages, _ = _run_prompt(model, _as_rows(model, prompt_ids))
    stages["adapter_logits"] = model.logits(stages["adapter_out"])
    return {name: tensor[0] for name, tensor in stages.items()}


def prefill(model: KangarooModel, prompt_ids: Sequence[int], *, max_length: int = 2048) -> DecodeState:
    """Cache the prompt in base and adapter, commit the first new token; UserError if it is too long."""
    prompt = _as_rows(model, prompt_ids)
    length = prompt.shape[1]
    if length >= max_length:
        raise UserError(f"the prompt has {length} tokens; expected fewer than max_length, {max_length}")
    stages, cache = _run_prompt(model, prompt)
    tokens = torch.zeros(1, max_length, dtype=torch.long, device=model.device)
    tokens[:, :length] = prompt
    tokens[:, length] = stages["logits"][:, -1].argmax(dim=-1)
    positions = torch.arange(max_length, device=model.device)[None]
    return DecodeState(tokens, positions, start=length, adapter_cache=cache)


def _draft(model: KangarooModel, state: DecodeState, draft_steps: int, threshold: float) -> tuple[int, Tensor]:
    # Returns the end of the drafted positions and the exit hidden states of the rows to verify, start..end-1.
    exited: Tensor | None = None
    end, confidence = state.start + 1, 1.0
    for step in range(draft_steps + 1):
        row = slice(end - 1, end)
        hidden = model.base.forward_draft_or_large_model(
            in_tokens_small=state.tokens[:, row], position_ids=state.positions[:, row]
        )
        exited = hidden if exited is None else torch.cat([exited, hidden], dim=1)
        if step == draft_steps or (step > 0 and confidence < threshold):
            break
        if state.adapter_cache[0].shape[2] < end - 1:
            # The last draft of a fully accepted round never went through the adapter: catch up.
            assert state.exited is not None  # a round went before
            row = slice(end - 2, end)
            hidden = torch.cat([state.exited[:, -1:], hidden], dim=1)
        out, state.adapter_cache = model.adapter.forward_early_stop(
            hidden, state.positions[:, row], state.adapter_cache
        )
        logits = model.logits(out[:, -1:])
        state.tokens[:, end] = logits[:, -1].argmax(dim=-1)
        confidence = logits.softmax(dim=-1).max().item()
        end += 1
    assert exited is not None  # the pending token's row is always there
    return end, exited


@torch.no_grad()
def spec_decode_step(
    model: KangarooModel, state: DecodeState, *, draft_steps: int, threshold: float, eos_id: int = NO_EOS
) -> Round:
    """One round: draft, verify, accept, crop. Moves `state` and the base model's caches on."""
    start = state.start
    end, exited = _draft(model, state, draft_steps, threshold)
    _, normed = model.base.forward_draft_or_large_model(
        in_features_large=exited, position_ids=state.positions[:, start:end]
    )
    verified = model.logits(normed).argmax(dim=-1)[0].tolist()
    drafted = state.tokens[0, start + 1 : end].tolist()

    # Commit verified tokens while they equal the drafts, and with them the first one that differs, has no
    # draft or is eos.
    accepted = 0
    while accepted < len(drafted) and verified[accepted] == drafted[accepted] != eos_id:
        accepted += 1
    state.start = start + 1 + accepted
    state.tokens[0, state.start] = verified[accepted]

    state.exited = exited
    model.base.crop(state.start)
    if state.adapter_cache[0].shape[2] > state.start:
        state.adapter_cache = crop(state.adapter_cache, state.start)
    return Round(drafted, accepted + 1, hit_eos=verified[accepted] == eos_id)


def kangaroo_generate(
    model: KangarooModel,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    draft_steps: int = 6,
    threshold: float = 0.6,
    eos_id: int = NO_EOS,
    max_length: int = 2048,
) -> Generation:
    """Decode greedily with the original's loop: it may stop up to `draft_steps + 1` tokens early.

    The first new token is not checked against `eos_id`; UserError if the prompt does not fit.
    """
    state = prefill(model, prompt_ids, max_length=max_length)
    result = Generation(output_ids=[])
    limit = min(max_length, len(prompt_ids) + max_new_tokens) - 1 - draft_steps
    hit_eos = False
    while state.start < limit and not hit_eos:
        done = spec_decode_step(model, state, draft_steps=draft_steps, threshold=threshold, eos_id=eos_id)
        result.accept_lengths.append(done.accept_length)
        result.drafted_ids.append(done.drafted_ids)
        hit_eos = done.hit_eos
    result.output_ids = state.tokens[0, : state.start + 1].tolist()
    return result


@torch.no_grad()
def greedy_generate(
    model: KangarooModel, prompt_ids: Sequence[int], *, max_new_tokens: int, eos_id: int = NO_EOS
) -> list[int]:
    """Plain decoding, one row through all layers per token: prompt and up to `max_new_tokens` new ids."""
    ids, base = list(prompt_ids), model.base
    rows = _as_rows(model, prompt_ids)
    base.reset()
    for _ in range(max_new_tokens):
        hidden = base.forward_draft_or_large_model(in_tokens_small=rows)
        _, normed = base.forward_draft_or_large_model(in_features_large=hidden)
        rows = model.logits(normed)[:, -1].argmax(dim=-1, keepdim=True)
        ids.append(int(rows.item()))
        if ids[-1] == eos_id:
            break
    return ids
