"""Files of torch.save without torch: all of what they say, and nothing of what they would do.

The files here are put together from pickle's own opcodes, so that they can say anything; two tests
compare with what torch writes, and with what it reads of ours.
"""

import copyreg
import io
import os
import pickle
import tarfile
import zipfile
from typing import Any

import ml_dtypes
import numpy as np
import official
import pytest

from beats_jax.convert import to_official
from beats_jax.pretrained import load_model
from beats_jax.torch_file import read_torch_file, write_torch_file

MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
FORMATS = ("zip", "legacy")


def ops(value):
    """The opcodes that push a plain value."""
    return pickle.dumps(value, 2)[2:-1]


def storage_ops(kind="FloatStorage", key="0", numel=6, *view):
    tail = b"".join(map(ops, (key, "cpu", numel, *view)))
    return b"(" + ops("storage") + b"ctorch\n" + kind.encode() + b"\n" + tail + b"tQ"


def tensor_ops(storage, size=(2, 3), stride=(3, 1), offset=0, *more):
    args = b"".join(map(ops, (offset, size, stride, False)))
    hooks = b"ccollections\nOrderedDict\n)R" + b"".join(map(ops, more))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + args + hooks + b"tR"


def write(path, style, program, storages=None, *, little=True, compression=0, numel=None):
    """A file of torch.save that holds what `program` pushes. storages: key -> array."""
    storages = storages or {}
    program = b"\x80\x02" + program + b"."
    if style == "zip":
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("archive/data.pkl", program)
            archive.writestr("archive/byteorder", "little" if little else "big")
            for key, array in storages.items():
                archive.writestr(f"archive/data/{key}", array.tobytes())
    else:
        head = (pickle.dumps(x, 2) for x in (MAGIC, 1001, SYSTEM | {"little_endian": little}))
        data = [*head, program, pickle.dumps(list(storages), 2)]
        for array in storages.values():
            data.append(np.int64(array.size if numel is None else numel).tobytes())
            data.append(array.tobytes())
        path.write_bytes(b"".join(data))
    return path


def refused(path):
    """The one line that says why `path` is refused."""
    with pytest.raises(ValueError) as error:
        read_torch_file(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


SIX = np.arange(6, dtype=np.float32)


def test_both_formats_hold_the_weights_of_the_spec():
    cfg, want = official.state_dict("dev_encoder")
    for name in ("dev_encoder", "dev_encoder_legacyformat"):
        got = read_torch_file(official.FIXTURES / f"{name}.pt")
        assert got.keys() == {"cfg", "model"} and got["cfg"] == cfg
        assert type(got["model"]) is dict and got["model"].keys() == want.keys()
        for key, value in got["model"].items():
            np.testing.assert_array_equal(value, want[key], key, strict=True)
            assert value.flags.c_contiguous and value.flags.writeable and value.flags.owndata


@pytest.mark.parametrize("name", ["dev_finetuned", "dev_tokenizer"])
def test_the_other_kinds_hold_the_weights_of_their_spec(name):
    cfg, want = official.state_dict(name)
    got = read_torch_file(official.FIXTURES / f"{name}.pt")
    assert got["cfg"] == cfg and got["model"].keys() == want.keys()
    for key, value in got["model"].items():
        np.testing.assert_array_equal(value, want[key], key, strict=True)


@pytest.mark.parametrize("style", FORMATS)
def test_types(tmp_path, style):
    kinds = {
        "DoubleStorage": np.float64,
        "HalfStorage": np.float16,
        "BFloat16Storage": ml_dtypes.bfloat16,
        "LongStorage": np.int64,
        "IntStorage": np.int32,
        "ShortStorage": np.int16,
        "CharStorage": np.int8,
        "ByteStorage": np.uint8,
    }
    arrays = {kind: SIX.astype(dtype) for kind, dtype in kinds.items()}
    bits = np.array([0, 1, 2, 255, 0, 1], np.uint8)
    items = [tensor_ops(storage_ops(kind, kind)) for kind in [*kinds, "BoolStorage"]]
    program = b"](" + b"".join(items) + b"e"
    *got, truth = read_torch_file(
        write(tmp_path / "x", style, program, arrays | {"BoolStorage": bits})
    )
    for value, want in zip(got, arrays.values(), strict=True):
        np.testing.assert_array_equal(value, want.reshape(2, 3), strict=True)
    np.testing.assert_array_equal(truth, bits.reshape(2, 3) != 0, strict=True)
    assert set(truth.tobytes()) == {0, 1}


@pytest.mark.parametrize("style", FORMATS)
def test_views_of_one_storage(tmp_path, style):
    storage = storage_ops()
    shapes = {
        "transposed": ((3, 2), (1, 3), 0),
        "row": ((3,), (1,), 3),
        "scalar": ((), (), 5),
        "repeated": ((4, 2), (0, 1), 1),
        "empty": ((0, 3), (3, 1), 0),
        "past_the_end_but_empty": ((0,), (1,), 6),
    }
    pairs = b"".join(ops(key) + tensor_ops(storage, *shape) for key, shape in shapes.items())
    parameter = b"ctorch._utils\n_rebuild_parameter\n(" + tensor_ops(storage) + ops(True) + b"NtR"
    # a module's state dict has an attribute; it is not read
    program = b"ccollections\nOrderedDict\n)R(" + pairs + ops("parameter") + parameter + b"u"
    program += b"}" + ops("_metadata") + b"}sb"
    got = read_torch_file(write(tmp_path / "x", style, program, {"0": SIX}))
    want = {
        "transposed": SIX.reshape(2, 3).T,
        "row": SIX[3:],
        "scalar": SIX[5],
        "repeated": np.tile(SIX[1:3], (4, 1)),
        "empty": np.zeros((0, 3), np.float32),
        "past_the_end_but_empty": np.zeros(0, np.float32),
        "parameter": SIX.reshape(2, 3),
    }
    assert type(got) is dict and got.keys() == want.keys()
    for key, value in want.items():
        np.testing.assert_array_equal(got[key], value, key)
        assert got[key].shape == np.shape(value) and got[key].flags.c_contiguous
    got["row"][:] = -1  # a copy of its own
    assert got["parameter"].min() == 0


@pytest.mark.parametrize("style", FORMATS)
def test_plain_values_and_what_they_share(tmp_path, style):
    program = b"}(" + ops("cfg") + ops({"a": [1, 2.5, None, True, "ä", (2**70, -1)]})
    program += ops("size") + b"ctorch\nSize\n" + ops(((2, 3),)) + b"R"
    # the same tensor twice by the memo, and tuples that double 60 times
    program += ops("x") + tensor_ops(storage_ops()) + b"q\x50" + ops("y") + b"h\x50"
    program += ops("many") + b"]q\x51" + b"h\x51\x86q\x51" * 60 + b"u"
    got = read_torch_file(write(tmp_path / "x", style, program, {"0": SIX}))
    assert got["cfg"] == {"a": [1, 2.5, None, True, "ä", (2**70, -1)]}
    assert got["size"] == (2, 3)
    np.testing.assert_array_equal(got["x"], got["y"])


class Call:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def attacks(canary):
    """Programs that make the folder `canary` if they are run, and the name they are caught by."""
    command, code = f"mkdir {canary}", f"__import__('os').mkdir({str(canary)!r})"
    path = ops(str(canary))
    return {
        "system": (ops(Call(os.system, command)), "posix.system"),
        "eval": (ops(Call(eval, code)), "__builtin__.eval"),
        "exec in protocol 4": (pickle.dumps(Call(exec, code), 4)[:-1], "builtins.exec"),
        "INST": (b"(" + path + b"ios\nmkdir\n", "os.mkdir"),
        "OBJ": (b"(cos\nmkdir\n" + path + b"o", "os.mkdir"),
        "NEWOBJ": (b"cos\nmkdir\n" + path + b"\x85\x81", "os.mkdir"),
        "in a cfg": (b"}" + ops("cfg") + b"cos\nmkdir\n" + path + b"\x85Rs", "os.mkdir"),
        "through a module": (b"ctorch.os\nmkdir\n" + path + b"\x85R", "torch.os.mkdir"),
        "through an attribute": (
            b"\x80\x04" + ops("torch") + ops("os.mkdir") + b"\x93" + path + b"\x85R",
            "torch.os.mkdir",
        ),
        "a method of an allowed class": (
            b"\x80\x04"
            + ops("collections")
            + ops("OrderedDict.fromkeys")
            + b"\x93"
            + path
            + b"\x85R",
            "OrderedDict.fromkeys",
        ),
        "in a storage": (
            tensor_ops(b"(" + ops("storage") + b"cos\nmkdir\n" + path + b"\x85RtQ"),
            "os.mkdir",
        ),
        "torch.load": (b"ctorch\nload\n" + path + b"\x85R", "torch.load"),
        "getattr": (b"c__builtin__\ngetattr\n(tR", "__builtin__.getattr"),
    }


@pytest.mark.parametrize("style", FORMATS)
@pytest.mark.parametrize("name", attacks("/"))
def test_a_pickle_that_would_run_something(tmp_path, style, name):
    canary = tmp_path / "canary"
    program, caught = attacks(canary)[name]
    assert caught in refused(write(tmp_path / "x", style, program))
    assert not canary.exists()


def test_the_attacks_would_work(tmp_path):
    """Otherwise the test above shows nothing."""
    for name in ("system", "eval", "exec in protocol 4", "INST", "OBJ", "in a cfg"):
        canary = tmp_path / "canary"
        pickle.loads(b"\x80\x02" + attacks(canary)[name][0] + b".")
        canary.rmdir()


@pytest.mark.parametrize("style", FORMATS)
@pytest.mark.parametrize("opcode", [b"\x82\xf0", b"\x83\xf0\x00", b"\x84\xf0\x00\x00\x00"])
def test_an_extension_code(tmp_path, style, opcode):
    """Once a code has been used it comes out of a cache, and find_class is not asked."""
    canary = tmp_path / "canary"
    program = opcode + ops((str(canary),)) + b"R"
    copyreg.add_extension("os", "mkdir", 0xF0)
    try:
        pickle.loads(program + b".")
        canary.rmdir()
        assert "EXT" in refused(write(tmp_path / "x", style, program))
    finally:
        copyreg.remove_extension("os", "mkdir", 0xF0)
    assert not canary.exists()


ALLOWED = (
    b"ccollections\nOrderedDict\n",
    b"ctorch\nSize\n",
    b"ctorch\nFloatStorage\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    storage_ops(),
    tensor_ops(storage_ops()),
)
STATE = ops({"call": "changed", "__call__": "changed", "__reduce__": "changed"})


@pytest.mark.parametrize("style", FORMATS)
@pytest.mark.parametrize("target", ALLOWED)
@pytest.mark.parametrize("state", [STATE, b"N" + STATE + b"\x86", b"(" + ops("call") * 2 + b"t"])
def test_a_pickle_cannot_change_what_it_is_given(tmp_path, style, target, state):
    refused(write(tmp_path / "x", style, target + state + b"b", {"0": SIX}))
    refused(write(tmp_path / "x", style, target + ops("call") * 2 + b"s", {"0": SIX}))
    refused(write(tmp_path / "x", style, target + b"(" + ops("call") + b"e", {"0": SIX}))
    path = write(tmp_path / "x", style, tensor_ops(storage_ops()), {"0": SIX})
    np.testing.assert_array_equal(read_torch_file(path), SIX.reshape(2, 3), strict=True)


@pytest.mark.parametrize("style", FORMATS)
def test_what_is_left_over_is_refused(tmp_path, style):
    for program, message in (
        (b"ctorch\nFloatStorage\n", "holds a FloatStorage"),
        (storage_ops(), "holds a _Storage"),
        (b"ctorch\nFloatStorage\n)R", "calls FloatStorage"),
        (b"]q\x00h\x00a", "holds itself"),
        (b"]" + b"(" * 9 + b"l" * 9 + b"a", None),
        (b"]" * 20000 + b"a" * 19999, "recursion"),
        (b"]r\xff\xff\xff\x7f", "memo index 2147483647"),
        (b"\x80\x04\x8f", "holds a set"),
        (b"Pname\n", "cannot be read"),
        (b"]Q", "cannot be read"),
        (tensor_ops(b"N"), "has a tensor of size"),
    ):
        path = write(tmp_path / "x", style, program, {"0": SIX} if b"storage" in program else {})
        if message is None:
            assert read_torch_file(path) == [[[[[[[[[[]]]]]]]]]]
        else:
            assert message in refused(path)


@pytest.mark.parametrize("style", FORMATS)
@pytest.mark.parametrize(
    "program, message",
    [
        (tensor_ops(storage_ops(), (7,), (1,)), r"size (7,), stride (1,), offset 0 in 6 numbers"),
        (tensor_ops(storage_ops(), (2, 3), (3, 1), 1), "offset 1 in 6 numbers"),
        (tensor_ops(storage_ops(), (2, 3), (4, 1)), "stride (4, 1)"),
        (tensor_ops(storage_ops(), (), (), 6), "offset 6 in 6 numbers"),
        (tensor_ops(storage_ops(), (2,), (-1,), 5), "stride (-1,)"),
        (tensor_ops(storage_ops(), (2,), (1,), -1), "offset -1"),
        (tensor_ops(storage_ops(), (2, 3), (1,)), "stride (1,)"),
        (tensor_ops(storage_ops(), (2.0,), (1,)), "size (2.0,)"),
        (tensor_ops(storage_ops(), (2**33,), (0,)), "repeating its numbers"),
        (tensor_ops(storage_ops(), (2**62, 4), (0, 0)), "repeating its numbers"),
        (b"](" + tensor_ops(storage_ops(), (2**12, 2**10), (0, 0)) * 20 + b"e", "repeating"),
        (tensor_ops(storage_ops(), (2, 3), (3, 1), 0, {"neg": True}), "'neg': True"),
        (tensor_ops(storage_ops(numel=7)), "want"),
        (tensor_ops(storage_ops(numel=5)), "want"),
        (tensor_ops(storage_ops(numel=2**61)), "want"),
        (tensor_ops(storage_ops(numel=-1)), "not supported"),
        (tensor_ops(storage_ops("QInt8Storage")), "torch.QInt8Storage"),
        (tensor_ops(storage_ops("FloatStorage", "0", 6, ("1", 0, 3))), "not supported"),
        (b"](" + tensor_ops(storage_ops()) + tensor_ops(storage_ops(numel=3)) + b"e", "two sizes"),
    ],
)
def test_a_tensor_that_is_not_in_its_storage(tmp_path, style, program, message):
    assert message in refused(write(tmp_path / "x", style, program, {"0": SIX}))


def test_a_view_as_another_type(tmp_path):
    """x.view(torch.int32) shares x's storage; only the zip format can say so."""
    whole = tensor_ops(storage_ops("IntStorage"))
    program = b"](" + tensor_ops(storage_ops()) + whole + b"e"
    got = read_torch_file(write(tmp_path / "x", "zip", program, {"0": SIX}))
    np.testing.assert_array_equal(got[1], got[0].view(np.int32), strict=True)


@pytest.mark.parametrize("style", FORMATS)
def test_big_endian(tmp_path, style):
    program = tensor_ops(storage_ops())
    assert "big-endian" in refused(write(tmp_path / "x", style, program, {"0": SIX}, little=False))


def test_files_that_lie_about_their_storages(tmp_path):
    path, program = tmp_path / "x", tensor_ops(storage_ops())
    assert "compressed" in refused(write(path, "zip", program, {"0": SIX}, compression=8))
    assert "no item" in refused(write(path, "zip", program))
    assert "its tensors use ['0']" in refused(write(path, "legacy", program))
    elsewhere = tensor_ops(storage_ops(key="../data.pkl"))
    assert "no item" in refused(write(path, "zip", elsewhere, {"0": SIX}))
    wider = tensor_ops(storage_ops("DoubleStorage"))
    assert "24 bytes; want 48" in refused(write(path, "zip", wider, {"0": SIX}))
    assert "cut short" in refused(write(path, "legacy", wider, {"0": SIX}))
    for numel in (5, 7, -1, 2**60):
        assert f"{numel} numbers; want 6" in refused(
            write(path, "legacy", program, {"0": SIX}, numel=numel)
        )
    huge = tensor_ops(storage_ops(numel=2**60))
    assert "cut short" in refused(write(path, "legacy", huge, {"0": SIX}, numel=2**60))
    extra = write(path, "legacy", program, {"0": SIX, "1": SIX})
    assert "it has storages ['0', '1']" in refused(extra)


@pytest.mark.parametrize("name", ["dev_encoder", "dev_encoder_legacyformat"])
def test_cut_short_or_damaged(tmp_path, name):
    data = (official.FIXTURES / f"{name}.pt").read_bytes()
    path = tmp_path / "cut.pt"
    for length in (*range(1, 160, 13), 5000, 12700, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        reason = refused(path)
        assert length < 4 or "legacy" in name or "cut short" in reason
    # Whatever is damaged, it is a ValueError, or (the legacy format has no checksum) other values.
    rng = np.random.default_rng(0)
    for where in rng.integers(0, 14000, 60):
        path.write_bytes(data[:where] + bytes(rng.integers(0, 256, 3)) + data[where + 3 :])
        try:
            read_torch_file(path)
        except ValueError as error:
            assert str(path) in str(error)


def test_other_files(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(FileNotFoundError, match=r"x\.pt"):
        read_torch_file(path)
    assert "is a folder; want a file written by torch.save" in refused(tmp_path)
    path.write_bytes(b"")
    assert "it is empty; want" in refused(path)
    path.write_bytes(b"RIFF1234WAVEfmt ")
    assert "it starts with b'RIFF1234'; want" in refused(path)
    path.write_bytes(pickle.dumps({"model": 1}))
    assert "a pickle, but not torch's" in refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "")
    assert "a zip of ['word/document.xml']" in refused(path)
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    assert "is a tar" in refused(path)
    path.write_bytes(b"".join(pickle.dumps(x, 2) for x in (MAGIC, 1002, SYSTEM)))
    assert "protocol version 1002; want 1001" in refused(path)


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_writes(tmp_path, zipped):
    torch: Any = pytest.importorskip("torch")  # a name that pyright need not find
    torch.manual_seed(0)
    x = torch.randn(5, 7)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    saved = {
        "float": x,
        "double": x.double(),
        "half": x.half(),
        "bf16": x.bfloat16(),
        "int64": torch.arange(-3, 9),
        "int32": torch.arange(4, dtype=torch.int32),
        "int16": torch.arange(4, dtype=torch.int16),
        "int8": torch.arange(-4, 4, dtype=torch.int8),
        "uint8": torch.arange(4, dtype=torch.uint8),
        "bool": x > 0,
        "transposed": x.T,
        "shared": x[1:3, 2:5],
        "expanded": x[0].expand(3, 7),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(x),
        "module": module.state_dict(),
        "list": [x, (x, 1)],
        "size": x.shape,
        "cfg": {"a": 1, "b": [True, None, 0.5, "ä"]},
    }
    path = tmp_path / "x.pt"
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    got = read_torch_file(path)

    def compare(got, want):
        if isinstance(want, torch.Tensor):
            if want.dtype == torch.bfloat16:
                assert got.dtype == ml_dtypes.bfloat16
                got, want = got.astype(np.float32), want.float()
            np.testing.assert_array_equal(got, want.detach().numpy(), strict=True)
            assert got.flags.c_contiguous
        elif isinstance(want, dict):
            assert type(got) is dict and list(got) == list(want)
            for key in want:
                compare(got[key], want[key])
        elif isinstance(want, list | tuple):
            assert len(got) == len(want)
            for one, other in zip(got, want, strict=True):
                compare(one, other)
        else:
            assert got == want and type(got) is type(want)

    compare(got, saved)


# --- writing --------------------------------------------------------------------------------------


def tree_to_write() -> dict[str, Any]:
    """All that a file can hold; "x" and "again" are one array, "view" is another of its layouts."""
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    dtypes = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?", ml_dtypes.bfloat16)
    return {
        "cfg": {
            "a": 1,
            "b": [True, None, -0.5, "ä\n", (2**70, -1, ())],
            7: {},
            "inf": float("inf"),
        },
        "model": {"x": x, "again": x, "view": x.T, "other": x.copy(), "slice": x[:, 1:]},
        "types": [x.astype(dtype) for dtype in dtypes],
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 3), np.float16),
    }


def storages(path):
    with zipfile.ZipFile(path) as archive:
        return [name for name in archive.namelist() if name.startswith("archive/data/")]


def test_what_is_written_is_read(tmp_path):
    want, path = tree_to_write(), tmp_path / "x.pt"
    write_torch_file(path, want)
    got = read_torch_file(path)
    assert repr(got["cfg"]) == repr(want["cfg"])
    for key, value in want["model"].items():
        np.testing.assert_array_equal(got["model"][key], value, key, strict=True)
    for one, other in zip(got["types"], want["types"], strict=True):
        np.testing.assert_array_equal(one, other, strict=True)
    np.testing.assert_array_equal(got["scalar"], want["scalar"], strict=True)
    np.testing.assert_array_equal(got["empty"], want["empty"], strict=True)
    # x and again are one; view, other, slice, ten types, scalar and empty have their own
    assert len(storages(path)) == 16
    write_torch_file(tmp_path / "y.pt", want)
    assert (tmp_path / "y.pt").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "value, message",
    [
        ({1, 2}, "cannot hold the set"),
        (b"abc", "cannot hold the bytes"),
        (np.float32(1), "cannot hold the float32"),
        (np.zeros(2, complex), "cannot hold the array of complex128"),
        (np.zeros(2, ">f4"), "cannot hold the array of >f4"),
        (np.array(["a"]), "cannot hold the array of <U1"),
    ],
)
def test_what_cannot_be_written(tmp_path, value, message):
    path = tmp_path / "x.pt"
    write_torch_file(path, [1])
    with pytest.raises(ValueError, match=message):
        write_torch_file(path, {"model": [value]})
    assert read_torch_file(path) == [1]
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    write_torch_file(path, [1])

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(OSError, match="No space left"):
        write_torch_file(path, [2])
    monkeypatch.undo()
    assert read_torch_file(path) == [1]
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.torch
def test_torch_reads_what_is_written(tmp_path):
    torch: Any = pytest.importorskip("torch")
    want, path = tree_to_write(), tmp_path / "x.pt"
    write_torch_file(path, want)
    got = torch.load(path, weights_only=True)
    assert repr(got["cfg"]) == repr(want["cfg"])
    for key, value in want["model"].items():
        tensor = got["model"][key]
        np.testing.assert_array_equal(tensor.numpy(), value, key, strict=True)
        assert tensor.is_contiguous() and not tensor.requires_grad
    for tensor, value in zip(got["types"], want["types"], strict=True):
        assert str(tensor.dtype) == f"torch.{value.dtype.name}"
        np.testing.assert_array_equal(tensor.double().numpy(), value.astype(np.float64))
    assert got["scalar"].shape == () and got["empty"].shape == (0, 3)
    got["model"]["x"][0, 0] = 9  # one storage for what was one array, and for nothing else
    assert [got["model"][key][0, 0].item() for key in want["model"]] == [9, 9, 0, 0, 1]


@pytest.mark.torch
@pytest.mark.parametrize("name", ["dev_finetuned", "dev_tokenizer"])
def test_torch_finds_an_official_file_unchanged(tmp_path, name):
    torch: Any = pytest.importorskip("torch")
    original, path = official.FIXTURES / f"{name}.pt", tmp_path / "x.pt"
    write_torch_file(path, to_official(load_model(original))[0])
    got, want = (torch.load(file, weights_only=True) for file in (path, original))
    assert repr({**got, "model": 0}) == repr({**want, "model": 0})
    assert list(got["model"]) == list(want["model"])
    for key, tensor in want["model"].items():
        assert got["model"][key].dtype == tensor.dtype and torch.equal(got["model"][key], tensor)
        assert got["model"][key].stride() == tensor.stride()
    tables = [x for key, x in got["model"].items() if "relative_attention_bias" in key]
    assert len(tables) == 3 and len({table.data_ptr() for table in tables}) == 1
