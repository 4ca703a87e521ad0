"""Collectives read off HLO, against lines written by hand."""

import numpy as np
import pytest

from beats_jax.collectives import read

MODULE = """\
HloModule step, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (carry: (s32[], f32[10])) -> (s32[], f32[10]) {
  %carry = (s32[], f32[10]{0}) parameter(0)
  %value = f32[10]{0} get-tuple-element(%carry), index=1
  %reduced = f32[10]{0} all-reduce(%value), channel_id=9, replica_groups={}, to_apply=%add
  ROOT %next = (s32[], f32[10]{0}) tuple(%carry, %reduced)
}

%wrapped (p: bf16[4,6]) -> bf16[2,6] {
  %p = bf16[4,6]{1,0} parameter(0)
  ROOT %rs = bf16[2,6]{1,0} reduce-scatter(%p), replica_groups=[4,2]<=[8], to_apply=%add
}

ENTRY %main (a: f32[3,5], b: bf16[4,6]) -> f32[] {
  %a = f32[3,5]{1,0} parameter(0)
  %b = bf16[4,6]{1,0:T(8,128)(2,1)} parameter(1)
"""
END = "  ROOT %end = f32[] constant(0)\n}\n"


def only(*lines: str):
    """The one collective of a program with these lines."""
    (found,) = read(MODULE + "".join(f"  {line}\n" for line in lines) + END)
    return found


@pytest.mark.parametrize(
    ("line", "kind", "size", "sent"),
    [
        ("all-reduce(%a), GROUPS, to_apply=%add", "all-reduce", 60, 2 * 60 * 3 / 4),
        ("all-gather(%a), GROUPS, dimensions={0}", "all-gather", 60, 60 * 3 / 4),
        ("all-to-all(%a), GROUPS, dimensions={0}", "all-to-all", 60, 60 * 3 / 4),
        ("reduce-scatter(%a), GROUPS, to_apply=%add", "reduce-scatter", 240, 60 * 3),
    ],
)
def test_kinds_and_what_a_ring_sends(line, kind, size, sent):
    found = only("%c = f32[3,5]{1,0} " + line.replace("GROUPS", "replica_groups=[2,4]<=[8]"))
    assert (found.kind, found.size, found.sent, found.count) == (kind, size, sent, 1)
    assert found.elements == size // 4


def test_a_permutation_sends_its_array_once():
    line = "%c = f32[3,5]{1,0} collective-permute(%a), source_target_pairs={{0,1},{1,0}}"
    found = only(line)
    assert (found.kind, found.size, found.sent) == ("collective-permute", 60, 60)
    np.testing.assert_array_equal(found.groups, [[0, 1], [1, 0]])


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("{{0,2,4,6},{1,3,5,7}}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("[4,2]<=[8]", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("[4,2]<=[2,2,2]T(2,1,0)", [[0, 4], [2, 6], [1, 5], [3, 7]]),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['axis_0'=1,'axis_1'=8] {'axis_1'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['a'=2,'b'=4] {'b':(2)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("mesh['a'=2,'b'=4] {'a','b':(1)2}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ],
)
def test_groups_in_every_notation(text, groups):
    line = f"%c = f32[3,5]{{1,0}} all-reduce(%a), channel_id=1, replica_groups={text}, x=true"
    np.testing.assert_array_equal(only(line).groups, groups)


def test_arrays_of_a_tuple_and_their_types():
    line = (
        "%c = (f32[], bf16[4,6]{1,0:T(8,128)(2,1)}, /*index=2*/pred[7]{0}, s64[2]{0}) "
        "all-reduce(%x, %b, /*index=2*/%y, %z), replica_groups={}, to_apply=%add"
    )
    assert [c.size for c in read(MODULE + f"  {line}\n" + END)] == [4, 48, 7, 16]


def test_asynchronous_ones_count_once():
    groups = "replica_groups=[4,2]<=[8], dimensions={0}"
    start = f"%s = (f32[3,5]{{1,0}}, f32[6,5]{{1,0}}) all-gather-start(%a), {groups}"
    found = only(start, "%d = f32[6,5]{1,0} all-gather-done(%s)")
    assert (found.kind, found.size, found.groups.shape) == ("all-gather", 120, (4, 2))
    start = "%s = ((bf16[4,6]{1,0}), bf16[2,6]{1,0}) async-start(%b), calls=%wrapped"
    found = only(start, "%d = bf16[2,6]{1,0} async-done(%s), calls=%wrapped")
    assert (found.kind, found.size, found.count) == ("reduce-scatter", 48, 1)


def test_a_loop_counts_as_often_as_it_runs():
    loop = "%w = (s32[], f32[10]{0}) while(%t), condition=%add, body=%body"
    found = only(loop + ', backend_config={"known_trip_count":{"n":"5"}}')
    assert (found.size, found.count, found.sent) == (40, 5, 5 * 2 * 40 * 7 / 8)
    with pytest.raises(ValueError, match=r"in the loop %w.*give the compiled program's text"):
        only(loop)


def test_an_all_reduce_that_is_only_sliced_is_a_reduce_scatter():
    reduce = "%c = f32[3,5]{1,0} all-reduce(%a), replica_groups={}, to_apply=%add"
    moved = "%m = f32[5,3]{0,1} transpose(%c), dimensions={1,0}"
    sliced = "%s = f32[5,1]{0,1} dynamic-slice(%m, %i, %j), dynamic_slice_sizes={5,1}"
    assert only(reduce, moved, sliced).kind == "reduce-scatter"
    whole = "%n = f32[3,5]{1,0} negate(%c)"
    assert only(reduce, moved, sliced, whole).kind == "all-reduce"


def test_what_cannot_be_read_is_said():
    with pytest.raises(ValueError, match="groups cannot be read: %a\\), replica_groups=new"):
        only("%c = f32[3,5]{1,0} all-reduce(%a), replica_groups=new")
