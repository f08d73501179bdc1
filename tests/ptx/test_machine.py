"""Control flow, memory, barriers and what is a fault, by programs of a few lines."""

import numpy as np
import pytest
import torch

from ptx import machine
from ptx.by_hand import Launch, run
from ptx.code import Fault, compiled
from ptx.memory import Memory
from ptx.parse import parse

PLACE = "mad.lo.s32 %r2, %r1, {threads}, %r0; mad.wide.u32 %rd9, %r2, 4, %rd0;\n"  # of a thread in tensor 0


def zeros(n: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(n, dtype=dtype)


def fault(kind: str, body: str, *tensors: torch.Tensor, **how) -> Fault:
    """What a program faults with, which is of a kind."""
    with pytest.raises(Fault) as caught:
        run(body, *tensors, **how)
    found = caught.value
    assert found.kind == kind, found
    assert (found.kernel, found.where.file, found.where.line) == ("by_hand", "by_hand.py", 7)
    return found


# Control flow


def collatz(n: int) -> tuple[int, int]:
    """Steps to 1, and how many of them were of odd numbers."""
    steps = odd = 0
    while n != 1:
        odd += n % 2
        n, steps = (3 * n + 1 if n % 2 else n // 2), steps + 1
    return steps, odd


COLLATZ = """
    add.s32 %r3, %r2, 1;
    mov.b32 %r4, 0;
    mov.b32 %r5, 0;
LOOP:
    setp.eq.b32 %p1, %r3, 1;
    @%p1 bra DONE;
    and.b32 %r6, %r3, 1;
    setp.eq.b32 %p2, %r6, 0;
    @!%p2 bra ODD;
    shr.u32 %r3, %r3, 1;
    bra.uni NEXT;
ODD:
    mad.lo.s32 %r3, %r3, 3, 1;
    add.s32 %r5, %r5, 1;
NEXT:
    add.s32 %r4, %r4, 1;
    bra LOOP;
DONE:
    shfl.sync.bfly.b32 %r7, %r4, 1, 31, -1;
    st.global.b32 [%rd9], %r7;
    st.global.b32 [%rd9+1024], %r5;
"""


@pytest.mark.parametrize("seed", range(3))
def test_threads_branch_apart_and_meet(seed):
    """A loop that each thread leaves at another time, with a branch inside; after it, all shuffle."""
    out = zeros(512)
    run(
        (PLACE + COLLATZ)
        .format(threads=64)
        .replace("LOOP", "$A")
        .replace("DONE", "$B")
        .replace("ODD", "$C")
        .replace("NEXT", "$D"),
        out,
        threads=64,
        blocks=4,
        seed=seed,
    )
    wanted = [collatz(n + 1) for n in range(256)]
    assert out[:256].tolist() == [wanted[n ^ 1][0] for n in range(256)]
    assert out[256:].tolist() == [odd for _, odd in wanted]


@pytest.mark.parametrize("chosen", ["%r1", "%r0"])
def test_branches_by_a_table(chosen):
    """By block, and by thread. `mov` of a constant in every branch."""
    out = zeros(3 * 32)
    branches = "".join(f"$B{i}: mov.b32 %r5, {10 + i}; bra $END;\n" for i in range(3))
    run(
        PLACE.format(threads=32)
        + f"""
        min.u32 %r4, {chosen}, 2;
        $T: .branchtargets $B0, $B1, $B2;
        brx.idx %r4, $T;
        {branches}
        $END: st.global.b32 [%rd9], %r5;
        """,
        out,
        blocks=3,
    )
    by = np.repeat(np.arange(3), 32) if chosen == "%r1" else np.tile(np.arange(32), 3)
    assert out.tolist() == (10 + np.minimum(by, 2)).tolist()


def test_a_table_has_an_end():
    body = "$T: .branchtargets $B0, $B1;\nbrx.idx %r0, $T;\n$B0: bra $B1;\n$B1:"
    assert fault("out of bounds", body).thread == 2


def test_some_threads_return_early():
    out = zeros(64)
    run(
        PLACE.format(threads=64)
        + """
        setp.gt.u32 %p1, %r0, 40;
        @%p1 ret;
        st.global.b32 [%rd9], 5;
        """,
        out,
        threads=64,
    )
    assert out.tolist() == [5] * 41 + [0] * 23


def test_guarded_instructions_leave_other_threads_alone():
    out = zeros(64)
    run(
        PLACE.format(threads=32)
        + """
        setp.lt.u32 %p1, %r0, 5;
        mov.b32 %r3, 7;
        mov.b32 %r4, 1;
        @%p1 mov.b32 %r3, 8;
        @!%p1 add.s32 %r4, %r4, 1;
        @%p1 st.global.b32 [%rd9], %r3;
        st.global.b32 [%rd9+128], %r4;
        """,
        out,
    )
    assert out.tolist() == [8] * 5 + [0] * 27 + [1] * 5 + [2] * 27


def test_blocks_have_three_coordinates():
    out, grid = zeros(24), (2, 3, 4)
    body = """
        mov.u32 %r3, %ctaid.y;
        mov.u32 %r4, %ctaid.z;
        mov.u32 %r5, %nctaid.y;
        mad.lo.s32 %r6, %r4, %r5, %r3;
        mov.u32 %r5, %nctaid.x;
        mad.lo.s32 %r6, %r6, %r5, %r1;
        mad.wide.u32 %rd9, %r6, 4, %rd0;
        mad.lo.s32 %r7, %r3, 10, %r1;
        mad.lo.s32 %r7, %r4, 100, %r7;
        st.global.b32 [%rd9], %r7;
    """
    run(body, out, blocks=grid)
    assert out.tolist() == [100 * z + 10 * y + x for z in range(4) for y in range(3) for x in range(2)]
    beyond = body.replace("[%rd9]", "[%rd9+4]")
    assert fault("out of bounds", beyond, out, blocks=grid).block == (1, 2, 3)


# Faults


def test_unknown_instructions_are_named():
    found = fault("unknown instruction", "popc.b32 %r3, %r0;")
    assert "popc.b32" in str(found)
    assert "tanh.approx.f32" in str(fault("unknown instruction", "tanh.approx.f32 %r3, %r0;"))
    assert "%laneid" in str(fault("unknown instruction", "mov.u32 %r3, %laneid;"))
    assert "cv" in str(fault("unknown instruction", "ld.global.cv.b32 %r3, [%rd0];", zeros(1)))


def test_a_launch_must_fit_its_program():
    program = parse(".visible .entry k(.param .u32 a)\n.reqntid 64\n{\n.reg .b32 %r<2>;\nret;\n}\n")
    with pytest.raises(ValueError, match=r"8.*4"):
        machine.run(program, Launch((1, 1, 1), (64, 1, 1), 0, (b"12345678",)), Memory())
    with pytest.raises(ValueError, match="32 threads.* 64"):
        machine.run(program, Launch((1, 1, 1), (32, 1, 1), 0, (b"1234",)), Memory())


@pytest.mark.parametrize(
    "access", ["ld.global.v2.b32 {%r3, %r4}, [%rd9];", "st.global.v2.b32 [%rd9], {%r0, %r0};"]
)
def test_misaligned(access):
    out = zeros(64)
    found = fault("misaligned", PLACE.format(threads=32) + access, out)
    assert (found.thread, found.address) == (1, out.data_ptr() + 4)


def test_misaligned_shared_memory():
    body = "mad.lo.s32 %r3, %r0, 2, 4112; st.shared.b32 [%r3], %r0;"
    assert fault("misaligned", body, shared=64).thread == 1


@pytest.mark.parametrize("access", ["ld.global.b32 %r3, [%rd9+4];", "st.global.b32 [%rd9+4], %r0;"])
def test_beyond_a_tensor(access):
    """Though what follows is a tensor, too."""
    both = zeros(96)
    found = fault("out of bounds", PLACE.format(threads=32) + access, both[:64], both[64:], blocks=2)
    assert (found.thread, found.block, found.address) == (31, (1, 0, 0), both.data_ptr() + 4 * 64)
    assert "tensor 0" in str(found)
    run(PLACE.format(threads=32) + access, both, blocks=2)


def test_before_a_tensor():
    found = fault("out of bounds", PLACE.format(threads=32) + "ld.global.b32 %r3, [%rd9+-4];", zeros(64)[1:])
    assert found.thread == 0


def test_a_guard_keeps_a_thread_from_a_fault():
    out = zeros(20)
    run(PLACE.format(threads=32) + "setp.lt.u32 %p1, %r0, 20; @%p1 st.global.b32 [%rd9], %r0;", out)
    assert out.tolist() == list(range(20))


def test_a_number_is_no_pointer():
    assert "no parameter" in str(fault("out of bounds", "mov.b64 %rd5, 4096; ld.global.b32 %r3, [%rd5];"))


SHARED = "shl.b32 %r3, %r0, 2; mov.b32 %r4, smem; add.s32 %r3, %r3, %r4;\n"  # a word a thread


def test_beyond_shared_memory():
    found = fault("out of bounds", SHARED + "st.shared.b32 [%r3+4], %r0;", shared=128)
    assert found.thread == 31


def test_shared_memory_that_was_never_written():
    body = (
        SHARED
        + "setp.ne.b32 %p1, %r0, 9; @%p1 st.shared.b32 [%r3], %r0; bar.sync 0; ld.shared.b32 %r5, [%r3];"
    )
    found = fault("never written", body, shared=128)
    assert found.thread == 9
    # Another block's is no help, nor a narrower number.
    body = (
        SHARED
        + "setp.eq.b32 %p1, %r1, 0; @%p1 st.shared.b32 [%r3], %r0; bar.sync 0; ld.shared.b32 %r5, [%r3];"
    )
    assert fault("never written", body, shared=128, blocks=2).block == (1, 0, 0)
    fault("never written", SHARED + "st.shared.b16 [%r3], 1; ld.shared.b32 %r5, [%r3];", shared=128)


@pytest.mark.parametrize(
    "body, thread",
    [
        ("add.s32 %r3, %r5, 1;", 0),
        ("setp.gt.u32 %p1, %r0, 3; @%p1 mov.b32 %r5, 1; add.s32 %r3, %r5, 1;", 0),
        ("setp.lt.u32 %p1, %r0, 3; @%p1 mov.b32 %r5, 1; add.s32 %r3, %r5, 1;", 3),
        ("setp.lt.u32 %p1, %r0, 3; @%p1 bra $A; mov.b32 %r5, 1; $A: add.s32 %r3, %r5, 1;", 0),
        ("setp.lt.u32 %p1, %r0, 3; @!%p1 bra $A; mov.b32 %r5, 1; $A: add.s32 %r3, %r5, 1;", 3),
        ("@%p3 bra $A; $A:", 0),
        ("mov.b32 %r5, smem; st.shared.b32 [%r5], %r6;", 0),
        ("mov.b32 %r3, %r5;", 0),
    ],
)
def test_registers_that_were_never_written(body, thread):
    assert fault("never written", body, shared=16).thread == thread


def test_registers_that_were_written_where_they_are_read():
    out = zeros(32)
    run(
        PLACE.format(threads=32)
        + """
        setp.lt.u32 %p1, %r0, 3;
        @%p1 mov.b32 %r5, 1;
        @%p1 add.s32 %r6, %r5, 1;
        @%p1 bra $A;
        mov.b32 %r5, 4;
        $A: st.global.b32 [%rd9], %r5;
        """,
        out,
    )
    assert out.tolist() == [1] * 3 + [4] * 29


# Barriers


@pytest.mark.parametrize(
    "body",
    [
        "setp.lt.u32 %p1, %r0, 40; @%p1 bra $A; bar.sync 0; $A:",
        "setp.lt.u32 %p1, %r0, 32; @%p1 ret; bar.sync 0;",
        "setp.lt.u32 %p1, %r0, 32; @%p1 bra $A; bar.sync 0; ret; $A: bar.sync 0;",
    ],
)
def test_barriers_that_not_all_threads_reach(body):
    found = fault("barrier", body, threads=64, blocks=3)
    assert found.thread is not None and "bar.sync" in str(found)


@pytest.mark.parametrize("seed", range(4))
def test_blocks_may_pass_different_barriers(seed):
    out = zeros(128)
    run(
        PLACE.format(threads=32)
        + SHARED
        + """
        st.shared.b32 [%r3], %r2;
        and.b32 %r5, %r1, 1;
        setp.eq.b32 %p1, %r5, 0;
        @%p1 bra $A;
        bar.sync 0;
        bra $B;
        $A: bar.sync 0;
        bar.sync 0;
        $B: xor.b32 %r6, %r0, 31;
        shl.b32 %r6, %r6, 2;
        add.s32 %r6, %r6, %r4;
        ld.shared.b32 %r7, [%r6];
        st.global.b32 [%rd9], %r7;
        """,
        out,
        blocks=4,
        shared=128,
        seed=seed,
    )
    assert out.tolist() == [n ^ 31 for n in range(128)]


@pytest.mark.parametrize(
    "instruction",
    [
        "shfl.sync.bfly.b32 %r5, %r0, 1, 31, -1;",
        "bar.warp.sync -1;",
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r4];",
    ],
)
def test_what_a_warp_must_do_together(instruction):
    body = SHARED + "st.shared.b32 [%r3], %r0; bar.sync 0; setp.lt.u32 %p1, %r0, 7; @%p1 bra $A; {} $A:"
    assert fault("barrier", body.format(instruction), shared=128).thread == 0


# Races in shared memory

NEXT = "xor.b32 %r5, %r0, {}; shl.b32 %r5, %r5, 2; add.s32 %r5, %r5, %r4;\n"  # another thread's word


@pytest.mark.parametrize("apart", [1, 32])  # in a warp, and in two
@pytest.mark.parametrize(
    "body",
    [
        "st.shared.b32 [%r3], %r0; ld.shared.b32 %r6, [%r5];",  # read after write
        # Write after read.
        "st.shared.b32 [%r3], %r0; bar.sync 0; ld.shared.b32 %r6, [%r5]; st.shared.b32 [%r3], %r0;",
        "st.shared.b32 [%r3], %r0; st.shared.b32 [%r5], %r0;",  # write after write
        "st.shared.b32 [%r4], %r0;",  # all to one place
    ],
)
def test_races(body, apart):
    found = fault("race", SHARED + NEXT.format(apart) + body, threads=64, shared=256)
    assert "shared.b32" in found.detail


@pytest.mark.parametrize("apart", [1, 32])
def test_barriers_order(apart):
    run(
        SHARED
        + NEXT.format(apart)
        + """
        st.shared.b32 [%r3], %r0; bar.sync 0; ld.shared.b32 %r6, [%r5]; bar.sync 0;
        st.shared.b32 [%r5], %r6; bar.sync 0; st.shared.b32 [%r3], %r6; ld.shared.b32 %r6, [%r3];
        """,
        threads=64,
        shared=256,
    )


def test_a_warp_barrier_orders_a_warp():
    body = SHARED + NEXT + "st.shared.b32 [%r3], %r0; bar.warp.sync -1; ld.shared.b32 %r6, [%r5];"
    body += "bar.warp.sync -1; st.shared.b32 [%r3], %r6;"
    run(body.format(1), threads=64, shared=256)
    fault("race", body.format(32), threads=64, shared=256)


def test_a_shuffle_orders_nothing():
    body = (
        SHARED
        + NEXT
        + "st.shared.b32 [%r3], %r0; shfl.sync.bfly.b32 %r7, %r0, 1, 31, -1; ld.shared.b32 %r6, [%r5];"
    )
    fault("race", body.format(1), shared=128)


def test_equal_bits_may_be_stored_twice():
    run(
        "mov.b32 %r4, smem; shr.u32 %r5, %r0, 6; st.shared.b32 [%r4], %r5; st.shared.b32 [%r4], 0;",
        threads=64,
        shared=16,
    )


def test_halves_of_a_word_are_two_places():
    body = "shl.b32 %r3, %r0, {}; mov.b32 %r4, smem; add.s32 %r3, %r3, %r4; cvt.u16.u32 %rs1, %r0;"
    body += "st.shared.b16 [%r3], %rs1;"
    run(body.format(1), shared=64)


# cp.async

COPY = SHARED + "mad.wide.u32 %rd9, %r0, 4, %rd0; cp.async.ca.shared.global [%r3], [%rd9], 4, {size};\n"
TAKE = "ld.shared.b32 %r6, [%r5]; mad.wide.u32 %rd9, %r0, 4, %rd1; st.global.b32 [%rd9], %r6;\n"


@pytest.mark.parametrize("size", [4, 0])
def test_copies_are_there_after_wait_and_barrier(size):
    source, out = torch.arange(1, 33, dtype=torch.int32), zeros(32)
    body = "mov.b32 %r9, {size};" + COPY.replace("{size}", "%r9") + NEXT
    body += "cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;" + TAKE
    run(body.format(1, size=size), source, out, shared=128)
    assert out.tolist() == [((n ^ 1) + 1) * (size > 0) for n in range(32)]


@pytest.mark.parametrize(
    "between, other",
    [
        ("cp.async.commit_group; bar.sync 0;", 1),  # not waited for
        ("cp.async.commit_group; cp.async.wait_group 1; bar.sync 0;", 1),  # waited for an older one
        ("cp.async.wait_group 0; bar.sync 0;", 1),  # not committed
        ("cp.async.commit_group; cp.async.wait_group 0;", 1),  # no barrier
        ("cp.async.commit_group;", 0),  # its own
    ],
)
def test_copies_that_are_read_too_early(between, other):
    found = fault(
        "race", (COPY + NEXT + between + TAKE).format(other, size=4), zeros(32), zeros(32), shared=128
    )
    assert "cp.async" in found.detail


def test_a_copy_waited_for_is_there_for_its_own_thread():
    source, out = torch.arange(32, dtype=torch.int32), zeros(32)
    body = COPY + NEXT + "cp.async.commit_group; cp.async.wait_group 0;" + TAKE
    run(body.format(0, size=4), source, out, shared=128)
    assert out.tolist() == source.tolist()


def test_blocks_that_branch_apart_keep_their_copies():
    source, out = torch.arange(64, dtype=torch.int32), zeros(64)
    run(
        SHARED
        + PLACE.format(threads=32)
        + """
        cp.async.ca.shared.global [%r3], [%rd9], 4, 4;
        cp.async.commit_group;
        setp.eq.b32 %p1, %r1, 0;
        @%p1 bra $A;
        cp.async.wait_group 0;
        bar.sync 0;
        bra $B;
        $A: cp.async.wait_group 0;
        bar.sync 0;
        $B: xor.b32 %r5, %r0, 5;
        shl.b32 %r5, %r5, 2;
        add.s32 %r5, %r5, %r4;
        ld.shared.b32 %r6, [%r5];
        mad.wide.u32 %rd8, %r2, 4, %rd1;
        st.global.b32 [%rd8], %r6;
        """,
        source,
        out,
        blocks=2,
        shared=128,
    )
    assert out.tolist() == [n ^ 5 for n in range(64)]


def test_copies_of_part_of_a_width_are_unknown():
    found = fault(
        "unknown instruction", COPY.format(size=2) + "cp.async.commit_group;", zeros(32), shared=128
    )
    assert found.thread == 0


def test_a_copy_must_not_overtake_a_read():
    body = (
        SHARED
        + NEXT
        + "st.shared.b32 [%r3], %r0; bar.sync 0; ld.shared.b32 %r6, [%r5];"
        + COPY.removeprefix(SHARED)
    )
    found = fault("race", body.format(1, size=4), zeros(32), shared=128)
    assert "read" in found.detail


def test_the_last_commits_are_left_under_way():
    """Two stages: the first is waited for while the second is under way."""
    source, out = torch.arange(64, dtype=torch.int32), zeros(32)
    body = COPY + "add.s32 %r8, %r3, 128; add.s64 %rd8, %rd9, 128; cp.async.commit_group;"
    body += "cp.async.ca.shared.global [%r8], [%rd8], 4, 4; cp.async.commit_group;"
    body += "cp.async.wait_group 1; bar.sync 0;"
    run((body + NEXT + TAKE).format(3, size=4), source, out, shared=256)
    assert out.tolist() == [n ^ 3 for n in range(32)]
    late = TAKE.replace("[%r5]", "[%r5+128]")
    fault("race", (body + NEXT + late).format(3, size=4), source, out, shared=256)


# Global memory

SUM = """
    mad.lo.s32 %r2, %r1, 64, %r0;
    mad.wide.u32 %rd9, %r2, 4, %rd0;
    st.global.b32 [%rd9], %r2;
    {before}
    setp.eq.b32 %p1, %r0, 0;
    mov.b32 %r4, smem;
    @%p1 atom.global.gpu.acq_rel.add.u32 %r5, [%rd1], 1;
    @%p1 st.shared.b32 [%r4], %r5;
    bar.sync 0;
    ld.shared.b32 %r5, [%r4];
    mov.u32 %r6, %nctaid.x;
    add.s32 %r6, %r6, -1;
    setp.ne.b32 %p2, %r5, %r6;
    @%p2 ret;
    mov.b32 %r7, 0;
    mov.b32 %r8, 0;
    mad.wide.u32 %rd9, %r0, 4, %rd0;
$LOOP:
    ld.global.cg.b32 %r9, [%rd9];
    add.s32 %r7, %r7, %r9;
    add.s64 %rd9, %rd9, 256;
    add.s32 %r8, %r8, 1;
    setp.le.s32 %p3, %r8, %r6;
    @%p3 bra $LOOP;
    mad.wide.u32 %rd9, %r0, 4, %rd2;
    st.global.b32 [%rd9], %r7;
    st.global.b32 [%rd1], 0;
"""


@pytest.mark.parametrize("blocks", [1, 3, 150])
@pytest.mark.parametrize("seed", range(3))
def test_the_last_program_adds_what_all_have_stored(blocks, seed):
    rows, counter, out = zeros(64 * blocks), zeros(1), zeros(64)
    run(SUM.format(before="bar.sync 0;"), rows, counter, out, threads=64, blocks=blocks, shared=4, seed=seed)
    assert out.tolist() == torch.arange(64 * blocks).view(blocks, 64).sum(0).tolist()
    assert counter.tolist() == [0]


@pytest.mark.parametrize("seed", range(3))
def test_stores_that_are_not_before_the_count(seed):
    """Without the barrier, the thread that counts releases its own stores alone."""
    found = fault(
        "race",
        SUM.format(before=""),
        zeros(64 * 3),
        zeros(1),
        zeros(64),
        threads=64,
        blocks=3,
        shared=4,
        seed=seed,
    )
    assert "not ordered after the write" in found.detail and "st.global" in found.detail


def test_sums_that_do_not_wait():
    """A block that reads what others store, without a count."""
    body = (
        PLACE
        + "st.global.b32 [%rd9], %r0; bar.sync 0; xor.b32 %r3, %r2, 32; mad.wide.u32 %rd9, %r3, 4, %rd0;"
    )
    body += "ld.global.b32 %r4, [%rd9];"
    fault("race", body.format(threads=32), zeros(64), blocks=2)


def test_blocks_that_write_what_others_read():
    body = PLACE + "ld.global.b32 %r4, [%rd0]; st.global.b32 [%rd9], %r4;"
    found = fault("race", body.format(threads=32), zeros(64), blocks=2)
    assert "after the read" in found.detail or "after the write" in found.detail


def test_blocks_that_write_one_place():
    fault("race", "st.global.b32 [%rd0], %r1;", zeros(1), blocks=2)
    run("st.global.b32 [%rd0], 3;", zeros(1), blocks=2)


def test_views_of_one_tensor_are_one_memory():
    x = zeros(64)
    body = PLACE + "st.global.b32 [%rd9], %r0; ld.global.b32 %r4, [%rd1];"
    fault("race", body.format(threads=32), x, x[5:])
    assert x.data_ptr() != x[5:].data_ptr()


def test_a_pointer_is_of_the_tensor_that_begins_there():
    memory = Memory()
    for address, size, name in (
        (1000, 100, "all"),
        (1000, 40, "first"),
        (1040, 60, "second"),
        (1050, 4, "part"),
    ):
        memory.add(address, size, name)
    found = {address: memory.find(address) for address in (1000, 1040, 1044, 1051, 1099, 1100)}
    names = {address: one and one.name for address, one in found.items()}
    assert names == {1000: "all", 1040: "second", 1044: "second", 1051: "part", 1099: "second", 1100: None}


def test_the_seed_decides_the_order_of_blocks():
    orders = set()
    for seed in (0, 1, 2, 0):
        counter, out = zeros(1), zeros(8)
        body = """
            setp.eq.b32 %p1, %r0, 0;
            mad.wide.u32 %rd9, %r1, 4, %rd1;
            @%p1 atom.global.gpu.acq_rel.add.u32 %r5, [%rd0], 1;
            @%p1 st.global.b32 [%rd9], %r5;
        """
        run(body, counter, out, blocks=8, seed=seed)
        assert sorted(out.tolist()) == list(range(8))
        orders.add(tuple(out.tolist()))
    assert len(orders) == 3


def test_a_fault_names_the_calling_lines():
    text = """
.file 1 "/kernels/a.py"
.file 2 "/kernels/b.py"
.visible .entry k(.param .u64 .ptr .global .align 1 k_param_0)
{
    .reg .b32 %r<2>;
    .reg .b64 %rd<2>;
    .loc 1 80 22 // a.py:80:22
    ld.param.b64 %rd1, [k_param_0];
    .loc 2 150 26, function_name $L__info_string0, inlined_at 1 80 22 // b.py
    .loc 2 160 26, function_name $L__info_string1, inlined_at 2 150 26 // b.py
    // begin inline asm
    mov.u32 %r1, 0;
    ld.global.b32 { %r1 }, [ %rd1 + 16 ];
    // end inline asm
    ret;
}
"""
    program = parse(text)
    assert str(program.instructions[2].where) == (
        "/kernels/b.py:160 called at /kernels/b.py:150 called at /kernels/a.py:80"
    )
    assert compiled(program) is compiled(program)
