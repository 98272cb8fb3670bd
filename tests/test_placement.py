"""Which rows of a step each rank holds: by hand, and by what must hold for every layout and step."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from shared_config import ParallelLayout
from shared_config.placement import ELSEWHERE, place_step
from shared_config.sampling import SamplingParams
from shared_config.scheduler import Chunk, Scheduler, Sequence, Step

GREEDY = SamplingParams(temperature=0, max_tokens=4)


def make_step(counts: list[int], *, prefill: bool = True) -> Step:
    """One chunk a sequence, of sequences 0, 1, ..."""
    sequences = [Sequence(i, [1] * count, GREEDY) for i, count in enumerate(counts)]
    return Step(prefill, tuple(Chunk(s, 0, len(s.prompt), True) for s in sequences))


def test_a_prefill_pass_is_cut_into_equal_contiguous_pieces() -> None:
    layout = ParallelLayout(tp_size=4, attn_cp_size=4)
    placement = place_step(make_step([3, 6]), layout)
    assert (placement.pass_rows, placement.rows) == (12, 3)
    assert [placement.held(cp) for cp in range(4)] == [range(3), range(3, 6), range(6, 9), range(9, 12)]
    last = [(0, 2), (1, 5)]
    found = [placement.local_rows(last, layout.place(rank)) for rank in range(4)]
    assert found == [[2, ELSEWHERE], [ELSEWHERE] * 2, [ELSEWHERE, 2], [ELSEWHERE] * 2]


def test_decode_rows_are_whole_on_every_context_parallel_rank() -> None:
    layout = ParallelLayout(tp_size=4, attn_cp_size=2, attn_dp_size=2)
    placement = place_step(make_step([1, 1, 1], prefill=False), layout, round_up=lambda rows: 4)
    assert (placement.pass_rows, placement.rows, placement.held(1)) == (4, 4, range(4))
    assert [len(placement.part(dp).chunks) for dp in range(2)] == [2, 1]
    assert placement.decode_rows() == [0, 4, 1]  # sequences 0 and 2 on the first DP rank, 1 on the second


def test_a_data_parallel_rank_without_sequences_has_a_pass_of_padding() -> None:
    layout = ParallelLayout(tp_size=2, attn_dp_size=2)
    placement = place_step(make_step([5]), layout)
    assert placement.pass_rows == 5
    assert placement.part(1).chunks == ()
    assert placement.local_rows([(0, 4)], layout.place(1)) == [ELSEWHERE]


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    cp=st.sampled_from([1, 2, 4]),
    dp=st.sampled_from([1, 2, 3]),
    attn_tp=st.sampled_from([1, 2]),
    prefill=st.booleans(),
    least=st.sampled_from([0, 5, 16]),
)
def test_every_row_has_one_owner(
    counts: list[int], cp: int, dp: int, attn_tp: int, prefill: bool, least: int
) -> None:
    layout = ParallelLayout(cp * dp * attn_tp, attn_cp_size=cp, attn_dp_size=dp)
    step = make_step(counts if prefill else [1] * len(counts), prefill=prefill)
    placement = place_step(step, layout, round_up=lambda rows: max(rows, least))
    wanted = [(i, offset) for i, chunk in enumerate(step.chunks) for offset in range(chunk.num_tokens)]
    assert placement.rows * (cp if prefill else 1) == placement.pass_rows >= least
    for tp in range(attn_tp):
        owned = [placement.local_rows(wanted, layout.place(rank)) for rank in layout.pieces(tp)]
        assert all(sum(row != ELSEWHERE for row in rows) == 1 for rows in zip(*owned, strict=True))
        assert all(row < placement.rows for rows in owned for row in rows)
        # No two rows of one rank are the same one.
        assert all(len({row for row in rows if row >= 0}) == sum(row >= 0 for row in rows) for rows in owned)
    parts = [placement.part(d) for d in range(dp)]
    assert sum(len(part.chunks) for part in parts) == len(counts)
    assert all(part.num_tokens <= placement.pass_rows for part in parts)


def test_each_data_parallel_rank_has_pages_of_its_own() -> None:
    scheduler = Scheduler(
        num_pages=2, page_size=4, num_slots=4, max_step_tokens=64, max_model_len=16, attn_dp_size=2
    )
    for index in range(3):
        scheduler.add(Sequence(index, [1, 2], GREEDY))  # 2 pages each with what it generates
    step = scheduler.next_step()
    assert step is not None
    assert [(c.sequence.index, c.sequence.pages) for c in step.chunks] == [(0, [1, 2]), (1, [1, 2])]
    assert scheduler.free_pages == 0
    scheduler.advance(step)
    scheduler.finish(step.chunks[1].sequence)
    assert scheduler.free_pages == 2
    step = scheduler.next_step()
    assert step is not None
    assert not step.prefill, "sequence 2 waits for the pages of its own rank"
    scheduler.finish(step.chunks[0].sequence)
    step = scheduler.next_step()
    assert step is not None
    assert [c.sequence.index for c in step.chunks] == [2]
