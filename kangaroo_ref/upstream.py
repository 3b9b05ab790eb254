"""Running an untouched checkout of the original Kangaroo, checked by SHA-256, on given weights and prompts.

The four files are executed from the bytes that were hashed, in modules that exist only while they run;
nothing else of the checkout is imported, and nothing is written into it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dvi_jax.errors import UserError
from kangaroo_ref.decode import NO_EOS
from kangaroo_ref.weights import read_config, read_state_dict

TRANSFORMERS_VERSION = "4.33.3"
# Equationliu/Kangaroo at 4f0949d, in an order in which each file's imports come before it.
UPSTREAM_SHA256 = {
    "kangaroo/earlyexit.py": "7d57d5c108f27d155649d3ff03058942441bc9d4a03709386cfa756847831265",
    "kangaroo/adapter.py": "6ca79a5b5a5675d650666720fbd62a9a4673f3bd50d35bb41e851b142e870889",
    "kangaroo/kangaroo_model.py": "7de1a8d2c3c5ae3d72d60439522d2cd1a1ed94b84d1f183005653a0269a5d3ba",
    "evaluation/inference_kangaroo.py": "1d137673e7d9e86b04b4ce3dbb7c11abd9b06a4b2095e486d43bcda611b7baa3",
}
PACKAGES = ("kangaroo", "evaluation", "fastchat")
HEAD_INDEX = "pytorch_model.bin.index.json"


def read_checkout(kangaroo_dir: str | Path) -> dict[str, bytes]:
    """The four upstream files by relative path; UserError naming the first one that is missing or differs."""
    sources = {}
    for name, expected in UPSTREAM_SHA256.items():
        path = Path(kangaroo_dir) / name
        if not path.is_file():
            raise UserError(f"{path} is missing; expected a checkout of Equationliu/Kangaroo at 4f0949d")
        sources[name] = path.read_bytes()
        found = hashlib.sha256(sources[name]).hexdigest()
        if found != expected:
            raise UserError(f"{path} is not the untouched upstream file: sha256 {found}; expected {expected}")
    return sources


def _stubs() -> dict[str, ModuleType]:
    # What the four files import besides torch, transformers and each other. The evaluation helpers serve only
    # upstream's command line, which is not run.
    modules = {name: ModuleType(name) for name in (*PACKAGES, "fastchat.utils", "evaluation.eval")}
    for name in PACKAGES:
        modules[name].__path__ = []
    vars(modules["fastchat.utils"])["str_to_torch_dtype"] = lambda name: getattr(torch, name)
    vars(modules["evaluation.eval"]).update(run_eval=None, reorg_answer_file=None)
    return modules


def _is_ours(name: str) -> bool:
    return name.split(".")[0] in PACKAGES


@contextmanager
def upstream_modules(kangaroo_dir: str | Path) -> Iterator[dict[str, ModuleType]]:
    """The four files as modules, by dotted name; importable only inside the context."""
    sources = read_checkout(kangaroo_dir)
    hidden = {name: module for name, module in sys.modules.items() if _is_ours(name)}
    for name in hidden:
        del sys.modules[name]
    loaded = _stubs()
    try:
        sys.modules.update(loaded)
        for path, source in sources.items():
            name = path.removesuffix(".py").replace("/", ".")
            module = loaded[name] = sys.modules[name] = ModuleType(name)
            module.__file__ = str(Path(kangaroo_dir) / path)
            exec(compile(source, module.__file__, "exec"), module.__dict__)
        yield loaded
    finally:
        for name in [name for name in sys.modules if _is_ours(name)]:
            del sys.modules[name]
        sys.modules.update(hidden)


def _check_transformers() -> None:
    import transformers

    if transformers.__version__ != TRANSFORMERS_VERSION:
        raise UserError(f"upstream runs on transformers {TRANSFORMERS_VERSION}; found {transformers.__version__}")


def _as_upstream_reads(base_dir: Path, scratch: Path) -> Path:
    # Upstream takes its head from the .bin shard that an index names: safetensors, single-file and tied
    # models are rewritten to that form.
    index = base_dir / HEAD_INDEX
    if index.is_file() and "lm_head.weight" in json.loads(index.read_text(encoding="utf-8"))["weight_map"]:
        return base_dir
    state = read_state_dict(base_dir)
    if read_config(base_dir).tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    torch.save(state, scratch / "pytorch_model.bin")
    weight_map = dict.fromkeys(state, "pytorch_model.bin")
    (scratch / HEAD_INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    shutil.copy(base_dir / "config.json", scratch / "config.json")
    return scratch


def _load_without_accelerate(model_class: Any) -> None:
    # Upstream asks for device_map="auto", which needs the accelerate package and changes nothing on a CPU.
    load = model_class.from_pretrained.__func__

    def without_device_map(cls: Any, *args: Any, device_map: object = None, **options: Any) -> Any:
        return load(cls, *args, **options)

    model_class.from_pretrained = classmethod(without_device_map)


@dataclass(frozen=True)
class Upstream:
    """Upstream's model, loaded in float32 on the CPU, with its own decoding function."""

    model: Any  # upstream's KangarooModel
    forward: Callable[..., Any]  # upstream's kangaroo_forward
    exit_layer: int

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        draft_steps: int,
        threshold: float,
        eos_id: int = NO_EOS,
        max_length: int = 2048,
    ) -> tuple[list[int], list[int]]:
        """Output ids with the prompt, and accept lengths opening with the 1 of the prefill."""
        output, _, _, accept_lengths = self.forward(
            SimpleNamespace(input_ids=torch.tensor([list(prompt_ids)])),
            self.model,
            SimpleNamespace(eos_token_id=eos_id),
            max_new_tokens,
            max_length=max_length,
            EARLY_STOP_LAYER=self.exit_layer,
            SPECULATIVE_DECODING_STEPS=draft_steps,
            threshold=threshold,
        )
        return output[0], accept_lengths

    @torch.no_grad()
    def stages(self, prompt_ids: Sequence[int]) -> dict[str, Tensor]:
        """The same stage tensors as `kangaroo_ref.prompt_stages`."""
        output = self.model.base_model(torch.tensor([list(prompt_ids)]), output_hidden_states=True)
        hidden_exit = output.hidden_states[self.exit_layer]
        adapter_out = self.model.adapter_model.forward_early_stop(inputs_embeds=hidden_exit)
        stages = {
            "logits": output.logits,
            "hidden_exit": hidden_exit,
            "hidden_last": output.hidden_states[-1],
            "adapter_out": adapter_out,
            "adapter_logits": self.model.head_model(adapter_out).float(),
        }
        return {name: tensor[0] for name, tensor in stages.items()}


@contextmanager
def load_upstream(
    kangaroo_dir: str | Path, base_dir: str | Path, adapter_dir: str | Path, exit_layer: int
) -> Iterator[Upstream]:
    """Upstream's model on the given weights; usable inside the context only.

    UserError for a checkout that differs, naming the file, or another transformers than 4.33.3.
    """
    with upstream_modules(kangaroo_dir) as modules, tempfile.TemporaryDirectory() as scratch:
        _check_transformers()
        _load_without_accelerate(modules["kangaroo.earlyexit"].EarlyExitLlamaForCausalLM)
        model = modules["kangaroo.kangaroo_model"].KangarooModel(
            str(_as_upstream_reads(Path(base_dir), Path(scratch))),
            str(adapter_dir),
            SimpleNamespace(dtype="float32"),
            EARLY_STOP_LAYER=exit_layer,
        )
        yield Upstream(model.eval(), modules["evaluation.inference_kangaroo"].kangaroo_forward, exit_layer)


def run_upstream(
    kangaroo_dir: str | Path,
    base_dir: str | Path,
    adapter_dir: str | Path,
    prompt_ids: Sequence[int],
    draft_steps: int,
    threshold: float,
    eos_id: int,
    exit_layer: int,
    max_new_tokens: int,
) -> tuple[list[int], list[int]]:
    """One prompt through upstream: output ids and accept lengths. For several, use `load_upstream` once."""
    with load_upstream(kangaroo_dir, base_dir, adapter_dir, exit_layer) as upstream:
        return upstream.generate(
            prompt_ids,
            max_new_tokens=max_new_tokens,
            draft_steps=draft_steps,
            threshold=threshold,
            eos_id=eos_id,
        )
