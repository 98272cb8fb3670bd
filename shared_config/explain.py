"""`explain`: may this model, on this layout and machine, run the fused all-reduce, and why.

The command gathers values (from options where given, from this machine otherwise), asks `resolve_fusion`
and prints its answer; it decides nothing itself.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from packaging.version import InvalidVersion, Version
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from shared_config.cli import add_layout_options, layout_options
from shared_config.decision import SIDES, FusionDecision, FusionError, resolve_fusion
from shared_config.hardware import FlashInferInfo, HardwareInfo
from shared_config.layout import GROUP_NAMES, ParallelLayout
from shared_config.model import DTYPE_BYTES, Qwen3NextConfig, hf_architecture, hf_dtype, read_hf_config
from shared_config.probe import probe_flashinfer, probe_hardware
from shared_config.rules import (
    BACKENDS,
    MODES,
    NEEDED_OP_PARAMS,
    NEEDED_WORKSPACE_PARAMS,
    FusibleModel,
    FusionRequest,
    ModelFacts,
)

FIRST_UNIFIED_API = Version("0.6.3")
PLAIN_WIDTH = 100  # columns when the output is not a terminal

# Compute capability of the GPUs that --gpu usually names, so that --sm can be left out. Longest match wins.
SM_BY_GPU_NAME = {
    "A100": 80,
    "A800": 80,
    "A10": 86,
    "L4": 89,
    "L40": 89,
    "RTX 4090": 89,
    "H20": 90,
    "H100": 90,
    "H200": 90,
    "H800": 90,
    "GH200": 90,
    "B200": 100,
    "GB200": 100,
    "B300": 103,
    "GB300": 103,
    "RTX 5090": 120,
    "RTX PRO 6000": 120,
}

# Who owes a sum to whom: a row-parallel layer leaves it, the norm that follows pays it.
DEBTS = {
    "attention": ("attn_tp", "o_proj / out_proj", "post_attention_layernorm"),
    "mlp": ("moe_reduce", "MLP / MoE", "next input_layernorm, or the final norm"),
}
NOTHING_OWED = "nobody: one rank has the whole sum"
PAID_AT_ONCE = "all-reduce at once, then each rank's own rows"
# What travels between ranks that owe each other nothing.
EXCHANGES = {
    "attn_cp": "tokens for heads, around each mixer's core",
    "prefill_gather": "rows before the MoE, in prefill",
    "decode_gather": "rows before the MoE, in decode",
    "pieces": "rows whose logits are wanted",
}


@dataclass(frozen=True)
class Explanation:
    """A decision, and whether `--fusion on` would end in it as an error."""

    model: FusibleModel
    hardware: HardwareInfo
    decision: FusionDecision
    refused: str  # the error that mode "on" raises, or ""


class OneLineParser(argparse.ArgumentParser):
    """Bad input is one line on stderr and exit status 2, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="directory with a HF config.json")
    layout = parser.add_argument_group("layout")
    layout.add_argument("--tp", type=int, default=1, metavar="N", help="ranks in all (tensor-parallel world)")
    add_layout_options(layout)
    layout.add_argument("--nnodes", type=int, default=1, metavar="N")
    request = parser.add_argument_group("request")
    request.add_argument("--fusion", choices=MODES, default="auto")
    request.add_argument("--backend", choices=BACKENDS, default="auto")
    request.add_argument("--deterministic", action="store_true")
    request.add_argument("--allow-multicast", action="store_true", help="consent to NVLink multicast")
    request.add_argument("--moe-a2a", default="none", metavar="NAME", help="MoE all-to-all backend")
    machine = parser.add_argument_group("machine (default: this one)")
    machine.add_argument("--gpu", metavar="NAME", help='such as "NVIDIA H100 80GB HBM3"')
    machine.add_argument("--sm", type=int, metavar="N", help="compute capability without the dot, such as 90")
    machine.add_argument("--flashinfer-version", metavar="V", help="assume this version, with what it takes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace, console: Console | None = None) -> int:
    """Answer on stdout; returns 0. Raises `ValueError` or `OSError` for input that has no answer."""
    explanation = explain(args)
    if args.json:
        print(json.dumps(as_json(explanation)))
    else:
        print_report(explanation, console or _console())
    return 0


def explain(args: argparse.Namespace) -> Explanation:
    layout = ParallelLayout(tp_size=args.tp, nnodes=args.nnodes, **layout_options(args))
    model = _read_model(args.model, layout)
    hardware = _hardware(args, layout)
    request = FusionRequest(
        mode=args.fusion,
        deterministic=args.deterministic,
        backend=args.backend,
        allow_multicast=args.allow_multicast,
        moe_a2a_backend=args.moe_a2a,
    )
    try:
        decision = resolve_fusion(model, layout, hardware, _flashinfer(args), request)
    except FusionError as error:
        if error.decision is None:
            raise
        return Explanation(model, hardware, error.decision, str(error))
    return Explanation(model, hardware, decision, "")


def _read_model(directory: str, layout: ParallelLayout) -> FusibleModel:
    """The whole config of a Qwen3-Next model, checked against the layout; the bare facts of any other."""
    raw = read_hf_config(directory)
    if raw.get("model_type") == "qwen3_next":
        config = Qwen3NextConfig.from_hf(raw)
        layout.validate(config)
        return config
    text = raw.get("text_config") or raw  # multimodal configs nest the decoder's
    if not isinstance(text, dict) or text.get("hidden_size") is None:
        raise ValueError("the model config lacks the required key(s) hidden_size")
    dtype = hf_dtype(text if text.get("dtype") or text.get("torch_dtype") else raw)
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype {dtype!r} is not supported: use one of {', '.join(DTYPE_BYTES)}")
    return ModelFacts(hf_architecture(raw), text["hidden_size"], DTYPE_BYTES[dtype])


def _hardware(args: argparse.Namespace, layout: ParallelLayout) -> HardwareInfo:
    gpu, sm = args.gpu, args.sm
    if sm is None:
        if gpu is None:
            return probe_hardware()
        known = [name for name in SM_BY_GPU_NAME if name in gpu.upper()]
        if not known:
            raise ValueError(f"the compute capability of --gpu {gpu!r} is not known: add --sm, such as 90")
        sm = SM_BY_GPU_NAME[max(known, key=len)]
    name = gpu or f"a GPU with SM{sm}"
    return HardwareInfo(device="cuda", gpu_name=name, sm=sm, num_gpus=layout.tp_size // layout.nnodes)


def _flashinfer(args: argparse.Namespace) -> FlashInferInfo:
    if args.flashinfer_version is None:
        return probe_flashinfer()
    return assumed_flashinfer(args.flashinfer_version)


def assumed_flashinfer(version: str) -> FlashInferInfo:
    """What FlashInfer `version` is taken to offer; only a probe of an installed one is evidence."""
    try:
        parsed = Version(version)
    except InvalidVersion as error:
        raise ValueError(f"--flashinfer-version must be like 0.7.2, got {version!r}") from error
    if parsed < FIRST_UNIFIED_API:
        reason = f"its fused all-reduce has one interface only from {FIRST_UNIFIED_API} on (vllm#33985)"
        return FlashInferInfo(installed=True, version=version, reason=reason)
    return FlashInferInfo(
        installed=True,
        version=version,
        has_fused_op=True,
        workspace_params=NEEDED_WORKSPACE_PARAMS,
        op_params=NEEDED_OP_PARAMS,
        reason="",
    )


def debts(explanation: Explanation) -> list[dict[str, Any]]:
    """For each side of a layer: who owes the sum, the groups that it is owed over, and who pays it."""
    decision = explanation.decision
    answers = []
    for side in SIDES:
        group_name, debtor, payer = DEBTS[side]
        groups = decision.layout.all_groups(group_name)
        if len(groups[0]) == 1:
            payer = NOTHING_OWED
        elif side == "mlp" and decision.layout.pieces_per_slice > 1:
            payer = PAID_AT_ONCE
        answer = decision.fuses(1, side=side, itemsize=explanation.model.itemsize)
        answers.append(
            {
                "side": side,
                "owed_by": debtor,
                "groups": groups,
                "paid_by": payer,
                "fuses": answer.fuses,
                "reason": answer.reason,
            }
        )
    return answers


def exchanges(layout: ParallelLayout) -> list[dict[str, Any]]:
    """What travels between ranks with different rows or heads; nothing where the groups have one rank."""
    found = []
    for group_name, what in EXCHANGES.items():
        groups = layout.all_groups(group_name)
        if len(groups[0]) > 1:
            found.append({"group": group_name, "what": what, "groups": groups})
    return found


def as_json(explanation: Explanation) -> dict[str, Any]:
    decision = explanation.decision
    layout = decision.layout
    return {
        **asdict(decision),
        "refused": explanation.refused,
        "architecture": explanation.model.architecture,
        "hardware": asdict(explanation.hardware),
        "max_tokens": decision.max_tokens(explanation.model.itemsize),
        "groups": {name: layout.all_groups(name) for name in GROUP_NAMES},
        "debts": debts(explanation),
        "exchanges": exchanges(layout),
    }


def print_report(explanation: Explanation, console: Console) -> None:
    model, hardware, decision = explanation.model, explanation.hardware, explanation.decision
    layout = decision.layout
    machine = f"{hardware.gpu_name} (SM{hardware.sm})" if hardware.device == "cuda" else "no CUDA GPU"
    console.print(f"{model.architecture}, hidden {model.hidden_size}, on {machine}", markup=False)

    rules = _table(console, "rule", "holds", Column("value", max_width=22, overflow="fold"), "why (source)")
    for rule in decision.rules:
        holds = "[green]yes[/]" if rule.passed else "[red]NO[/]"
        value = "unknown" if rule.value is None else str(rule.value)
        why = f"{escape(rule.why)} [dim]({escape(rule.source)})[/]"
        rules.add_row(rule.name, holds, escape(value), why)
    console.print()
    console.print(rules)
    console.print()

    owed = _table(
        console, "side", "owed by", "over ranks", Column("paid by", overflow="fold"), "a batch of 1 token"
    )
    for debt in debts(explanation):
        groups = _ranks(debt["groups"])
        fuses = "fused" if debt["fuses"] else f"unfused: {debt['reason']}" if decision.enabled else "unfused"
        owed.add_row(debt["side"], debt["owed_by"], escape(groups), debt["paid_by"], escape(fuses))
    console.print(
        f"{layout.tp_size} ranks: attention {layout.attn_tp_size} TP x {layout.attn_cp_size} CP x "
        f"{layout.attn_dp_size} DP, MoE {layout.moe_tp_size} TP x {layout.ep_size} EP x "
        f"{layout.moe_dp_size} DP",
        markup=False,
    )
    console.print()
    console.print(owed)
    console.print()
    if travels := exchanges(layout):
        moved = _table(console, "exchange", "between ranks", Column("of", overflow="fold"))
        for exchange in travels:
            moved.add_row(exchange["group"], escape(_ranks(exchange["groups"])), exchange["what"])
        console.print(moved)
        console.print()

    pair, most = decision.pair, decision.max_tokens(model.itemsize)
    limit = f"limit: up to {most} tokens ({decision.max_fused_bytes} bytes) a call"
    if pair.max_bytes:
        above = f"{decision.max_backend_tokens(model.itemsize)} tokens ({pair.above} bytes)"
        console.print(
            f"{limit}, above {above} in the project's own pair_allreduce: {pair.source}", markup=False
        )
    else:
        console.print(f"{limit}: {decision.max_bytes_source}", markup=False)
        console.print(f"pair_allreduce, for longer calls: not used: {pair.source}", markup=False)
    for warning in decision.warnings:
        console.print(f"warning: {warning}", markup=False, style="yellow")
    verdict = "FUSED" if decision.enabled else "UNFUSED"
    console.print(f"{verdict}: {decision.reason}", markup=False, style="bold")
    if explanation.refused:
        console.print(f"refused: a run would stop with: {explanation.refused}", markup=False, style="red")


def _ranks(groups: tuple[tuple[int, ...], ...]) -> str:
    return " ".join(str(list(group)) for group in groups)


def _table(console: Console, *columns: Column | str) -> Table:
    """Spaced columns; a rule under the header where the terminal can draw one."""
    box = SIMPLE_HEAD if console.is_terminal else None
    return Table(*columns, box=box, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)
