# SPDX-License-Identifier: Apache-2.0
"""A tiny BERT with its tokenizer on disk, and a LoRA for it, for the demo's quick tests."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel, BertTokenizer

SENTENCES = ["a b c", "b", "c d e f a b", "f e", "d d a", "e f a c b d a"]
_VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"]


def make_encoder_directory(directory: Path, seed: int) -> Path:
    """Write a randomly initialised two-layer BERT and a word-level tokenizer."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(_VOCABULARY),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(directory)
    vocabulary = {token: at for at, token in enumerate(_VOCABULARY)}
    BertTokenizer(vocab=vocabulary).save_pretrained(directory)
    return directory


def make_adapter_directory(directory: Path, base: Path, seed: int) -> Path:
    """Write a LoRA on every linear layer whose B is not zero, so that it changes the output."""
    torch.manual_seed(seed)
    model = get_peft_model(
        BertModel.from_pretrained(base),
        LoraConfig(r=2, lora_alpha=6, target_modules=["query", "value", "output.dense"]),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory, save_embedding_layers=False)
    return directory
