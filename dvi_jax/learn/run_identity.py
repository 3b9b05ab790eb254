"""What a run is: the model, the data and the settings that must stay as they are when it is resumed.

`run.json` in a run's directory holds them by name, and what may change beside them. Their digest, taken when the run
begins, is also in every snapshot and in the checkpoint's manifest, so that neither can be taken for another run's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dvi_jax.checkpoint import Checkpoint, Manifest
from dvi_jax.config import DistillConfig, TrainConfig
from dvi_jax.directories import replace_file
from dvi_jax.errors import UserError
from dvi_jax.identity import hash_base, hash_tree
from dvi_jax.text_files import read_json

RUN = "run.json"
# How long a run goes on, how fast it learns, what it tells and keeps: another value makes no other run of it.
MAY_CHANGE = {
    *("prompts", "max_minutes", "tokens"),
    *("mesh.data", "mesh.model"),  # other roundings, the same run
    *("optimizer.lora_lr", "optimizer.head_lr", "slow.lr", "lr"),
    *("eval_every", "save_every", "log_every", "keep_checkpoints", "keep_best", "tensorboard"),
    *("rollback.after", "rollback.collapse", "rollback.settle", "rollback.at_most"),
}
# Where things are, and what a checkpoint may say in their place: `identify` names what these come to.
RESOLVED = {"checkpoint", "out", "drafter", "drafter_options", "exit_layer", "shallow_rank", "slow.rank_d"}
DATA = {"data", "data.files"}


@dataclass(frozen=True)
class RunIdentity:
    """Values (JSON) by name. `digest` is SHA-256 in hexadecimal over `fixed` as it was when the run began."""

    fixed: dict[str, Any]
    free: dict[str, Any]
    digest: str

    @classmethod
    def of(cls, fixed: dict[str, Any], free: dict[str, Any]) -> RunIdentity:
        """The identity of a run that begins with these values."""
        text = json.dumps(fixed, sort_keys=True)
        return cls(json.loads(text), json.loads(json.dumps(free)), hashlib.sha256(text.encode()).hexdigest())

    def resuming(self, begun: RunIdentity, out: Path) -> tuple[RunIdentity, list[dict[str, Any]]]:
        """This identity as that of the run which began in `out` as `begun`, and a record of every value that changed.

        `UserError` naming the first value that must not change. Values that only one of the two has are of another
        release and are not compared.
        """
        for name, value in self.fixed.items():
            if begun.fixed.get(name, value) != value:
                raise UserError(
                    f"{out} holds a run with {name} {_shown(begun.fixed[name])}, which cannot be resumed with"
                    f" {_shown(value)}: set it back, or choose another out"
                )
        changes = [
            {"setting": name, "before": begun.free[name], "now": value}
            for name, value in self.free.items()
            if begun.free.get(name, value) != value
        ]
        return replace(self, digest=begun.digest), changes

    def write(self, directory: Path) -> None:
        """Write `run.json` in place of an earlier one."""
        replace_file(directory / RUN, json.dumps(asdict(self), indent=1) + "\n")


def read_identity(directory: Path) -> RunIdentity | None:
    """What `RunIdentity.write` left; None in a directory of a release that wrote none."""
    path = directory / RUN
    if not path.exists():
        return None
    document = read_json(path)
    kinds = {"fixed": dict, "free": dict, "digest": str}
    if not isinstance(document, dict) or {name: type(value) for name, value in document.items()} != kinds:
        raise UserError(f"{path} is damaged: it must hold {', '.join(kinds)}; put it back, or choose another out")
    return RunIdentity(**document)


def identify(
    config: TrainConfig | DistillConfig, checkpoint: Checkpoint, manifest: Manifest, data: dict[str, Any]
) -> RunIdentity:
    """The identity of a run that learns from `data`, beginning with `checkpoint`'s weights.

    `manifest` is the loaded model's, with the drafter's options complete.
    """
    settings = {name: value for name, value in by_name(asdict(config)) if name not in RESOLVED | DATA}
    trained = {"drafter": checkpoint.drafter, "lora": checkpoint.lora}
    texts = [checkpoint.tokenizer_json, checkpoint.chat_template, checkpoint.special_tokens]
    fixed = {
        "trainer": type(config).__name__,
        "model.weights": checkpoint.manifest.base_sha256 or hash_base(checkpoint.base),
        "model.config": _digest(checkpoint.config.to_json()),
        "model.tokenizer": _digest(texts),
        "model.trained parts": hash_tree({name: tree for name, tree in trained.items() if tree}),
        "draft_vocabulary": _digest(checkpoint.draft_vocabulary),
        "calibration": manifest.calibration,  # where rollouts stop drafting, with a threshold
        "exit_layer": manifest.exit_layer,
        "drafter": manifest.drafter,
        **{f"drafter_options.{name}": value for name, value in manifest.drafter_config.items()},
        **{f"lora.{name}": value for name, value in manifest.lora.items()},
        **data,
    }
    fixed |= {name: value for name, value in settings.items() if name not in MAY_CHANGE and name not in fixed}
    return RunIdentity.of(fixed, {name: value for name, value in settings.items() if name in MAY_CHANGE})


def by_name(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting, so that one which a later release adds is compared with nothing."""
    for name, value in settings.items():
        if isinstance(value, dict) and prefix + name not in RESOLVED:
            yield from by_name(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _shown(value: object) -> str:
    """A value as a message shows it, a digest by its beginning."""
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text[:12]}..." if len(text) == 64 and text.isalnum() else text[:200]
