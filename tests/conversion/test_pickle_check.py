"""Pickles that run no code and would still hang or fill the memory; what `torch.save` really writes passes."""

from __future__ import annotations

import collections
import io
import pickle
import zipfile

import numpy as np
import pytest
import torch

from conversion.torch_file import TorchFile
from dvi_jax.errors import UserError

# The tuple (1, 1), then 60 times a pair of what came before: hashing it as a key takes 2 ** 60 steps.
NESTED = b"K\x01K\x01\x86q\x01" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(1, 61))
# The same with an instruction between making a tuple and storing it that leaves the stack alone.
HIDDEN = NESTED.replace(b"\x86q", b"\x86\x80\x02q").replace(b"\x86\x80\x02q\x01", b"\x86q\xf0q\x01")
EQUAL_HASHES = [pickle.LONG1 + b"\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"N" for n in range(1, 5000)]
HUGE = b"\x8a\x06\xff\xff\xff\xff\xff\x0f"
HOSTILE = {
    "nested tuples": (b"\x80\x02}" + NESTED + b"K\x01s.", "a tuple used twice"),
    "hidden tuples": (b"\x80\x02}" + HIDDEN + b"K\x01s.", "a tuple used twice"),
    "allocation": (b"\x80\x02}X\x01\x00\x00\x00xc__builtin__\nbytearray\n" + HUGE + b"\x85Rs.", "bytearray"),
    "equal hashes": (b"\x80\x02}(" + b"".join(EQUAL_HASHES) + b"u.", "too many instructions"),
    "other function": (b"\x80\x02}X\x01\x00\x00\x00xctorch\nload\n)Rs.", "torch load"),
    "doubling": (b"\x80\x02}" + b"2" * 10 + b".", "instruction DUP"),
}


def archive(data: bytes, compression: int = zipfile.ZIP_STORED, name: str = "archive/data.pkl") -> bytes:
    """A file as `torch.save` writes it, around any pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr(name, data)
        file.writestr("archive/version", b"3\n")
    return buffer.getvalue()


@pytest.mark.parametrize("name", HOSTILE)
def test_costly_pickles_are_refused_before_they_are_unpickled(tmp_path, name):
    data, reason = HOSTILE[name]
    path = tmp_path / "pytorch_model.bin"
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    for content in (archive(data), magic + data + pickle.dumps([], 2)):
        path.write_bytes(content)
        with pytest.raises(UserError, match="it holds more than plain tensors") as caught:
            TorchFile(path)
        assert reason in str(caught.value)


def test_archives_that_unpack_to_more_than_they_are(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(archive(b"\0" * 100_000_000, zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 200_000
    with pytest.raises(UserError, match="compressed parts"):
        TorchFile(path)
    path.write_bytes(archive(b"", name="archive/other"))
    with pytest.raises(UserError, match=r"no data\.pkl"):
        TorchFile(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_state_dicts_hold_passes(tmp_path, zipped):
    layer = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    state = layer.state_dict()  # an OrderedDict with attributes
    state["shared"] = state["0.weight"]
    state["view"] = state["0.weight"].t()
    state["half"] = torch.ones(2, 2, dtype=torch.bfloat16)
    state["parameter"] = torch.nn.Parameter(torch.ones(2))
    assert isinstance(state, collections.OrderedDict)
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    found = TorchFile(path)
    assert found.shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}
    (_, values), *_ = found.chunks("view")
    np.testing.assert_array_equal(values, state["0.weight"].numpy().T)
