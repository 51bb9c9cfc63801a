"""Makes random models under the names that peers' tests load from the hub, where there is no hub.

    python tests/peers/stand_ins.py FOLDER      # then run.py with HF_HUB_CACHE=FOLDER

A stand-in is a tiny random llama with a byte-level tokenizer. Tests of what a model answers, or of
how many tokens a text has, fail with it, with and without us.
"""

from __future__ import annotations

import sys
from pathlib import Path

NAMES = ("MaxJeblick/llama2-0b-unit-test", "maxjeblick/llama2-0b-unit-test")


def make(folder: Path, name: str) -> None:
    """Writes model and tokenizer where the hub's client looks for a repository it has fetched."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    repository = folder / ("models--" + name.replace("/", "--"))
    snapshot = repository / "snapshots" / "stand-in"
    snapshot.mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text("stand-in")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<unk>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(snapshot)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=1024, max_position_embeddings=2048, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(snapshot)


if __name__ == "__main__":
    for wanted in NAMES:
        make(Path(sys.argv[1]), wanted)
