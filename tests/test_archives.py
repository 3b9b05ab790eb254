"""Archives with any one byte changed, or cut anywhere: read, or refused with an exception that callers know."""

import io

import numpy as np
import pytest

from dvi_jax.archives import DAMAGED_NPZ, read_npz


def damaged(whole: bytes):
    for position in range(len(whole)):
        for value in (0, 1, 5, 255):
            yield whole[:position] + bytes([value]) + whole[position + 1 :]
        yield whole[:position]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_byte(tmp_path, save):
    buffer, path = io.BytesIO(), tmp_path / "x.npz"
    save(buffer, a=np.arange(3), b=np.ones((2, 1), np.float32))
    path.write_bytes(buffer.getvalue())
    np.testing.assert_array_equal(read_npz(path, "a")["a"], [0, 1, 2])
    assert list(read_npz(path)) == ["a", "b"]
    refused = set()
    for data in damaged(buffer.getvalue()):
        path.write_bytes(data)
        try:
            read_npz(path)
        except DAMAGED_NPZ as error:
            refused.add(type(error).__name__)
    assert {"BadZipFile", "EOFError", "RuntimeError", "NotImplementedError", "ValueError"} <= refused


def test_other_files(tmp_path):
    np.save(tmp_path / "one.npy", np.arange(3))
    np.savez(tmp_path / "objects.npz", a=np.array([{}], object))
    for name in ("one.npy", "objects.npz", "none.npz"):
        with pytest.raises(DAMAGED_NPZ):
            read_npz(tmp_path / name)
