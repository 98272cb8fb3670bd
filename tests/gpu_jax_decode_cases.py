"""What `test_gpu_jax_decode.py` runs on GPUs, in a process of its own.

As in `gpu_jax_cases`, each case is a function of this module and gives one JSON line. Shapes are those of one of two
ranks of the 80B model: B sequences or T tokens, 8 key and 16 value heads of 128, 8 query heads on one KV head of 256,
512 experts of 256, hidden 2048.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from core_torch.kernels import add_norm as torch_norm
from core_torch.kernels import few_rows as torch_few_rows
from core_torch.kernels import gdn_decode as torch_gdn
from core_torch.kernels import moe_decode as torch_moe
from core_torch.kernels import norm_rope as torch_rope
from core_torch.kernels import paged_decode as torch_paged
from core_torch.kernels import vocabulary as torch_vocabulary
from core_torch.kernels.native import MODULES
from jax_bridge import LLM, SamplingParams
from jax_bridge.dlpack import from_torch, to_torch
from jax_bridge.kernels.add_norm import add_norm
from jax_bridge.kernels.compiled import open_kernels
from jax_bridge.kernels.few_rows import few_rows
from jax_bridge.kernels.gdn_decode import gdn_decode
from jax_bridge.kernels.moe import routed_experts
from jax_bridge.kernels.moe_decode import route_decode, routed_experts_decode
from jax_bridge.kernels.norm_rope import norm_rope
from jax_bridge.kernels.paged_decode import paged_decode_attention
from jax_bridge.kernels.vocabulary import largest_keys, largest_keys_plain
from tests.gpu_jax_cases import run_cases

TINY = Path(__file__).parent / "data/tiny-qwen3-next"
SIZES = (1, 3, 64, 67)
FEW = (1, 3, 16, 32)  # rows that few_rows takes
OUTPUTS = (6176, 2048, 512, 1)  # of Gated DeltaNet's projections, the router, the shared expert's gate
EPS = 1e-6
PAGE, PAGES = 16, 400
ROPE = {"num_heads": 8, "rotary_dim": 64, "theta": 1e7, "eps": EPS, "weight_bias": 1.0}
SCALE = 256**-0.5
PROMPTS = [
    "import os\nimport sys\n\n\ndef main(",
    "class Stack:\n    def __init__(self):",
    "for i in range(",
    "try:",
]


@functools.cache
def opened() -> None:
    """The kernels are loaded and registered once."""
    open_kernels(MODULES, torch.device("cuda", 0))


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def on_jax(*tensors: Tensor) -> list[jax.Array]:
    """Copies in JAX's own memory, which may be donated."""
    torch.cuda.synchronize()
    return [jax.block_until_ready(jnp.array(from_torch(tensor), copy=True)) for tensor in tensors]


def different(got: Any, want: Any) -> list[int]:
    """How many elements of each result have other bits."""
    torch.cuda.synchronize()
    counts = []
    for mine, theirs in zip(got, want, strict=True):
        raw = torch.int32 if theirs.element_size() == 4 else torch.int16
        counts.append(int((to_torch(jax.block_until_ready(mine)).view(raw) != theirs.view(raw)).sum()))
    return counts


def gdn_case(B: int) -> tuple[list[Tensor], Any, Any]:
    """(operands, the torch function of copies -> results, the JAX function). Operands 1 and 2 change in place."""
    channels, value, slots = 2 * 8 * 128 + 16 * 128, 16 * 128, B + 2
    operands = [
        randn(B, channels + value + 32),
        randn(slots, channels, 3),
        randn(slots, 16, 128, 128, dtype=torch.float32),
        (torch.randperm(slots - 1, device="cuda")[:B] + 1).int(),
        randn(channels, 4) / 2,
        torch.rand(16, device="cuda") * 2,
        randn(16, dtype=torch.float32),
        randn(128),
    ]
    names = ("conv_weight", "a_log", "dt_bias", "norm_weight")

    def on_torch(projected: Tensor, conv: Tensor, state: Tensor, slots: Tensor, *weights: Tensor) -> Any:
        named = dict(zip(names, weights, strict=True))
        return torch_gdn.gdn_decode(projected, conv, state, slots, **named, eps=EPS), conv, state

    def on_xla(
        projected: jax.Array, conv: jax.Array, state: jax.Array, slots: jax.Array, *weights: Any
    ) -> Any:
        return gdn_decode(projected, conv, state, slots, **dict(zip(names, weights, strict=True)), eps=EPS)

    return operands, on_torch, on_xla


def attention_case(B: int) -> tuple[list[Tensor], Any, Any]:
    """norm_rope, then paged_decode with its gate; operands 1 and 2 are the caches."""
    lengths = (torch.arange(B, device="cuda") * 37 % 900 + 1).int()
    tables = torch.zeros(B, 64, dtype=torch.int32, device="cuda")
    owned = torch.randperm(PAGES - 1, device="cuda").int() + 1
    for b in range(B):  # rows may share pages, but not the page that they write
        tables[b] = owned[(torch.arange(64, device="cuda") + 3 * b) % (PAGES - 1)]
        tables[b, (int(lengths[b]) - 1) // PAGE] = owned[PAGES - 2 - b]
    positions = lengths - 1
    at = tables.gather(1, (positions // PAGE)[:, None].long())[:, 0]
    operands = [
        randn(B, 2 * 9 * 256),
        randn(PAGES, PAGE, 1, 256),
        randn(PAGES, PAGE, 1, 256),
        positions,
        at * PAGE + positions % PAGE,
        tables,
        lengths,
        randn(256) / 10,
        randn(256) / 10,
    ]

    def on_torch(
        projected: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, *rest: Tensor
    ) -> Any:
        tables, lengths, q_weight, k_weight = rest
        q = torch_rope.norm_rope(
            projected, positions, slots, k, v, q_weight=q_weight, k_weight=k_weight, **ROPE
        )
        gate = projected[:, 2048:4096]
        return torch_paged.paged_decode_attention(q, k, v, tables, lengths, scale=SCALE, gate=gate), k, v

    def on_xla(projected: jax.Array, k: Any, v: Any, positions: Any, slots: Any, *rest: Any) -> Any:
        tables, lengths, q_weight, k_weight = rest
        q, k, v = norm_rope(projected, positions, slots, k, v, q_weight=q_weight, k_weight=k_weight, **ROPE)
        return paged_decode_attention(q, k, v, tables, lengths, projected, scale=SCALE), k, v

    return operands, on_torch, on_xla


@functools.cache
def expert_weights() -> tuple[Tensor, Tensor]:
    return randn(512, 512, 2048) / 45, randn(512, 2048, 256) / 16


def moe_case(T: int) -> tuple[list[Tensor], Any, Any]:
    operands = [randn(T, 2048), randn(T, 512), *expert_weights()]

    def on_torch(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor) -> Any:
        r = torch_moe.route_decode(logits, num_experts=512, top_k=10, normalize=True)
        out = torch_moe.routed_experts_decode(x, r.weights, r.experts, gate_up, down, tiles=r.tiles)
        return out, r.weights, r.experts

    def on_xla(x: jax.Array, logits: jax.Array, gate_up: jax.Array, down: jax.Array) -> Any:
        r = route_decode(logits, top_k=10, normalize=True)
        out = routed_experts_decode(x, r.weights, r.experts, gate_up, down, tiles=r.tiles)
        alone = routed_experts_decode(x, r.weights, r.experts, gate_up, down)  # makes its own tiles
        return out, r.weights, r.experts, alone

    return operands, lambda *xs: (*(got := on_torch(*xs)), got[0]), on_xla


def product_case(T: int) -> tuple[list[Tensor], Any, Any]:
    operands = [randn(T, 2048), *(randn(outputs, 2048) / 45 for outputs in OUTPUTS)]

    def on_torch(x: Tensor, *weights: Tensor) -> Any:
        return [torch_few_rows.few_rows(x, weight) for weight in weights]

    def on_xla(x: jax.Array, *weights: jax.Array) -> Any:
        return [few_rows(x, weight) for weight in weights]

    return operands, on_torch, on_xla


def norm_case(T: int) -> tuple[list[Tensor], Any, Any]:
    operands = [randn(T, 2048), randn(T, 2048) * 3, randn(2048) / 10]

    def on_torch(summed: Tensor, residual: Tensor, weight: Tensor) -> Any:
        alone = torch_norm.add_norm(summed, None, weight, EPS, 1.0)[1]
        return *torch_norm.add_norm(summed, residual, weight, EPS, 1.0), alone

    def on_xla(summed: jax.Array, residual: jax.Array, weight: jax.Array) -> Any:
        return *add_norm(summed, residual, weight, EPS, 1.0), add_norm(summed, None, weight, EPS, 1.0)[1]

    return operands, on_torch, on_xla


def layer_case(T: int) -> tuple[list[Tensor], Any, Any]:
    """A product, then add and norm; operands 1 and 2 are the residual and what the norm gave."""
    operands = [randn(2048, 2048) / 45, randn(T, 2048), randn(T, 2048), randn(2048) / 10]

    def on_torch(weight: Tensor, residual: Tensor, normed: Tensor, norm_weight: Tensor) -> Any:
        part = torch_few_rows.few_rows(normed, weight)
        stream, out = torch_norm.add_norm(part, residual, norm_weight, EPS, 1.0)
        residual.copy_(stream)
        normed.copy_(out)
        return part, residual, normed

    def on_xla(weight: jax.Array, residual: jax.Array, normed: jax.Array, norm_weight: jax.Array) -> Any:
        part = few_rows(normed, weight)
        return part, *add_norm(part, residual, norm_weight, EPS, 1.0)

    return operands, on_torch, on_xla


def vocabulary_case(T: int) -> tuple[list[Tensor], Any, Any]:
    """Whole numbers, so many ties and both zeros; the second rows begin anywhere."""
    operands = [randn(T, 75968).round(), randn(T, 1003).round()]

    def on_torch(*logits: Tensor) -> Any:
        keys = [torch_vocabulary.largest_keys(x, first=0).view(torch.int32).view(T, 2) for x in logits]
        return *keys, *keys

    def on_xla(*logits: jax.Array) -> Any:
        return *map(largest_keys, logits), *map(largest_keys_plain, logits)

    return operands, on_torch, on_xla


# (the case, which operands change in place, sizes)
COMPARED: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...]]] = {
    "gdn": (gdn_case, (1, 2), SIZES),
    "attention": (attention_case, (1, 2), SIZES),
    "moe": (moe_case, (), SIZES),
    "product": (product_case, (), FEW),
    "norm": (norm_case, (), SIZES),
    "vocabulary": (vocabulary_case, (), SIZES),
}
LOOPS = {"gdn": gdn_case, "attention": attention_case, "layer": layer_case}
# (the case, whether operands 1 and 2 are carried on, sizes)
TIMED = {
    "gdn": (gdn_case, True, (1, 8, 64, 128)),
    "attention": (attention_case, True, (1, 8, 64)),
    "moe": (moe_case, False, (1, 8, 64, 128)),
    "layer": (layer_case, True, (1, 8, 32)),
}


def equal_to_torch() -> dict[str, Any]:
    """Every kernel at every size: elements whose bits differ, in each result; and whether caches stayed in place."""
    opened()
    torch.manual_seed(0)
    seen: dict[str, Any] = {}
    for name, (make, donated, sizes) in COMPARED.items():
        for size in sizes:
            operands, on_torch, on_xla = make(size)
            mine = on_jax(*operands)
            addresses = [mine[index].unsafe_buffer_pointer() for index in donated]
            changing = [x.clone() if index in donated else x for index, x in enumerate(operands)]
            got = jax.jit(on_xla, donate_argnums=donated)(*mine)
            seen[f"{name} {size}"] = {
                "different": different(got, on_torch(*changing)),
                "in_place": [got[index].unsafe_buffer_pointer() for index in donated] == addresses,
            }
    return seen


def equal_in_a_loop() -> dict[str, Any]:
    """Eight steps in one program, run five times: each on what the one before left, as in XLA's CUDA graphs."""
    opened()
    torch.manual_seed(1)
    seen: dict[str, Any] = {}
    for name, make in LOOPS.items():
        operands, on_torch, on_xla = make(8)
        first, conv, state, *rest = on_jax(*operands)

        def steps(x: jax.Array, a: jax.Array, b: jax.Array, *rest: jax.Array, step: Any = on_xla) -> Any:
            def one(_: int, carried: Any) -> Any:
                out, a, b = step(x, carried[1], carried[2], *rest)
                return out.reshape(carried[0].shape), a, b

            return jax.lax.fori_loop(0, 8, one, (jnp.zeros((8, 2048), x.dtype), a, b))

        run = jax.jit(steps, donate_argnums=(1, 2))
        out = None
        for _ in range(5):
            out, conv, state = run(first, conv, state, *rest)
        want = None
        for _ in range(40):
            want = on_torch(*operands)
        assert want is not None
        assert out is not None
        results = (out, conv, state)
        seen[name] = different(results, (want[0].reshape(out.shape), *want[1:]))
    return seen


def engine(num_gpus: int) -> dict[str, Any]:
    """Text of the trained checkpoint: compiled kernels against plain ones, both judged by float32."""
    from tests.test_gpu_model import Error

    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, return_logits=True)

    def generate(**options: Any) -> tuple[Any, list[Any]]:
        with LLM(TINY, num_gpus, device="cuda", max_model_len=256, **options) as llm:
            return llm.kernels, llm.generate(PROMPTS, params)

    _, truth = generate(dtype="float32", fusion="off")
    _, plain = generate(kernels="plain", fusion="off")
    answers, compiled = generate(fusion="auto")
    mine, base = Error(compiled, truth), Error(plain, truth)
    # Without logits eight steps run in one program, whose products XLA may order otherwise than those of one step.
    loop = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    with LLM(TINY, num_gpus, device="cuda", max_model_len=256) as llm:
        looped = llm.generate(PROMPTS, loop)
    return {
        "kernels": {name: [answer.usable, answer.reason] for name, answer in answers.items()},
        "relative": [mine.relative, base.relative],
        "rms": base.rms,
        "partings": mine.partings,
        "partings_of_the_loop": partings(looped, truth),
    }


def partings(got: list[Any], truth: list[Any]) -> list[float]:
    """Where tokens part from float32's: by how much its best logit was above its second."""
    gaps = []
    for mine, want in zip(got, truth, strict=True):
        pairs = enumerate(zip(mine.token_ids, want.token_ids, strict=True))
        place = next((i for i, (a, b) in pairs if a != b), None)
        if place is not None:
            best, second = np.sort(want.logits[place])[:-3:-1]
            gaps.append(float(best - second))
    return gaps


def engine_on_one() -> dict[str, Any]:
    return engine(1)


def engine_on_two() -> dict[str, Any]:
    return engine(2)


def times() -> dict[str, Any]:
    """Microseconds a call of each compiled kernel, in chains, and of two ways to run the experts of many tokens."""
    opened()
    seen: dict[str, Any] = {}
    for name, (make, carries, sizes) in TIMED.items():
        for size in sizes:
            operands, _, on_xla = make(size)
            mine = on_jax(*operands)
            short, long = (  # the difference leaves out what a program costs to start
                time_us(functools.partial(chain, on_xla, carries, count), mine) for count in (8, 40)
            )
            seen[f"{name} {size}"] = round((long - short) / 32, 1)
    gate_up, down = on_jax(*expert_weights())
    for T in (256, 512, 1024, 2048, 8192):
        x, logits = on_jax(randn(T, 2048), randn(T, 512))
        weights, experts = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), 10)
        weights = weights.astype(jnp.bfloat16)
        operands = [x, weights, experts, gate_up, down]
        seen[f"experts {T}, one batched product"] = time_us(routed_experts, operands)
        seen[f"experts {T}, chunks of 256 through the kernel"] = time_us(in_chunks, operands)
    return seen


def chain(step: Any, carries: bool, count: int, x: jax.Array, a: Any, b: Any, *rest: Any) -> Any:
    """`count` calls, each on the caches that the one before left, or on its result."""

    for _ in range(count):
        out, *caches = step(x, a, b, *rest)
        x, a, b = (x, *caches) if carries else (out, a, b)
    return x, a if carries else x


def in_chunks(
    x: jax.Array, weights: jax.Array, experts: jax.Array, gate_up: jax.Array, down: jax.Array
) -> Any:
    pieces = [y.reshape(-1, 256, y.shape[-1]) for y in (x, weights, experts)]

    def one(piece: list[jax.Array]) -> jax.Array:
        x, weights, experts = piece
        return routed_experts_decode(x, weights, experts, gate_up, down)

    return jax.lax.map(one, pieces)


def time_us(function: Callable[..., Any], operands: list[Any]) -> float:
    """The median of seven runs."""
    run = jax.jit(function)
    samples = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(run(*operands))
        samples.append((time.perf_counter() - start) * 1e6)
    return round(statistics.median(samples[3:]), 1)


if __name__ == "__main__":
    run_cases(globals(), sys.argv[1], sys.argv[2:])
