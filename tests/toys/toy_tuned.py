"""A folder that `loki tune` can tune, text for it, and the command."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from click.testing import CliRunner, Result

from loki_compile.commands.main import main
from loki_compile.commands.models import BUNDLED


def save_model(folder: Path, layers: int, positions: int = 700) -> str:
    """A random model of 6 query and 2 KV heads of 20 dims, with the bundled tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=layers, num_attention_heads=6,
        num_key_value_heads=2, head_dim=20, vocab_size=2048, max_position_embeddings=positions,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, folder / name)
    return str(folder)


def prepare(tmp_path: Path, monkeypatch, lines: int) -> Path:
    """A store of its own, no network, nothing compiled yet; a text of so many passages."""
    monkeypatch.setenv("LOKI_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch._dynamo.reset()
    text = tmp_path / "words.txt"
    text.write_text("".join(f"# {n}\nheron = [otter, copper][{n % 7}]\n" for n in range(lines)))
    return text


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(each) for each in arguments])
