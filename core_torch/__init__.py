"""Qwen3-Next in PyTorch, tensor parallel, with the fused all-reduce + residual + RMSNorm.

    from core_torch import LLM, SamplingParams

    with LLM("path/to/checkpoint", tensor_parallel_size=2) as llm:
        print(llm.fusion.reason)
        for output in llm.generate(["def main("], SamplingParams(temperature=0, max_tokens=32)):
            print(output.text, output.reductions)

`core_torch.kernels` is usable without the engine: importing it imports nothing else of this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core_torch.llm import LLM as LLM
    from shared_config.sampling import SamplingParams as SamplingParams

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from core_torch.llm import LLM

        return LLM
    if name == "SamplingParams":
        from shared_config.sampling import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
