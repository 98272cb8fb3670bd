"""Trains `tests/data/tiny-qwen3-next`: a Qwen3-Next of 6.8 million parameters that writes Python.

    python tests/train_tiny_checkpoint.py --out build/tiny  # one GPU, five minutes
    python tests/train_tiny_checkpoint.py --out build/smoke --steps 5 --batch 2 --held-out-windows 8  # CPU

The text is the Python standard library of the interpreter that runs this. A file is held out when the hash of
its path says so: the same files on every machine and in every version. Tokenizer and model see the others.

The model is transformers' own `Qwen3NextForCausalLM`, saved by transformers: what the other tests compare
themselves with is not made by the code under test. Transformers is used as it comes, so its plain PyTorch
gated delta rule runs unless flash-linear-attention is installed.

Shapes: B windows in a batch, T tokens in a window, S = B * T, L layers, N experts, V vocabulary.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, Qwen3NextConfig

END_OF_FILE = "<|endoftext|>"
VOCAB_SIZE = 2048
HELD_OUT_EVERY = 32  # one file in 32
MIN_TEXT_BYTES = 2_000_000
# Tables, generated or repeated text, and what pip installed: they teach nothing about Python.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "encodings", "pydoc_data", "lib2to3", "__pycache__"}
SKIPPED_PREFIXES = ("config-", "_sysconfigdata")  # this machine's build settings


def model_config() -> Qwen3NextConfig:
    """The smallest shape that still has everything: both kinds of layer, more value than key heads in the
    linear ones, grouped KV heads in the full ones, and experts whose slices stay 16 bytes wide at TP 4."""
    return Qwen3NextConfig(
        architectures=["Qwen3NextForCausalLM"],
        dtype="bfloat16",
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=256,  # of dense MLP layers, of which there are none
        num_hidden_layers=8,
        layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        max_position_embeddings=2048,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        eos_token_id=0,
    )


class Source(NamedTuple):
    path: str  # relative to the folder of the text
    text: str

    @property
    def held_out(self) -> bool:
        return int.from_bytes(hashlib.sha256(self.path.encode()).digest()[:4]) % HELD_OUT_EVERY == 0


def read_sources(folder: Path) -> list[Source]:
    """Every different Python file under `folder`, in the order of the paths.

    Raises ValueError when that is too little text to train on: some systems ship Python without sources.
    """
    sources: dict[str, Source] = {}
    for file in sorted(folder.rglob("*.py")):
        path = file.relative_to(folder)
        if SKIPPED_FOLDERS.intersection(path.parts) or any(
            p.startswith(SKIPPED_PREFIXES) for p in path.parts
        ):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few tests are written in other encodings on purpose
        if text.strip():
            sources.setdefault(text, Source(path.as_posix(), text))
    num_bytes = sum(len(source.text.encode()) for source in sources.values())
    if num_bytes < MIN_TEXT_BYTES:
        raise ValueError(
            f"{folder} holds {num_bytes} bytes of Python sources, expected at least {MIN_TEXT_BYTES}; "
            "name a folder with the standard library's .py files by --text"
        )
    return list(sources.values())


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE: any text can be encoded, and token 0 ends a file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_FILE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@dataclass(frozen=True)
class Corpus:
    """One split: its files one after another, each followed by the end-of-file token."""

    tokens: torch.Tensor  # [num_tokens] int64
    num_files: int
    num_bytes: int  # UTF-8, without the end-of-file tokens

    @property
    def size(self) -> dict[str, int]:
        return {"files": self.num_files, "bytes": self.num_bytes, "tokens": self.tokens.numel()}

    @classmethod
    def encode(cls, tokenizer: Tokenizer, texts: list[str], device: torch.device) -> Corpus:
        end = tokenizer.token_to_id(END_OF_FILE)
        ids: list[int] = []
        for encoding in tokenizer.encode_batch(texts):
            ids += [*encoding.ids, end]
        num_bytes = sum(len(text.encode()) for text in texts)
        return cls(torch.tensor(ids, device=device), len(texts), num_bytes)

    def sample(self, num_windows: int, length: int, generator: torch.Generator) -> torch.Tensor:
        """Windows [B, T + 1] that start anywhere, so that no prompt begins at an unusual place."""
        last = self.tokens.numel() - length - 1
        start = torch.randint(0, last, (num_windows, 1), generator=generator).to(self.tokens.device)
        return self.tokens[start + torch.arange(length + 1, device=self.tokens.device)]

    def windows(self, length: int) -> torch.Tensor:
        """All of the text as windows [B, T + 1]: each predicts T tokens, and its last begins the next."""
        return self.tokens.unfold(0, length + 1, length)


def set_decays(model: PreTrainedModel) -> None:
    """Start the linear layers' memories between a few and a thousand tokens long.

    The step sizes softplus(dt_bias) are spread evenly in log space from 0.001 to 0.1, as Mamba does
    (https://arxiv.org/abs/2312.00752, section 3.6). With transformers' dt_bias of 1, meant to be loaded over,
    most heads would forget everything within two tokens.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("dt_bias"):
            step = torch.empty(parameter.shape).uniform_(math.log(1e-3), math.log(1e-1)).exp()
            parameter.data.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus


class MasterAdamW:
    """AdamW on float32 copies of a bfloat16 model's parameters.

    The model computes in the dtype that it is saved in, so training sees the loss of the checkpoint itself;
    the float32 copies keep the updates that bfloat16 would round away. Only matrices decay.
    """

    def __init__(self, model: PreTrainedModel, weight_decay: float):
        self.parameters = list(model.parameters())
        self.masters = [p.detach().float().clone() for p in self.parameters]
        matrices = [m for m in self.masters if m.ndim > 1]
        vectors = [m for m in self.masters if m.ndim == 1]
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=self.masters[0].is_cuda)

    def step(self, learning_rate: float) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, max_norm=1.0)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.data.copy_(master)


def imbalance(router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """How unevenly one layer's experts are used, from [S, N] logits: 1 when evenly, N / top_k at worst.

    Switch Transformer's load-balancing loss (https://arxiv.org/abs/2101.03961, equation 4) for top-k routing.
    One layer at a time: over all layers together, different favourites in each would look even.
    """
    probabilities = router_logits.float().softmax(dim=-1)
    chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(top_k).indices, 1.0)
    num_experts = router_logits.shape[-1]
    return num_experts / top_k * (chosen.mean(dim=0) * probabilities.mean(dim=0)).sum()


def training_loss(model: PreTrainedModel, windows: torch.Tensor, balance: float) -> torch.Tensor:
    output = model(windows[:, :-1], use_cache=False, output_router_logits=True)
    loss = F.cross_entropy(output.logits.float().flatten(0, 1), windows[:, 1:].flatten())
    uneven = [imbalance(logits, model.config.num_experts_per_tok) for logits in output.router_logits]
    return loss + balance * torch.stack(uneven).mean()


class HeldOut(NamedTuple):
    loss: float  # nats per token
    accuracy: float  # share of tokens that are the most probable one
    expert_share: torch.Tensor  # [L, N], each row sums to 1


@torch.inference_mode()
def evaluate(model: PreTrainedModel, held_out_windows: torch.Tensor, batch: int) -> HeldOut:
    """Over all windows [num_windows, T + 1], `batch` at a time; each starts without any context."""
    config = model.config
    loss, hits, num_tokens = 0.0, 0, 0
    counts = torch.zeros(config.num_hidden_layers, config.num_experts)
    for windows in held_out_windows.split(batch):
        output = model(windows[:, :-1], use_cache=False, output_router_logits=True)
        logits, targets = output.logits.float().flatten(0, 1), windows[:, 1:].flatten()
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        hits += int((logits.argmax(dim=-1) == targets).sum())
        num_tokens += targets.numel()
        for layer, router_logits in enumerate(output.router_logits):
            experts = router_logits.topk(config.num_experts_per_tok).indices.flatten()
            counts[layer] += torch.bincount(experts, minlength=config.num_experts).cpu()
    return HeldOut(loss / num_tokens, hits / num_tokens, counts / counts.sum(dim=1, keepdim=True))


def save_checkpoint(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the model as on the hub: bfloat16, a tensor per expert (transformers splits its packed ones)."""
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_FILE,
        "model_max_length": model.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")


def learning_rate(peak: float, step: int, warmup_steps: int, progress: float) -> float:
    """Linear warm-up by steps, then a cosine to zero over `progress`, the part of the budget that is used."""
    return peak * min(1.0, (step + 1) / warmup_steps) * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    train_text: Corpus,
    held_out: Corpus,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Train until the steps or the minutes are used up; `args.out` holds the best checkpoint at any time.

    Returns what is worth keeping about the run, with the held-out loss at every evaluation under "history".
    """
    optimizer = MasterAdamW(model, args.weight_decay)
    generator = torch.Generator().manual_seed(args.seed)
    history: list[dict[str, float]] = []
    tokens_per_step = args.batch * args.length
    step, progress, started = 0, 0.0, time.monotonic()
    while progress < 1:
        windows = train_text.sample(args.batch, args.length, generator)
        loss = training_loss(model, windows, args.balance)
        loss.backward()
        optimizer.step(learning_rate(args.learning_rate, step, args.warmup_steps, progress))
        step += 1
        if step == 1 or step % 50 == 0:
            speed = step * tokens_per_step / (time.monotonic() - started)
            print(f"step {step} ({progress:.0%}): loss {loss.item():.3f}, {speed:,.0f} tokens/s", flush=True)
        progress = min(1.0, max(step / args.steps, (time.monotonic() - started) / (60 * args.minutes)))
        if progress * args.evaluations >= len(history) + 1:
            model.eval()
            now = evaluate(model, held_out.windows(args.length)[: args.held_out_windows], args.batch)
            model.train()
            print(f"step {step}: held-out loss {now.loss:.4f}, accuracy {now.accuracy:.2%}", flush=True)
            if all(now.loss < earlier["loss"] for earlier in history):
                save_checkpoint(model, tokenizer, args.out)
            history.append({"step": step, "loss": round(now.loss, 4), "accuracy": round(now.accuracy, 4)})
    elapsed_s = time.monotonic() - started
    tokens_seen = step * tokens_per_step
    return {
        "steps": step,
        "tokens_seen": tokens_seen,
        "epochs": round(tokens_seen / train_text.tokens.numel(), 2),
        "elapsed_s": round(elapsed_s, 1),
        "tokens_per_s": round(tokens_seen / elapsed_s),
        "history": history,
    }


def measure(model: PreTrainedModel, held_out: Corpus, args: argparse.Namespace) -> dict[str, Any]:
    """How good a checkpoint is on the held-out text, and how evenly its routers use the experts there."""
    num_experts, longest = model.config.num_experts, model.config.max_position_embeddings
    result = evaluate(model, held_out.windows(args.length)[: args.held_out_windows], args.batch)
    at_longest = evaluate(model, held_out.windows(longest)[: args.held_out_windows], max(1, args.batch // 2))
    nats_per_byte = result.loss * held_out.tokens.numel() / held_out.num_bytes
    entropy = torch.special.entr(result.expert_share).sum(dim=1) / math.log(num_experts)
    return {
        "loss_nats_per_token": round(result.loss, 4),
        "loss_uniform_nats_per_token": round(math.log(VOCAB_SIZE), 4),
        "loss_at_max_position_embeddings": round(at_longest.loss, 4),
        "perplexity_per_token": round(math.exp(result.loss), 3),
        "perplexity_per_byte": round(math.exp(nats_per_byte), 4),
        "bits_per_byte": round(nats_per_byte / math.log(2), 4),
        "accuracy": round(result.accuracy, 4),
        "expert_share_uniform": 1 / num_experts,
        "expert_share_smallest": round(result.expert_share.min().item(), 4),
        "expert_share_largest": round(result.expert_share.max().item(), 4),
        "expert_entropy_by_layer": [round(layer, 4) for layer in entropy.tolist()],  # 1 when used evenly
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the tiny Qwen3-Next checkpoint of the tests.")
    option = parser.add_argument
    option("--out", type=Path, required=True, help="folder of the checkpoint")
    option("--text", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="folder of .py files")
    option("--minutes", type=float, default=5.0, help="of training; ends it, unless --steps is over first")
    option(
        "--steps", type=int, default=1_000_000, help="of the optimizer; ends it, unless --minutes does first"
    )
    option("--batch", type=int, default=32, help="windows in a step")
    option("--length", type=int, default=1024, help="tokens in a window")
    option("--learning-rate", type=float, default=3e-3, help="at the end of the warm-up")
    option("--warmup-steps", type=int, default=100)
    option("--weight-decay", type=float, default=0.1)
    option("--balance", type=float, default=0.05, help="weight of the routers' imbalance in the loss")
    option("--evaluations", type=int, default=10, help="looks at the held-out text, spread over the training")
    option("--held-out-windows", type=int, default=1_000_000, help="evaluate on this many at most")
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    option("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    transformers.utils.logging.disable_progress_bar()
    device = torch.device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)

    sources = read_sources(args.text)
    tokenizer = train_tokenizer([source.text for source in sources if not source.held_out])
    train_text = Corpus.encode(tokenizer, [source.text for source in sources if not source.held_out], device)
    held_out = Corpus.encode(tokenizer, [source.text for source in sources if source.held_out], device)
    print(f"train {train_text.size}, held out {held_out.size}", flush=True)

    model: PreTrainedModel = AutoModelForCausalLM.from_config(model_config(), dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.token_to_id(END_OF_FILE)
    )
    set_decays(model)
    model.to(device)  # pyright: ignore[reportArgumentType]: transformers wraps it untyped
    run = train(model, tokenizer, train_text, held_out, args)

    reloaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(args.out)
    reloaded.to(device)  # pyright: ignore[reportArgumentType]: as above
    result = measure(reloaded.eval(), held_out, args)
    metrics = {
        "parameters": reloaded.num_parameters(),
        "train_text": train_text.size,
        "held_out_text": held_out.size,
        "held_out": result,
        "training": run,
        "arguments": {name: value for name, value in vars(args).items() if name not in ("out", "text")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {package.__name__: package.__version__ for package in (torch, transformers, tokenizers)},
    }
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(result))
    best = min(evaluation["loss"] for evaluation in run["history"])
    if abs(result["loss_nats_per_token"] - best) > 1e-3:
        raise RuntimeError(f"the checkpoint was saved at a held-out loss of {best:.4f} but reads back worse")


if __name__ == "__main__":
    main()
