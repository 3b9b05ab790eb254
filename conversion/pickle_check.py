"""Looking through a PyTorch file's pickles before PyTorch unpickles them.

Weights-only unpickling runs no code, but it can be made to hash nested tuples for ever, to allocate what it is told to,
or to unpack a small archive into a huge pickle. A state dict needs none of the means for that.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path

from dvi_jax.archives import DAMAGED_ZIP
from dvi_jax.errors import UserError
from dvi_jax.importing.files import open_file

MAX_PICKLE_BYTES = 64 << 20
_MAX_INSTRUCTIONS = 1 << 20
_MAX_LONGS = 4096  # as keys of a dict they could all have the same hash
_OLD_FORMAT_PICKLES = 5  # magic number, version, system, state dict, names of the storages

_TUPLES = {"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
_PUT, _GET = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}
_LONGS = {"INT", "LONG", "LONG1", "LONG4"}
_ALLOWED = {
    *(_TUPLES | _PUT | _GET | _LONGS),
    *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "NONE", "NEWTRUE", "NEWFALSE"),
    *("BININT", "BININT1", "BININT2", "BINUNICODE", "BINSTRING", "SHORT_BINSTRING"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS"),
}
_FUNCTIONS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
}


def check_torch_file(path: Path) -> None:
    """Raise `UserError` unless the pickles of `path` hold no more than a state dict of plain tensors needs."""
    with open_file(path) as file:
        is_archive = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        data = b"" if is_archive else file.read(MAX_PICKLE_BYTES)
    try:
        if is_archive:
            _check_pickle(io.BytesIO(_archived_pickle(path)))
        else:
            pickles = io.BytesIO(data)
            for _ in range(_OLD_FORMAT_PICKLES):
                _check_pickle(pickles)
    except _UnusualError as unusual:
        raise UserError(f"{path.name} refused: it holds more than plain tensors ({unusual}), not unpickled") from None
    except (IndexError, *DAMAGED_ZIP) as error:
        raise UserError(f"{path.name} is damaged or not a PyTorch file: {str(error)[:200]}") from error


class _UnusualError(Exception):
    """A pickle does what no state dict's does."""


def _archived_pickle(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        packed = [entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
        pickles = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
        if packed or not pickles:
            raise _UnusualError("compressed parts" if packed else "no data.pkl")
        if len(pickles) > 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
            raise _UnusualError("more than one data.pkl, or a huge one")
        return archive.read(pickles[0])


def _check_pickle(file: io.BytesIO) -> None:
    tuples: set[int] = set()
    longs, previous = 0, ""
    for number, (code, argument, _) in enumerate(pickletools.genops(file)):
        longs += code.name in _LONGS
        if code.name not in _ALLOWED:
            raise _UnusualError(f"instruction {code.name}")
        if code.name == "GLOBAL" and not _is_plain(argument):
            raise _UnusualError(f"{argument:.100}")
        if code.name in _PUT and previous in _TUPLES:
            tuples.add(argument)
        if code.name in _GET and argument in tuples:
            raise _UnusualError("a tuple used twice")
        if number > _MAX_INSTRUCTIONS or longs > _MAX_LONGS:
            raise _UnusualError("too many instructions")
        if code.name not in _PUT and code.name != "PROTO":  # these leave the value where it is
            previous = code.name


def _is_plain(name: str) -> bool:
    module, _, attribute = name.partition(" ")
    is_storage = module in ("torch", "torch.storage") and attribute.isidentifier() and attribute.endswith("Storage")
    return is_storage or name in _FUNCTIONS
