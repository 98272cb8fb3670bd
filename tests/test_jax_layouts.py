"""Every layout in JAX, on virtual devices, against transformers in float32: prefill, chunked prefill, decode, fused and
unfused. The mirror of `test_layouts`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_torch.kernels.comm import CommBackend
from jax_bridge import LLM, SamplingParams
from jax_bridge import runner as runner_module
from jax_bridge.__main__ import main
from jax_bridge.batch import build_batch
from jax_bridge.layers.head_exchange import HeadExchange
from jax_bridge.layers.mlp import Experts, SparseMoE
from jax_bridge.layers.norm import RMSNorm
from jax_bridge.mesh import axis_of, refine
from jax_bridge.models.qwen3_next import Qwen3Next
from jax_bridge.parallel import Parallel, open_parallel
from jax_bridge.partial_sum import DebtError, PartialSum
from jax_bridge.pieces import NOBODY, Pieces
from jax_bridge.transports.rendezvous import RendezvousBuffers
from shared_config import FusionWarning, ParallelLayout
from shared_config.results import Reductions, RequestOutput
from shared_config.scheduler import Chunk, Sequence, Step
from tests.jax_case import decide
from tests.reference import FULL, LINEAR, greedy, logits_of, make_model, relative_error, save_model
from tests.test_layouts import SIZES, TOLERANCE, layout

MAX_TOKENS = 3
# Heads for eight shares, KV heads fewer than those; a dense MLP and a bias that one rank alone may add.
MODEL = {
    "num_hidden_layers": 2,
    "layer_types": [LINEAR, FULL],
    "mlp_only_layers": [0],
    "attention_bias": True,
    "num_attention_heads": 8,
    "head_dim": 16,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# Both prefill passes have 32 rows of two sequences, one shape to compile: the second prompt is in both, the first ends
# in the first, with its only token, and the third begins in the second.
CHUNK, LENGTHS, TOKENS = 32, (12, 38, 14), (1, MAX_TOKENS, MAX_TOKENS)
PASSES = 2 + MAX_TOKENS - 1  # that the second prompt takes part in
PARAMS = [
    SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, return_logits=True, prompt_logprobs=True)
    for n in TOKENS
]
ENGINE: dict[str, Any] = {"device": "cpu", "max_step_tokens": CHUNK, "max_model_len": 64, "max_num_seqs": 3}

# What a pass of two layers reduces (fused, unfused) where it may fuse.
LAYOUTS = {
    layout(2, cp=2): Reductions(0, 2),  # attention has one rank; attn_cp_size is above moe_dp_size
    layout(2, cp=2, moe_dp=2): Reductions(0, 0),
    # the README's table
    layout(4, ep=2): Reductions(4, 0),
    layout(4, cp=2, moe_dp=2): Reductions(4, 0),
    layout(4, cp=2): Reductions(2, 2),
    layout(4, dp=2): Reductions(0, 4),
    layout(4, moe_dp=2): Reductions(4, 0),
    # and several at once
    layout(4, cp=4, moe_dp=2): Reductions(0, 2),
    layout(4, dp=2, cp=2, ep=2): Reductions(0, 2),
    layout(8): Reductions(4, 0),  # each KV head on several ranks
    layout(8, dp=2, ep=8): Reductions(0, 4),
    layout(8, cp=4, moe_dp=2, ep=2): Reductions(2, 2),  # a slice has half of the pieces
    layout(8, dp=2, cp=2, moe_dp=2, ep=2): Reductions(0, 4),
}
UNFUSED_TOO = (layout(4, ep=2), layout(4, cp=2))


def options(layout: ParallelLayout) -> dict[str, Any]:
    """The keywords of `LLM`."""
    return {"tensor_parallel_size": layout.tp_size} | {name: getattr(layout, name) for name in SIZES.values()}


class Model:
    """A checkpoint, prompts, and what transformers makes of them."""

    def __init__(self, folder: Path) -> None:
        model = make_model("base", **MODEL)
        self.folder = save_model(model, folder, packed=False)
        rng = np.random.default_rng(0)
        self.prompts = [[int(t) for t in rng.integers(1, 131, n)] for n in LENGTHS]
        self.wanted = [greedy(model, prompt, n) for prompt, n in zip(self.prompts, TOKENS, strict=True)]
        self.logits = [logits_of(model, prompt) for prompt in self.prompts]

    @contextlib.contextmanager
    def open(self, layout: ParallelLayout, **how: Any) -> Iterator[LLM]:
        with LLM(self.folder, backend="reference", **ENGINE, **options(layout), **how) as llm:
            yield llm

    def check(self, outputs: list[RequestOutput]) -> None:
        """Tokens, the logits that they were chosen from, and the prompts' log-probabilities."""
        for output, (tokens, rows), logits in zip(outputs, self.wanted, self.logits, strict=True):
            assert output.token_ids == tokens
            assert relative_error(np.stack(output.logits), rows) <= TOLERANCE
            want = np.asarray(jax.nn.log_softmax(logits))[:-1]
            want = want[np.arange(len(want)), output.prompt_token_ids[1:]]
            assert output.prompt_logprobs == pytest.approx(want, abs=10 * TOLERANCE)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("layouts"))


@pytest.mark.parametrize(
    ("layout", "fusion"), [*((it, "auto") for it in LAYOUTS), *((it, "off") for it in UNFUSED_TOO)], ids=str
)
def test_every_layout_agrees_with_transformers(layout: ParallelLayout, fusion: str, model: Model) -> None:
    """Fused where the rules allow it, and unfused; every sum is counted."""
    with model.open(layout, fusion=fusion) as llm:
        outputs = llm.generate(model.prompts, PARAMS)
        owes = max(layout.attn_tp_size, layout.moe_reduce_size) > 1
        assert llm.fusion.enabled == (fusion == "auto" and owes and layout.attn_dp_size == 1)
    model.check(outputs)
    each = LAYOUTS[layout]
    if fusion == "off":
        each = Reductions(0, each.fused + each.unfused)
    assert outputs[1].reductions == Reductions(each.fused * PASSES, each.unfused * PASSES)


def test_a_loop_of_decode_steps_under_data_parallelism(model: Model) -> None:
    """The rows of the ranks' passes are in another order than the step's: each row's next token is its own."""
    params = [replace(own, return_logits=False) for own in PARAMS]
    with model.open(layout(4, dp=2, cp=2, ep=2)) as llm:
        outputs = llm.generate(model.prompts, params)
    assert [output.token_ids for output in outputs] == [tokens for tokens, _ in model.wanted]


PIECES, SLICES, EXPERTS = layout(4, cp=2), layout(4, cp=2, moe_dp=2), layout(4, ep=2)
Change = Callable[[Qwen3Next, Parallel], None]


@contextlib.contextmanager
def changed(change: Change) -> Iterator[None]:
    """Models are made with `change`."""

    def make(config: Any, attention: Any, mlp: Any, experts: Any, pieces: Any) -> Qwen3Next:
        model = Qwen3Next(config, attention, mlp, experts, pieces)
        change(model, mock.Mock(attention=attention, mlp=mlp, pieces=pieces))
        return model

    with mock.patch.object(runner_module, "Qwen3Next", make):
        yield


def owe(axis: str, *names: str) -> contextlib.AbstractContextManager[None]:
    """The sums of the named modules of every layer are owed by `axis` of `Parallel`."""

    def change(model: Qwen3Next, parallel: Parallel) -> None:
        for layer in model.layers:
            for name in names:
                module: Any = layer
                for part in name.split("."):
                    module = getattr(module, part, None)
                if module is not None:
                    module.axis = getattr(parallel, axis)

    return changed(change)


def scatter_like(*, reduced: bool = True, shift: int = 0, again: bool = False) -> Any:
    def scatter(self: Pieces, owed: PartialSum, batch: Any) -> PartialSum:
        axis, part, pieces = owed.axis, owed.take(), self._gathers(batch)
        total = jax.lax.psum(part, axis.name) if reduced else part
        own = pieces.own_rows(jnp.roll(total, shift * (total.shape[0] // pieces.size), 0))
        return PartialSum(own, axis if again else NOBODY)

    return mock.patch.object(Pieces, "scatter", scatter)


def fault(name: str) -> contextlib.AbstractContextManager[Any]:
    """Inside it engines are wrong in the way `name`."""
    pay, shared, to_heads, to_rows = (
        RMSNorm.pay,
        SparseMoE._shared,
        HeadExchange.to_heads,
        HeadExchange.to_rows,
    )

    def pay_twice(self: RMSNorm, owed: PartialSum, residual: jax.Array) -> Any:
        pay(self, owed, residual)
        return pay(self, owed, residual)

    def pay_nothing(self: RMSNorm, owed: PartialSum, residual: jax.Array) -> Any:
        # JAX's types do not let a part pass for a sum, so rank 0's part is taken for it.
        mine = jnp.where(owed.axis.rank() == 0, part := owed.take(), jnp.zeros_like(part))
        return pay(self, PartialSum(jax.lax.psum(mine, owed.axis.name), NOBODY), residual)

    def drop(self: Pieces, owed: PartialSum, batch: Any) -> PartialSum:
        del self, batch
        return PartialSum(jnp.zeros((CHUNK // 2, 64), jnp.float32), owed.axis)

    faults: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
        "attention's sum over the MoE group": lambda: owe("mlp", "mixer.out_proj"),
        "the MoE's sum over the attention group": lambda: owe(
            "attention", "mlp.experts", "mlp.shared_expert.down_proj", "mlp.down_proj"
        ),
        "the experts' sum over the attention group": lambda: owe("attention", "mlp.experts"),
        "the gather is forgotten": lambda: mock.patch.multiple(
            Pieces, gather=lambda self, x, batch: x, scatter=lambda self, owed, batch: owed
        ),
        "another piece's rows are taken": lambda: scatter_like(shift=1),
        "paid twice": lambda: scatter_like(again=True),
        "paid twice by the norm": lambda: mock.patch.object(RMSNorm, "pay", pay_twice),
        "paid never": lambda: scatter_like(reduced=False),
        "paid never by the norm": lambda: mock.patch.object(RMSNorm, "pay", pay_nothing),
        "a debt is dropped": lambda: mock.patch.object(Pieces, "scatter", drop),
        "every rank has the first experts": lambda: mock.patch.object(
            Experts, "_own", lambda self, ids: jnp.where(ids < self.num_experts, ids, jnp.int32(-1))
        ),
        "the shared expert is summed by every rank": lambda: mock.patch.object(
            SparseMoE, "_shared", lambda self, x: PartialSum((p := shared(self, x)).take() * 4, p.axis)
        ),
        "pieces arrive in another order": lambda: mock.patch.object(
            HeadExchange, "to_heads", lambda self, x, batch: jnp.roll(to_heads(self, x, batch), CHUNK // 2, 0)
        ),
        "heads come back in another order": lambda: mock.patch.object(
            HeadExchange, "to_rows", lambda self, out, batch: jnp.roll(to_rows(self, out, batch), 8, 1)
        ),
    }
    return faults[name]()


@pytest.mark.parametrize(
    ("name", "layout", "error"),
    [
        ("attention's sum over the MoE group", PIECES, ""),
        ("the MoE's sum over the attention group", PIECES, ""),
        ("the experts' sum over the attention group", PIECES, "pay each to its own"),
        ("the gather is forgotten", PIECES, ""),
        ("another piece's rows are taken", PIECES, ""),
        ("paid twice", PIECES, ""),
        ("paid twice by the norm", SLICES, "it would be paid twice"),
        ("paid never", PIECES, ""),
        ("paid never by the norm", SLICES, ""),
        ("a debt is dropped", SLICES, "were never reduced"),
        ("every rank has the first experts", EXPERTS, ""),
        ("the shared expert is summed by every rank", EXPERTS, ""),
        ("pieces arrive in another order", SLICES, ""),
        ("heads come back in another order", SLICES, ""),
    ],
)
def test_a_layout_that_is_wrong_is_found(name: str, layout: ParallelLayout, error: str, model: Model) -> None:
    """By an error where types can tell, else by logits that are far off."""
    prompt, params = model.prompts[1][:CHUNK], SamplingParams(temperature=0, max_tokens=1, return_logits=True)
    with fault(name), model.open(layout, fusion="off") as llm:
        if error:
            with pytest.raises(DebtError, match=error):
                llm.generate(prompt, params)
        else:
            logits = llm.generate(prompt, params)[0].logits
            assert logits is not None
            assert relative_error(logits[0], model.logits[1][CHUNK - 1]) > 100 * TOLERANCE
    PartialSum.open_debts = 0


class TestGroups:
    """What is opened for a layout, without a model."""

    def open(self, layout: ParallelLayout, **how: Any) -> Any:
        devices = jax.devices()[: layout.tp_size]
        decision = decide(layout.tp_size, layout=layout, hidden_size=64, mode="auto", **how)
        return open_parallel(decision, layout, devices=devices, dtype=jnp.dtype("float32"))

    @pytest.mark.parametrize(
        ("layout", "groups"),
        [
            (EXPERTS, [[[0, 1, 2, 3]]]),  # attention and MoE share one
            (PIECES, [[[0, 1], [2, 3]], [[0, 1, 2, 3]]]),
            (SLICES, [[[0, 1], [2, 3]]]),
            (layout(4, cp=4), [[[0, 1, 2, 3]]]),
            (layout(4, cp=4, moe_dp=4), []),
        ],
        ids=str,
    )
    def test_one_workspace_and_one_self_test_for_each_group(
        self, layout: ParallelLayout, groups: list[list[list[int]]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: dict[int, set[tuple[int, int]]] = {}
        create = RendezvousBuffers.create

        def noted(self: RendezvousBuffers, max_tokens: int, comm: CommBackend) -> None:
            made.setdefault(self._id, set()).add(tuple(self._place.tolist()))
            create(self, max_tokens, comm)

        monkeypatch.setattr(RendezvousBuffers, "create", noted)
        with self.open(layout) as parallel:
            comms = {axis.comm for axis in (parallel.attention, parallel.mlp)} - {None}
            assert parallel.decision.enabled == bool(groups)
            assert [len(comms), sorted(made)] == [len(groups), list(range(len(groups)))]
            for places, rows in zip(made.values(), groups, strict=True):
                assert places == {(g, rank) for g, row in enumerate(rows) for rank in range(len(row))}
            if layout.attn_tp_size == layout.moe_reduce_size:
                assert parallel.attention.comm is parallel.mlp.comm

    def test_a_group_that_fails_stops_those_that_have_started(self, monkeypatch: pytest.MonkeyPatch) -> None:
        create = RendezvousBuffers.create

        def broken(self: RendezvousBuffers, max_tokens: int, comm: CommBackend) -> None:
            if self._axis_size == 4 and self._place[1] == 3:
                raise MemoryError("injected")
            create(self, max_tokens, comm)

        monkeypatch.setattr(RendezvousBuffers, "create", broken)
        opening = self.open(PIECES)
        with pytest.warns(FusionWarning, match="injected"):
            parallel = opening.__enter__()
        assert not parallel.decision.enabled
        for axis in (parallel.attention, parallel.mlp):
            assert axis.comm.decision.reason.startswith("creating the workspace failed on rank 3")
            assert not axis.comm.answer((4, 64), jnp.dtype("float32"), side=axis.side).fuses
        opening.__exit__(None, None, None)


def test_the_mesh_is_the_common_refinement() -> None:
    def mesh(layout: ParallelLayout) -> list[tuple[str, int]]:
        return [(factor.name, factor.size) for factor in refine(layout)]

    assert mesh(layout(1)) == [("tp", 1)]
    assert mesh(layout(4)) == [("tp", 4)]
    assert mesh(PIECES) == [("cp", 2), ("tp", 2)]
    assert mesh(EXPERTS) == [("ep", 2), ("moe_tp", 2)]
    halves = refine(layout(8, cp=4, moe_dp=2))
    assert mesh(layout(8, cp=4, moe_dp=2)) == [("moe_dp", 2), ("cp_moe_tp", 2), ("tp", 2)]
    assert axis_of(halves, "cp").name == ("moe_dp", "cp_moe_tp")
    assert axis_of(halves, "ep", "moe_tp").name == ("cp_moe_tp", "tp")
    assert axis_of(halves, "dp", "cp", within=("ep", "moe_tp")).name == "cp_moe_tp"
    with pytest.raises(
        ValueError, match="2 ranks along attention's 'tp' and 3 along the MoE's 'moe_tp' do not"
    ):
        refine(layout(6, cp=3, ep=2))


@pytest.mark.parametrize("it", LAYOUTS, ids=str)
def test_axes_are_the_layout_s_groups(it: ParallelLayout) -> None:
    """Each kind of group, as the ranks that the mesh has along its axes."""
    factors = refine(it)
    ranks = np.arange(it.tp_size).reshape([factor.size for factor in factors])
    owes = ("ep", "moe_tp")
    axes = {
        "attn_tp": axis_of(factors, "tp"),
        "attn_cp": axis_of(factors, "cp"),
        "moe_ep": axis_of(factors, "ep"),
        "moe_reduce": axis_of(factors, *owes),
        "pieces": axis_of(factors, "dp", "cp"),
        "prefill_gather": axis_of(factors, "dp", "cp", within=owes),
        "decode_gather": axis_of(factors, "dp", within=owes),
    }
    for name, axis in axes.items():
        names = (axis.name,) if isinstance(axis.name, str) else axis.name
        along = [i for i, factor in enumerate(factors) if factor.name in names]
        rows = np.moveaxis(ranks, along, range(-len(along), 0)).reshape(-1, axis.size)
        assert tuple(sorted(map(tuple, rows.tolist()))) == it.all_groups(name), name


def test_a_batch_of_data_parallel_passes() -> None:
    """Three sequences over two DP ranks: a pass each, of one shape; what is wanted is in the step's order."""
    sequences = [
        Sequence(i, list(range(10 * i + 1, 10 * i + 1 + n)), PARAMS[0], pages=[i + 1], slot=i + 1)
        for i, n in enumerate((3, 2, 4))
    ]
    step = Step(True, tuple(Chunk(s, 0, len(s.prompt), True) for s in sequences))
    batch = build_batch(step, page_size=16, layout=layout(2, dp=2))
    assert batch.token_ids.tolist() == [1, 2, 3, 21, 22, 23, 24, *[0] * 9, 11, 12, *[0] * 14]
    assert batch.state_slots.tolist() == [1, 3, 2, 0]
    assert batch.order.tolist() == [0, 2, 1, 0]
    assert batch.logit_rows.tolist() == [2, 16 + 1, 6, 0]
    assert batch.sample_rows.tolist() == [0, 1, 2, 0]
    every = build_batch(step, page_size=16, layout=layout(2, dp=2), all_logits=True)
    assert every.logit_rows.tolist()[:9] == [0, 1, 2, 16, 17, 3, 4, 5, 6]
    assert every.sample_rows.tolist() == [2, 4, 8, 0]


def test_generate_command_takes_a_layout(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--model", "folder", "--tp", "8", "--prompt", "x", "--cp", "2", "--dp", "2"]
    with mock.patch.object(LLM, "__init__", side_effect=ValueError("seen")) as made:
        from jax_bridge import __main__ as command_module

        with mock.patch.object(command_module, "LLM", LLM):
            assert main([*command, "--moe-dp", "2", "--ep", "4"]) == 2
    assert "seen" in capsys.readouterr().err
    wanted = {"attn_cp_size": 2, "attn_dp_size": 2, "moe_dp_size": 2, "ep_size": 4, "tensor_parallel_size": 8}
    assert made.call_args.kwargs.items() >= wanted.items()
