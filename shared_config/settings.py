"""How an engine is set up: the same settings, with the same checks, in both frameworks."""

from __future__ import annotations

from dataclasses import dataclass

LOAD_FORMATS = ("safetensors", "dummy")
KERNELS = ("auto", "plain")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EngineSettings:
    """model: a checkpoint folder. dtype "auto" is the checkpoint's. max_num_seqs sequences run at a time, each at most
    max_model_len tokens; prompts are prefilled in chunks of at most max_step_tokens. num_pages KV pages of page_size
    tokens; 0 takes what memory_fraction of the GPU leaves, or enough for all sequences on CPU. load_format "dummy"
    fills random weights of the config's shapes. kernels "auto" runs compiled kernels where they take the model's
    shapes, "plain" none of them (the fused reduction is no part of this).
    """

    model: str
    dtype: str = "auto"
    max_num_seqs: int = 16
    max_model_len: int = 2048
    max_step_tokens: int = 8192  # 80B, TP2, H200: 93 ms; eight passes of 1,024 take 302
    page_size: int = 16
    num_pages: int = 0
    memory_fraction: float = 0.9
    load_format: str = "safetensors"
    seed: int = 0
    deterministic: bool = False
    cuda_graphs: bool = True
    kernels: str = "auto"

    def __post_init__(self) -> None:
        checks: dict[str, tuple[bool, str]] = {
            "dtype": (self.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
            "load_format": (self.load_format in LOAD_FORMATS, f"one of {', '.join(LOAD_FORMATS)}"),
            "kernels": (self.kernels in KERNELS, f"one of {', '.join(KERNELS)}"),
            "memory_fraction": (0 < self.memory_fraction <= 1, "in (0, 1]"),
            "num_pages": (self.num_pages >= 0, "0 (choose) or a number of pages"),
        }
        for name in ("max_num_seqs", "max_model_len", "max_step_tokens", "page_size"):
            checks[name] = (getattr(self, name) >= 1, "at least 1")
        for name, (ok, expected) in checks.items():
            if not ok:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")
