"""The decode step's inputs, its token and its queue, on CPU: an eager pass stands in for the CUDA graph."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from core_torch import LLM, SamplingParams
from core_torch import graphs as graphs_module
from core_torch.decode_rows import DecodeRows
from core_torch.graphs import DecodeGraphs
from core_torch.kernels.vocabulary import entries, largest_keys_plain
from core_torch.layers.embedding import ParallelHead
from core_torch.runner import ModelRunner
from shared_config.sampling import SamplingParams as Params
from shared_config.scheduler import Chunk, Sequence, Step
from tests.reference import make_model, save_model


def sequence(index: int, prompt: int, output: list[int], pages: list[int]) -> Sequence:
    s = Sequence(index, list(range(100 * index, 100 * index + prompt)), Params(), output=output, pages=pages)
    s.slot, s.computed = index, prompt + len(output) - 1
    return s


def step_of(*sequences: Sequence) -> Step:
    return Step(False, tuple(Chunk(s, s.computed, 1, True) for s in sequences))


def test_rows_are_what_the_sequences_say() -> None:
    rows = DecodeRows(page_size=4, rows=4, pages=3)
    a, b = sequence(1, 5, [7], [3, 4]), sequence(2, 2, [8, 9], [6])
    assert rows.fill(step_of(a, b)) == (True, True)
    want = [[7, 9, 0, 0], [5, 3, 0, 0], [4 * 4 + 1, 6 * 4 + 3, 0, 0], [6, 4, 1, 1], [1, 2, 0, 0],
            [3, 6, 0, 0], [4, 0, 0, 0], [0, 0, 0, 0]]  # fmt: skip
    assert rows.packed.tolist() == want
    a.computed += 1
    b.computed += 1
    b.pages.append(5)  # what a sequence will need is reserved for it, so this is no new table
    rows.packed[6, 1] = 5
    assert rows.fill(step_of(a, b)) == (False, False)  # the tokens are on their way
    assert rows.packed[:5].tolist() == [
        [7, 9, 0, 0],
        [6, 4, 0, 0],
        [18, 20, 0, 0],
        [7, 5, 1, 1],
        [1, 2, 0, 0],
    ]
    a.output.append(11)
    assert rows.fill(step_of(a)) == (True, True)
    assert rows.packed[:, 1].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]  # b's row pads again
    assert rows.packed[0, 0] == 11


def test_a_prompt_of_one_token_decodes_from_it() -> None:
    rows = DecodeRows(page_size=4, rows=1, pages=1)
    s = sequence(1, 1, [], [2])
    assert rows.fill(step_of(s)) == (True, True)
    assert rows.packed[0, 0] == 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_order_as_logits_and_ties_take_the_first(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 97).to(dtype).round(decimals=0)  # many ties
    logits[0] = -torch.rand(97).to(dtype)
    logits[1] = torch.tensor([-0.0, 0.0, -1.0]).to(dtype).repeat(33)[:97]
    logits[2] = float("-inf")
    logits[3, 60] = float("inf")
    halves = [largest_keys_plain(logits[:, :49], first=0), largest_keys_plain(logits[:, 49:], first=49)]
    assert torch.equal(entries(torch.stack(halves).amax(0)), logits.float().argmax(-1))


def argmax_on_rank(vocab: int) -> bool:
    """Runs on every rank of a pool."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    group: Any = SimpleNamespace(rank=rank, size=size, device_group=torch.distributed.group.WORLD)
    generator = torch.Generator().manual_seed(0)
    head = ParallelHead(vocab, 8, group, None)
    full = torch.randn(head.weight.shape[0] * size, 8, generator=generator).round()
    full[vocab:] = 100  # padding rows must never win
    with torch.inference_mode():
        head.weight.copy_(full[rank * len(head.weight) : (rank + 1) * len(head.weight)])
        hidden = torch.randn(40, 8, generator=generator).round()
        local = head.local(hidden)
        return torch.equal(head.argmax(local), head.gather(local).argmax(-1))


@pytest.mark.parametrize("vocab", [97, 5, 2])
def test_the_best_token_needs_no_gathered_logits(vocab: int, ranks: Any) -> None:
    """Also where the last rank's share ends early, or holds nothing."""
    assert all(ranks(4).run(argmax_on_rank, vocab, timeout=60))


class EagerGraph:
    """Replays by calling again; the results stay where the first ones were."""

    def __init__(self) -> None:
        self.replays = 0

    def capture(self, call: Any) -> Any:
        self.call, self.results = call, call()
        return self.results

    def replay(self) -> None:
        self.replays += 1
        for kept, new in zip(self.results, self.call(), strict=True):
            kept.copy_(new)

    def reset(self) -> None:
        pass


class LateStage(graphs_module.Stage):
    """Memory of the host; what is copied to it is there when its event is waited for."""

    def __init__(self, shape: tuple[int, int], num_tokens: int) -> None:
        self.inputs = torch.zeros(shape, dtype=torch.int64)
        self.tokens = torch.zeros(num_tokens, dtype=torch.int64)
        self.event: Any = SimpleNamespace(synchronize=lambda: None, record=lambda: None)


@pytest.fixture
def eager_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_module, "Stage", LateStage)
    monkeypatch.setattr(graphs_module, "new_graph", EagerGraph)
    monkeypatch.setattr(graphs_module, "new_pool", lambda: None)
    monkeypatch.setattr(graphs_module, "warm_up", lambda call: call())
    monkeypatch.setattr(graphs_module, "capture", lambda graph, pool, call: graph.capture(call))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    make = ModelRunner.__init__

    def with_graphs(self: ModelRunner, config: Any, parallel: Any, settings: Any, dtype: Any) -> None:
        make(self, config, parallel, settings, dtype)
        if settings.cuda_graphs:
            self.graphs = DecodeGraphs(self.model, self.cache, parallel, settings, self.max_pages)

    monkeypatch.setattr(ModelRunner, "__init__", with_graphs)


@pytest.mark.parametrize("deterministic", [False, True])
def test_generation_through_graphs_is_eager_generation(
    deterministic: bool, tmp_path: Path, eager_graphs: None
) -> None:
    """Requests of several lengths that join, end and wait, greedy or drawn, with logits and without."""
    folder = save_model(make_model("base"), tmp_path, packed=True)
    rng = np.random.default_rng(0)
    prompts = [[int(t) for t in rng.integers(1, 131, n)] for n in (3, 17, 1, 9, 30)]
    plain = [SamplingParams(temperature=0, max_tokens=n) for n in (12, 5, 30, 9, 17)]
    mixed = [
        SamplingParams(temperature=i % 2, seed=i, max_tokens=9, return_logits=i == 2, ignore_eos=True)
        for i in range(5)
    ]
    options = {"max_num_seqs": 3, "max_model_len": 64, "deterministic": deterministic}
    with LLM(folder, **options) as graphs, LLM(folder, cuda_graphs=False, **options) as eager:
        assert graphs._session is not None
        for params in (plain, mixed):
            got, want = graphs.generate(prompts, params), eager.generate(prompts, params)
            for mine, theirs in zip(got, want, strict=True):
                assert (mine.token_ids, mine.text, mine.finish_reason) == (
                    theirs.token_ids, theirs.text, theirs.finish_reason
                )  # fmt: skip
                assert (mine.logits is None) == (theirs.logits is None)
                if mine.logits is not None:
                    assert np.allclose(np.stack(mine.logits), np.stack(theirs.logits), rtol=1e-4, atol=1e-5)
        found: Any = graphs._session.runner.graphs
        assert sum(bucket.graph.replays for bucket in found._buckets.values()) > 30
