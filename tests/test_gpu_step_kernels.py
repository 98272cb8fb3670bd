"""The compiled kernels around the layers on one GPU: add and norm, the embedding's rows, the best token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from core_torch.kernels.add_norm import add_norm, check_add_norm
from core_torch.kernels.contract import add_rmsnorm
from core_torch.kernels.norm import rms_norm_reference
from core_torch.kernels.vocabulary import (
    check_vocabulary,
    embedding_rows,
    embedding_rows_plain,
    entries,
    largest_keys,
    largest_keys_plain,
)
from tests.gpu_kernels import (
    EPS,
    assert_as_close,
    captured,
    randn,
    seeded,  # noqa: F401 (a fixture)
)
from tests.test_gpu_decode_kernels import SIZES

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("D", [8, 72, 256, 1000, 2048, 5120, 8192])
@pytest.mark.parametrize("T", SIZES)
def test_add_norm(T: int, D: int) -> None:
    assert check_add_norm(hidden_size=D, dtype=torch.bfloat16, device=CUDA).usable
    summed, weight = randn(T, D), randn(D) / 10
    for residual in (randn(T, D) * 3, None):
        for weight_bias in (1.0, 0.0):
            stream, normed = add_norm(summed, residual, weight, EPS, weight_bias)
            want_stream, plain = add_rmsnorm(summed, residual, weight, EPS, weight_bias)
            assert torch.equal(stream, want_stream)
            want = rms_norm_reference(want_stream, weight, eps=EPS, weight_bias=weight_bias)
            assert_as_close(normed, plain, want)
            # Sums of squares may differ in the last bit of float32, so a few values in that of bfloat16.
            assert (normed != plain).sum() <= 2 + 0.02 * normed.numel()


def test_add_norm_of_zeros_and_large_values() -> None:
    weight = randn(2048)
    for scale in (0.0, 1e-20, 1e15):
        stream, normed = add_norm(randn(3, 2048) * scale, randn(3, 2048) * scale, weight, EPS, 1.0)
        want = rms_norm_reference(stream, weight, eps=EPS, weight_bias=1.0)
        assert normed.isfinite().all()
        assert torch.allclose(normed.double(), want, rtol=1e-2, atol=1e-30)


def test_add_norm_bits_do_not_depend_on_the_batch_or_the_launch() -> None:
    summed, residual, weight = randn(67, 2048), randn(67, 2048), randn(2048)
    want = add_norm(summed, residual, weight, EPS, 1.0)
    without = add_norm(summed, residual, weight, EPS, 1.0, launch_with_pdl=False)
    alone = add_norm(summed[13:14], residual[13:14], weight, EPS, 1.0)
    for i in range(2):
        assert torch.equal(without[i], want[i])
        assert torch.equal(alone[i], want[i][13:14])


def test_add_norm_in_a_graph_follows_its_inputs() -> None:
    summed, residual, weight = randn(7, 2048), randn(7, 2048), randn(2048)

    def chain() -> Tensor:
        """Each call's inputs are the call's before it, with launches that overlap."""
        stream, normed = residual, summed
        for _ in range(20):
            stream, normed = add_norm(normed, stream, weight, EPS, 1.0)
        return torch.cat((stream, normed))

    graph, out = captured(chain)
    for _ in range(3):
        summed.copy_(randn(7, 2048))
        graph.replay()
        assert torch.equal(out, chain())


@pytest.mark.parametrize("index", [torch.int64, torch.int32])
@pytest.mark.parametrize("T", SIZES)
def test_vocabulary_rows(T: int, index: torch.dtype) -> None:
    for V, first, count, D in ((1000, 0, 500, 2048), (1000, 500, 500, 72), (97, 49, 48, 8), (5, 6, 0, 264)):
        assert check_vocabulary(hidden_size=D, dtype=torch.bfloat16, device=CUDA).usable
        weight, tokens = randn(max(count, 3), D), torch.randint(0, V, (T,), device="cuda", dtype=index)
        got = embedding_rows(tokens, weight, first=first, count=count)
        assert torch.equal(got, embedding_rows_plain(tokens, weight, first=first, count=count))


@pytest.mark.parametrize("W", [1, 7, 8, 1000, 75968])
@pytest.mark.parametrize("T", SIZES)
def test_vocabulary_argmax(T: int, W: int) -> None:
    """Bitwise the plain keys: ties, both zeros, infinities, rows that begin anywhere."""
    wide = randn(T, W + 3)
    for logits in (wide[:, :W], wide[:, 1 : W + 1].round(), -wide[:, :W].abs().clamp(max=1), wide[:, :W] * 0):
        for first in (0, 75968):
            assert torch.equal(largest_keys(logits, first=first), largest_keys_plain(logits, first=first))
    wide[0] = float("-inf")
    wide[-1, W // 2] = float("inf")
    keys = largest_keys(wide[:, :W], first=0)
    assert torch.equal(entries(keys), wide[:, :W].float().argmax(-1))
