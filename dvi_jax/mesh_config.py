"""How many devices work together: the setting `mesh`, and the option --mesh."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dvi_jax.errors import UserError
from dvi_jax.settings import require

MOST_DEVICES = 2**16


@dataclass(frozen=True)
class MeshConfig:
    """How many devices work together (`dvi_jax/mesh.py`)."""

    data: int = 1  # parts of a batch, or of an update's rows
    model: int = 1  # parts of the model's heads, feed-forward and vocabulary

    def __post_init__(self) -> None:
        for name in ("data", "model"):
            require(0 < getattr(self, name) <= MOST_DEVICES, f"mesh.{name}", getattr(self, name), "1 or more")

    def __str__(self) -> str:
        return f"data={self.data},model={self.model}"

    @property
    def is_several(self) -> bool:
        """Whether there is more than one device."""
        return self.data * self.model > 1

    def require_rows(self, name: str, rows: int) -> None:
        """Raise `UserError` unless the rows of the setting `name` divide among the devices along `data`."""
        require(rows % self.data == 0, name, rows, f"a multiple of mesh.data={self.data}")

    @classmethod
    def parse(cls, text: str) -> MeshConfig:
        """The mesh that `str` gives as `text`, or a part of it; `UserError` where there is none such."""
        sizes = dict(re.findall(r"(data|model)=([1-9]\d{0,5})", text, re.ASCII))
        if set(text.split(",")) != {f"{axis}={size}" for axis, size in sizes.items()}:
            raise UserError(f"mesh {text!r}: it must look like data=1,model=2")
        return cls(**{axis: int(size) for axis, size in sizes.items()})
