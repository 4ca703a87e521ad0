"""The collectives of a program, read off its HLO: kinds, bytes, and who exchanges with whom.

An all-reduce of which every device keeps a slice counts as the reduce-scatter that XLA makes of it
on TPU and GPU (a CPU leaves it); where the slice is fused with other things, as in a CPU's compiled
program, the two cannot be told apart. What is in a loop counts as often as the loop runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:to_apply|calls|body|condition|branch_computations)=(%[\w.-]+|\{[^}]*)")
_COLLECTIVE = re.compile(rf"({'|'.join(KINDS)})(-start|-done)?$")
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")  # bf16[8,4]
_PASSED_ON = ("copy", "bitcast", "transpose", "reshape", "convert")


class Collective(NamedTuple):
    """An array that a program exchanges between devices.

    Attributes:
        kind: one of `KINDS`.
        size: bytes of the whole array: what is reduced, gathered or scattered; of a permutation,
            what a device passes on.
        elements: of that array.
        groups: int [G, n], the devices that exchange it among themselves; of a permutation [G, 2],
            from and to.
        count: how often.
        origin: the operation in the model that it belongs to, where the HLO says.
    """

    kind: str
    size: int
    elements: int
    groups: np.ndarray
    count: int = 1
    origin: str = ""

    @property
    def sent(self) -> float:
        """Bytes that a device sends, in a ring: (n - 1) / n of the array, twice for an all-reduce.

        A permutation counts as if every device sent something.
        """
        n = self.groups.shape[1]
        rounds = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}
        return self.count * self.size * rounds.get(self.kind, (n - 1) / n)


class _Instruction(NamedTuple):
    type: str
    op: str
    operands: list[str]
    rest: str


_Computation = dict[str, _Instruction]


def read(text: str) -> list[Collective]:
    """The collectives of an HLO module, in its order; a tuple's arrays are one each.

    Args:
        text: the module: partitioned, or compiled (`compiled.as_text()`).

    Raises:
        ValueError: one is in a loop whose length the module does not say. XLA writes it there late:
            a compiled program has it.
    """
    entry, module, body = "", {}, {}
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            body = module[match[2]] = {}
            entry = match[2] if match[1] else entry
        elif match := _INSTRUCTION.match(line):
            operands = re.findall(r"%([\w.-]+)", match[4].split(")")[0])
            body[match[1]] = _Instruction(match[2], match[3], operands, match[4])
    header = re.search(r"num_partitions=(\d+)", text)
    devices = int(header[1]) if header else 1
    times, found = _calls(module, entry), []
    for computation, body in module.items():
        for name, (type_, op, operands, rest) in body.items():
            match = _COLLECTIVE.match(op)
            # What an asynchronous one gives is the type of its end.
            if not match or match[2] == "-start" or not (count := times(computation)):
                continue
            kind, rest = match[1], body[operands[0]].rest if match[2] else rest
            groups = _groups(rest, devices)
            whole = groups.shape[1] if kind == "reduce-scatter" else 1  # its type is a slice's
            if kind == "all-reduce" and _only_sliced(body, name):
                kind = "reduce-scatter"
            named = re.search(r'op_name="([^"]*)"', rest)
            origin = named[1] if named else ""
            for bits, dims in _ARRAY.findall(type_):
                elements = whole * math.prod(map(int, filter(None, dims.split(","))))
                size = elements * int(bits or 8) // 8
                found.append(Collective(kind, size, elements, groups, count, origin))
    return found


def _calls(module: dict[str, _Computation], entry: str) -> Callable[[str], int]:
    """A function of a computation's name: how often one run of the program runs it."""
    callers: dict[str, list[tuple[str, str, _Instruction]]] = {}
    for computation, body in module.items():
        for name, instruction in body.items():
            if instruction.op in ("async-update", "async-done"):
                continue  # they only name again what their start calls
            for called in re.findall(r"%([\w.-]+)", " ".join(_CALLED.findall(instruction.rest))):
                callers.setdefault(called, []).append((computation, name, instruction))

    def times(computation: str) -> int:
        if computation == entry:
            return 1
        total = 0
        for caller, name, instruction in callers.get(computation, ()):
            length = re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.rest)
            if instruction.op == "while" and not length:
                raise ValueError(
                    f"a collective is in the loop %{name}, whose length the module does not say; "
                    "give the compiled program's text"
                )
            total += times(caller) * (int(length[1]) if length else 1)
        return total

    return times


def _only_sliced(body: _Computation, name: str) -> bool:
    """Whether every use of a value, passed on or not, takes a slice of it."""
    users = [(own, used) for own, used in body.items() if name in used.operands]
    return bool(users) and all(
        used.op == "dynamic-slice" or (used.op in _PASSED_ON and _only_sliced(body, own))
        for own, used in users
    )


def _groups(rest: str, devices: int) -> np.ndarray:
    """The groups [G, n] of a collective, from what follows its operands.

    Written as a list `{{0,1},{2,3}}`, as an iota `[2,2]<=[2,2]T(1,0)`, or by axes of a mesh,
    `mesh['a'=2,'b'=2] {'b'}`, whose devices may come in another order, `device_ids=([2,2]T(1,0))`,
    and whose axes may be cut, `'b':(1)2`.

    Raises:
        ValueError: none of these.
    """
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", rest):
        rows = re.findall(r"\{([\d,]+)\}", match[1])
        return np.array([[int(i) for i in row.split(",")] for row in rows])
    if "replica_groups={}" in rest:
        return np.arange(devices)[None]
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        return _iota(match[2]).reshape(_numbers(match[1]))
    if match := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? \{([^}]*)\}", rest
    ):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        ids = _iota(match[2]) if match[2] else np.arange(math.prod(axes.values()))
        grouped = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", match[3])
        sizes: list[int] = []
        last: list[int] = []
        for name, size in axes.items():
            cut = next(((int(a), int(b)) for n, a, b in grouped if n == name and b), (1, size))
            if name in [n for n, *_ in grouped]:
                last.append(len(sizes) + 1)
            sizes += [cut[0], cut[1], size // math.prod(cut)]
        ids = np.moveaxis(ids.reshape(sizes), last, range(-len(last), 0))
        return ids.reshape(-1, math.prod(sizes[i] for i in last))
    raise ValueError(f"these groups cannot be read: {rest[:200]}")


def _iota(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: numbers from 0 in this shape, transposed, in a row."""
    shape, _, order = text.partition("T")
    ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return ids.transpose(_numbers(order) if order else None).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
