"""Reads files of ``torch.save`` without PyTorch and without running what is in them; writes them.

A pickle is a program that may call any function it can name. Here it can name only what describes
tensors, and gets stand-ins for that; every other name is refused. Both formats are read: the zip of
torch 1.6 and later, and the run of pickles with the raw storages behind them of older ones. What is
written is the zip, and nothing in it needs more than ``torch.load(path, weights_only=True)``.
"""

import contextlib
import io
import math
import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

_DTYPES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_STORAGES = {dtype: name for name, dtype in _DTYPES.items()}
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the two pickles that open the old format
_WANT = "want a file written by torch.save"


def read_torch_file(path: str | Path) -> Any:
    """Reads a state dict, or another tree of dicts, lists, tuples, tensors and plain values.

    Args:
        path: a file of torch.save, in the zip format or the one before torch 1.6.

    Returns:
        What was saved: OrderedDicts as dicts, tensors and parameters as contiguous numpy arrays
        (bfloat16 by ml_dtypes), each with memory of its own whatever it shares in the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not of torch.save, is damaged, does not hold what it says it holds,
            or names anything that tensors do not need. Nothing of it has been run.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; {_WANT}")
    with path.open("rb") as file:
        head, size = file.read(262), path.stat().st_size
        file.seek(0)
        try:
            if head.startswith(b"PK"):
                return _read_zip(file, size)
            if head.startswith(b"\x80"):
                return _read_legacy(file, size)
            found = f"starts with {head[:8]!r}" if head else "is empty"
            if head[257:] == b"ustar":
                found = "is a tar, torch's oldest format (load and save it with a newer torch)"
            raise ValueError(f"it {found}; {_WANT}")
        except OSError:
            raise
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is a damaged zip ({error}); was it cut short?") from error
        except Exception as error:  # a damaged pickle can end in any of them
            reason = " ".join(str(error).split()) or type(error).__name__  # MemoryErrors are silent
            raise ValueError(f"{path} cannot be read: {reason[:500]}") from error


class _Storage(NamedTuple):
    """A storage as the pickle names it. Tuples have no __dict__ that a pickle could fill."""

    key: str
    dtype: np.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Global:
    """What a pickle gets for a name: never the function or class itself, which it could change."""

    __slots__ = ("call", "name")

    def __init__(self, name: str, call: Callable | None = None):
        self.name, self.call = name, call

    def __call__(self, *args: Any) -> Any:
        if self.call is None:
            raise ValueError(f"its pickle calls {self.name}")
        return self.call(*args)

    def __setstate__(self, state: Any) -> None:
        raise ValueError(f"its pickle tries to change {self.name}")


class _OrderedDict(dict):
    """A module's state dict comes with an attribute, torch's version numbers: dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


def _tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    numbers = (offset, *size, *stride)
    if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"it has a tensor of size {size}, stride {stride} and offset {offset}")
    if metadata:  # torch's lazy negative and conjugate: the stored values would be wrong
        raise ValueError(f"it has a tensor with {metadata}, which is not supported")
    return _Tensor(storage, offset, tuple(size), tuple(stride))


def _parameter(data, requires_grad=True, hooks=None):
    return data


_GLOBALS = {
    ("collections", "OrderedDict"): _Global("OrderedDict", _OrderedDict),
    ("torch", "Size"): _Global("torch.Size", tuple),
    ("torch._utils", "_rebuild_tensor_v2"): _Global("_rebuild_tensor_v2", _tensor),
    ("torch._utils", "_rebuild_parameter"): _Global("_rebuild_parameter", _parameter),
} | {("torch", name): _Global(name) for name in _DTYPES}


class _Unpickler(pickle.Unpickler):
    """Builds the tree with a _Tensor for each tensor, and notes the storages they name."""

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data))
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> _Global:
        if (module, name) not in _GLOBALS:
            raise ValueError(f"it asks for {module}.{name}, which no tensor needs; do not trust it")
        return _GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, global_, key, _, numel, *view = pid
        known = kind == "storage" and isinstance(global_, _Global) and global_.name in _DTYPES
        if not known or type(key) is not str or type(numel) is not int or numel < 0 or any(view):
            raise ValueError(f"it has a storage {pid!r}, which is not supported")
        storage = _Storage(key, _DTYPES[global_.name], numel)
        if self.storages.setdefault(key, storage).nbytes != storage.nbytes:
            raise ValueError(f"it gives storage {key!r} two sizes")
        return storage


def _unpickle(file: IO[bytes]) -> tuple[Any, dict[str, _Storage]]:
    """Reads the pickle that begins at the file's position, and the storages it names."""
    start = file.tell()
    for opcode, arg, position in pickletools.genops(file):
        if opcode.name.startswith("EXT"):  # its cache goes past find_class
            raise ValueError(f"its pickle uses {opcode.name}, which no tensor needs")
        # The memo is an array, so index 2**31 alone would fill 32 GB. Picklers count from 0.
        if opcode.name.endswith("PUT") and (arg or 0) > (position or 0):
            raise ValueError(f"its pickle has memo index {arg} at byte {position}")
    size = file.tell() - start
    file.seek(start)
    unpickler = _Unpickler(file.read(size))
    return unpickler.load(), unpickler.storages


def _read_zip(file: IO[bytes], size: int) -> Any:
    with zipfile.ZipFile(file) as archive:
        names, entries = archive.namelist(), archive.infolist()
        roots = [name[:-8] for name in names if name.split("/")[1:] == ["data.pkl"]]
        if len(roots) != 1:
            raise ValueError(f"it is a zip of {names[:3]}, without a FOLDER/data.pkl; {_WANT}")
        # torch does not compress, so entries that unpack to more than the file are a bomb
        if any(e.compress_type for e in entries) or sum(e.file_size for e in entries) > size:
            raise ValueError("it is a zip with compressed or overlapping entries")
        byte_order = f"{roots[0]}byteorder"
        _check_byte_order(byte_order not in names or archive.read(byte_order) == b"little")
        tree, storages = _unpickle(io.BytesIO(archive.read(f"{roots[0]}data.pkl")))
        data = {key: archive.read(f"{roots[0]}data/{key}") for key in storages}
    for key, storage in storages.items():
        if len(data[key]) != storage.nbytes:
            raise ValueError(f"storage {key!r} has {len(data[key])} bytes; want {storage.nbytes}")
    return _with_arrays(tree, data, size)


def _read_legacy(file: IO[bytes], size: int) -> Any:
    if _unpickle(file)[0] != _MAGIC:
        raise ValueError(f"it is a pickle, but not torch's; {_WANT}")
    if (protocol := _unpickle(file)[0]) != _PROTOCOL:
        raise ValueError(f"it has protocol version {protocol!r}; want {_PROTOCOL}")
    _check_byte_order(_unpickle(file)[0]["little_endian"])
    tree, storages = _unpickle(file)
    keys, _ = _unpickle(file)
    if sorted(keys) != sorted(storages):
        raise ValueError(f"it has storages {keys[:3]}...; its tensors use {[*storages][:3]}...")
    data = {}
    for key in keys:
        (numel,), storage = struct.unpack("<q", file.read(8)), storages[key]
        if numel != storage.numel:
            raise ValueError(f"storage {key!r} has {numel} numbers; want {storage.numel}")
        if storage.nbytes > size - file.tell():
            raise ValueError(f"it ends in storage {key!r}, after {size} bytes; was it cut short?")
        data[key] = file.read(storage.nbytes)
    return _with_arrays(tree, data, size)


def _check_byte_order(little: Any) -> None:
    if little is not True:
        raise ValueError("it was written on a big-endian machine, which is not supported")


def _with_arrays(tree: Any, data: dict[str, bytes], size: int) -> Any:
    """Copies the tree, with arrays for its tensors."""
    left = 4 * size + 2**26  # views may overlap, but not without end
    # By id, as what is shared in the tree could otherwise double with each of its levels.
    done: dict[int, Any] = {}

    def convert(x: Any) -> Any:
        nonlocal left
        if x is None or type(x) in (bool, int, float, str, bytes):
            return x
        if id(x) not in done:
            done[id(x)] = done  # until it is finished
            if type(x) is _Tensor:
                left -= math.prod(x.size) * x.storage.dtype.itemsize
                if left < 0:
                    raise ValueError(f"it has a tensor of size {x.size} by repeating its numbers")
                done[id(x)] = _array(x, data[x.storage.key])
            elif type(x) in (dict, _OrderedDict):
                done[id(x)] = {convert(key): convert(value) for key, value in x.items()}
            elif type(x) in (list, tuple):
                done[id(x)] = type(x)([convert(value) for value in x])
            else:
                raise ValueError(f"it holds a {getattr(x, 'name', type(x).__name__)}")
        if done[id(x)] is done:
            raise ValueError(f"it has a {type(x).__name__} that holds itself")
        return done[id(x)]

    return convert(tree)


def _array(tensor: _Tensor, data: bytes) -> np.ndarray:
    """A copy of the tensor's numbers, none of them from outside its storage."""
    (_, dtype, numel), offset, size, stride = tensor
    if len(size) != len(stride):
        raise ValueError(f"it has a tensor of size {size} with stride {stride}")
    if 0 in size:
        return np.empty(size, dtype)
    if offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) >= numel:
        raise ValueError(
            f"it has a tensor of size {size}, stride {stride}, offset {offset} in {numel} numbers"
        )
    # numpy takes any byte for a bool, and goes on to compute with it
    bits = np.dtype(np.uint8) if dtype.kind == "b" else dtype
    flat = np.frombuffer(data, bits)[offset:]
    strides = [step * bits.itemsize for step in stride]
    view = np.lib.stride_tricks.as_strided(flat, size, strides, writeable=False)
    return np.array(view if bits is dtype else view != 0, order="C")


def write_torch_file(path: str | Path, tree: Any) -> None:
    """Writes what `read_torch_file` and torch.load (weights_only=True, too) read back.

    The file gets its name when it is complete: a write that fails leaves nothing, or the old file.

    Args:
        path: where to; a file that is there is replaced.
        tree: dicts, lists, tuples, plain values, and numpy arrays of the types torch stores, which
            become contiguous tensors. Arrays that are the same memory share one storage, as aliased
            parameters do in torch: once they are loaded, to change one is to change the other.

    Raises:
        OSError: the file cannot be written.
        ValueError: the tree holds anything else.
    """
    path, writer = Path(path), _Writer()
    program = b"\x80\x02" + writer.ops(tree) + b"."
    records = {"data.pkl": program, "byteorder": b"little", "version": b"3\n"}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with zipfile.ZipFile(temporary, "w") as archive:
            for name, data in records.items():
                archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
            for key, array in writer.storages.values():
                archive.writestr(zipfile.ZipInfo(f"archive/data/{key}"), array.tobytes())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # what went wrong before is what has to be told
            temporary.unlink()
        raise


class _Writer:
    """Turns a tree into the opcodes that push it, and notes the storages they name.

    Python's own pickler imports what it names, to see that it is there; torch need not be.
    """

    def __init__(self):
        self.storages: dict[Any, tuple[str, np.ndarray]] = {}  # memory and layout -> key, array

    def ops(self, x: Any) -> bytes:
        if x is None or type(x) in (bool, int, float, str):
            return pickle.dumps(x, 2)[2:-1]  # without the protocol and the stop
        if type(x) is dict:
            return b"}(" + b"".join(self.ops(part) for item in x.items() for part in item) + b"u"
        if type(x) is list:
            return b"](" + b"".join(map(self.ops, x)) + b"e"
        if type(x) is tuple:
            return b"(" + b"".join(map(self.ops, x)) + b"t"
        if type(x) is np.ndarray and x.dtype in _STORAGES:
            return self._tensor_ops(x)
        kind = f"array of {x.dtype}" if isinstance(x, np.ndarray) else type(x).__name__
        raise ValueError(f"a file of torch.save cannot hold the {kind} {str(x)[:60]!r} here")

    def _tensor_ops(self, x: np.ndarray) -> bytes:
        memory = x.__array_interface__["data"][0], x.strides, x.shape, x.dtype
        key, _ = self.storages.setdefault(memory, (str(len(self.storages)), x))
        kind = f"ctorch\n{_STORAGES[x.dtype]}\n".encode()
        storage = b"(" + self.ops("storage") + kind
        storage += b"".join(map(self.ops, (key, "cpu", x.size))) + b"tQ"
        stride = tuple(math.prod(x.shape[i + 1 :]) for i in range(x.ndim))
        place = b"".join(map(self.ops, (0, x.shape, stride, False)))  # the last: requires_grad
        hooks = b"ccollections\nOrderedDict\n)R"
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + place + hooks + b"tR"
