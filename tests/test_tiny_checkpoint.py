"""The trained checkpoint that demos and parity tests use: complete, small, and really trained."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

CHECKPOINT = Path(__file__).parent / "data" / "tiny-qwen3-next"
MAX_BYTES = 16_000_000

# Written for this test, so neither training nor selection can have seen it.
SNIPPET = '''\
"""Count the words of a text file."""

import argparse
import collections


class WordCounter:
    """Counts words; the case of letters does not matter."""

    def __init__(self, min_length=1):
        self.min_length = min_length
        self.counts = collections.Counter()

    def add_line(self, line):
        for word in line.lower().split():
            if len(word) >= self.min_length:
                self.counts[word] += 1

    def most_common(self, number):
        return self.counts.most_common(number)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", help="name of the file to read")
    parser.add_argument("--number", type=int, default=10)
    args = parser.parse_args(argv)
    counter = WordCounter()
    with open(args.path, encoding="utf-8") as file:
        for line in file:
            counter.add_line(line)
    for word, count in counter.most_common(args.number):
        print(f"{count:6d} {word}")


if __name__ == "__main__":
    main()
'''


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    """The snippet as [1, T] tokens."""
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    encoded = tokenizer.encode(SNIPPET).ids
    assert tokenizer.decode(encoded) == SNIPPET
    return torch.tensor([encoded])


@pytest.fixture(scope="module")
def output(model: PreTrainedModel, tokens: torch.Tensor) -> MoeCausalLMOutputWithPast:
    with torch.inference_mode():
        return model(tokens, output_router_logits=True)


def test_the_whole_folder_is_small():
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= MAX_BYTES


def test_config_has_both_kinds_of_layer_and_divides_for_tp_4():
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["architectures"] == ["Qwen3NextForCausalLM"]
    assert config["num_hidden_layers"] == len(config["layer_types"]) == 8
    assert set(config["layer_types"]) == {"linear_attention", "full_attention"}
    assert config["mlp_only_layers"] == []
    assert config["decoder_sparse_step"] == 1
    for key in (
        "num_attention_heads",
        "linear_num_key_heads",
        "linear_num_value_heads",
        "num_experts",
        "vocab_size",
    ):
        assert config[key] % 4 == 0, key
    assert config["moe_intermediate_size"] // 4 * 2 >= 16  # bytes of a bfloat16 row of one TP-4 rank
    assert config["eos_token_id"] == 0


def test_tensors_are_bfloat16_with_the_names_of_the_hub():
    with safe_open(CHECKPOINT / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
        assert file.get_slice("model.layers.0.mlp.experts.15.gate_proj.weight").get_shape() == [32, 256]
    for projection in ("gate_proj", "up_proj", "down_proj"):
        assert sum(name.endswith(f".{projection}.weight") and ".experts." in name for name in names) == 8 * 16
    assert not any("gate_up_proj" in name for name in names)


def test_zero_centred_norms_have_moved(model: PreTrainedModel):
    norms = {name: p for name, p in model.named_parameters() if name.endswith("layernorm.weight")}
    assert len(norms) == 16
    for name, weight in norms.items():
        assert weight.abs().mean() > 0.02, name


def test_it_predicts_python_that_it_has_never_seen(output: MoeCausalLMOutputWithPast, tokens: torch.Tensor):
    assert output.logits is not None
    loss = F.cross_entropy(output.logits[0, :-1], tokens[0, 1:]).item()
    accuracy = (output.logits[0, :-1].argmax(dim=-1) == tokens[0, 1:]).float().mean().item()
    assert loss < 0.35 * math.log(output.logits.shape[-1])
    assert accuracy > 0.45


def test_every_layer_uses_nearly_all_experts(output: MoeCausalLMOutputWithPast, model: PreTrainedModel):
    assert output.router_logits is not None
    assert len(output.router_logits) == model.config.num_hidden_layers
    for layer, logits in enumerate(output.router_logits):
        chosen = logits.topk(model.config.num_experts_per_tok).indices.unique()
        assert len(chosen) >= 14, f"layer {layer} uses {len(chosen)} of 16 experts"


def test_saving_and_loading_keep_every_logit(model: PreTrainedModel, tokens: torch.Tensor, tmp_path: Path):
    """Transformers packs the experts' tensors when it loads and splits them when it saves."""
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=0, atol=0)
