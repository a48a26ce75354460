"""A pretrained language model with the interface of the GPT of train.py: `train.py --model`.

transformers loads the model from a folder on this disk, also from a GGUF file in it, and `convert`
replaces its attention. Nothing is downloaded.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flexmoba.integrations.transformers import convert


def load(folder: str, gguf: str | None = None, **options: Any) -> PreTrainedModel:
    """Loads a model from a folder, or ends the program with the reason why it cannot."""
    file: dict[str, Any] = {"gguf_file": gguf} if gguf else {}
    if gguf and hasattr(transformers, "GgufConfig"):
        # Otherwise newer versions may keep weights packed, and neither train nor save the model.
        file["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, attn_implementation="sdpa", **file, **options
        )
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"--model {folder}: transformers cannot load it: {str(error).splitlines()[0]}")
    return model


def tokenizer_of(folder: str, gguf: str | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model."""
    file = {"gguf_file": gguf} if gguf else {}
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, **file
    )
    return tokenizer


class Pretrained(nn.Module):
    """Of the next token, from tokens ``(B, L)``: logits, or losses; full attention at first."""

    def __init__(
        self, o: argparse.Namespace, head: Callable[[nn.Module, nn.Module], nn.Module]
    ) -> None:
        """Loads the model; ``head`` makes the module of logits and losses, as that of the GPT."""
        super().__init__()
        self.context = None  # no processes share a context
        file = {"gguf_file": o.gguf} if o.gguf else {}
        config = AutoConfig.from_pretrained(o.model, local_files_only=True, **file)
        if o.rope_base:  # a larger base for a longer context (arXiv 2309.16039)
            config.rope_parameters["rope_theta"] = o.rope_base
        config.max_position_embeddings = max(o.length, config.max_position_embeddings)
        self.model = load(o.model, o.gguf, dtype=torch.float32, config=config)
        always = {"sink_blocks": o.sink_blocks, "local_blocks": o.local_blocks}
        sub_blocks = {"gate_block_size": o.gate_block_size} if o.gate_block_size else {}
        convert(self.model, o.block_size, None, **always, **sub_blocks)
        # The decoder ends with the norm.
        self.head = head(nn.Identity(), self.model.get_output_embeddings())
        self.layers = config.num_hidden_layers

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        decoder = self.model.get_decoder()
        hidden = decoder(input_ids=tokens, use_cache=False).last_hidden_state
        out: Tensor = self.head(hidden, targets)
        return out

    def compile_parts(self) -> None:
        """Compiles block by block: layers of equal settings are compiled once."""
        torch._dynamo.config.recompile_limit = 32  # by length, attention, and with no gradient
        for part in (*self.model.get_decoder().layers, self.head):
            part.compile(dynamic=False)

    def save(self, o: argparse.Namespace) -> None:
        """Saves the model with its settings, and its tokenizer."""
        self.model.save_pretrained(o.save)
        tokenizer_of(o.model, o.gguf).save_pretrained(o.save)
