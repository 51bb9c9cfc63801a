"""Models, tokenizers and text for the command line: by hub id, local folder, or bundled."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BUNDLED = Path(__file__).parent.parent / "reference_model"
REFERENCE = "reference"

# An attention-heavy shape: what long contexts cost where little else is computed.
RANDOM = re.compile(r"random(?::([1-9]\d{0,2}))?")
RANDOM_SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 1024,
    "max_position_embeddings": 1 << 20,
}


def load_model(
    name: str,
    *,
    device: str | None = None,
    dtype: str = "auto",
    random_weights: bool = False,
) -> Any:
    """A causal LM in eval mode.

    Args:
        name: hub id, local folder, "reference" for the bundled model, or "random:LAYERS" for
            `RANDOM_SHAPE` of so many layers (4 without a number).
        device: "cpu", "cuda", ...; None for CUDA where there is a device.
        dtype: "auto" for the checkpoint's own, else a torch dtype's name.
        random_weights: build the architecture from its configuration alone.

    Raises:
        ValueError: no such model, or it cannot be had here; says what to do.
    """
    check_placement(device, dtype)
    transformers, drawn = _transformers(), random_weights or RANDOM.fullmatch(name)
    source: Any = load_config(name) if drawn else _source(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if drawn:
            torch.manual_seed(0)
            chosen = torch.float32 if dtype == "auto" else getattr(torch, dtype)
            model = transformers.AutoModelForCausalLM.from_config(source, dtype=chosen)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        return model.to(device).eval()
    except Exception as error:  # of any library that reads a part of it
        raise ValueError(_cannot_load(name, error)) from error


def check_placement(device: str | None, dtype: str) -> None:
    """Refuses a device that is not here and a dtype that no model has, before anything is loaded.

    Raises:
        ValueError: as said.
    """
    kind = getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise ValueError(f"found dtype {dtype!r}; needed auto, float32, bfloat16 or float16")
    try:
        if device is not None:
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"cannot use device {device!r} ({_first_line(error)}); needed one that is here, such "
            "as cpu"
        ) from error


def load_config(name: str) -> Any:
    """A model's configuration alone: cheap, and says how many positions there are.

    Raises:
        ValueError: no such model.
    """
    transformers = _transformers()
    if drawn := RANDOM.fullmatch(name):
        shape = {**RANDOM_SHAPE, "num_hidden_layers": int(drawn[1] or 4)}
        return transformers.LlamaConfig(**shape)
    source = _source(name)
    try:
        return transformers.AutoConfig.from_pretrained(source)
    except Exception as error:
        raise ValueError(_cannot_load(name, error)) from error


def load_tokenizer(name: str) -> Any:
    """The tokenizer that belongs to a model.

    Raises:
        ValueError: no such model, or it has no tokenizer.
    """
    transformers, source = _transformers(), _source(name)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        known = len(tokenizer("a b", add_special_tokens=False)["input_ids"]) > 0
        reason = "it makes no tokens of text"
    except Exception as error:  # of any library that reads a part of it
        known, reason = False, _first_line(error)
    if not known:
        raise ValueError(
            f"found no tokenizer for {name} ({reason}); needed the model's own beside its weights: "
            "save it with tokenizer.save_pretrained"
        )
    return tokenizer


def longest_context(model: Any) -> int:
    """Positions that a model or its configuration allows; a large number where none are stated."""
    config = getattr(model, "config", model)
    for part in (config, getattr(config, "text_config", None)):
        for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
            if isinstance(value := getattr(part, name, None), int):
                return value
    return 1 << 20


def fitting_context(option: str, given: int | None, usual: int, config: Any, room: int = 0) -> int:
    """The context to take: what was given, else `usual` or what the model allows.

    Args:
        option: what it is called, for the message.
        room: tokens that are needed behind it.

    Raises:
        ValueError: more than the model has positions for.
    """
    longest = longest_context(config) - room
    if given is not None and given > longest:
        behind = f" with {room} tokens behind it" if room else ""
        raise ValueError(
            f"{option} {given}: this model has {longest_context(config)} positions; needs at most "
            f"{longest}{behind}."
        )
    return min(usual, longest) if given is None else given


def check_writable(option: str, path: Path, *, folder: bool = False) -> None:
    """Refuses a path that will not be writable, before the work that ends in writing it.

    Raises:
        ValueError: as said.
    """
    path = path.expanduser()
    if not folder and path.is_dir():
        raise ValueError(f"{option} {path}: is a folder; needs the name of a file.")
    at = path if folder or path.exists() else path.parent
    while not at.exists() and at != at.parent:
        at = at.parent
    wrong = "is not a folder" if at != path and not at.is_dir() else "cannot be written to"
    if folder and at == path and not at.is_dir():
        wrong = "is not a folder"
    if wrong == "is not a folder" or not os.access(at, os.W_OK):
        raise ValueError(f"{option} {path}: {at} {wrong}; needs a place that can be written to.")


def read_text(files: Sequence[str | Path]) -> str:
    """The files' text, one newline between them.

    Raises:
        ValueError: a file that is not there or is not UTF-8 text.
    """
    texts = []
    for file in files:
        try:
            texts.append(Path(file).expanduser().read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"found bytes that are not UTF-8 in {file} (at {error.start}); needed text files"
            ) from None
        except OSError as error:
            raise ValueError(
                f"cannot read {file}: {error.strerror}; needed a text file: correct the path"
            ) from None
    return "\n".join(texts)


def encode(tokenizer: Any, text: str) -> Tensor:
    """Token ids (T,) int64, nothing added before or after."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def batches_of(ids: Tensor, length: int, tokens: int) -> list[Tensor]:
    """The first `tokens` ids in pieces (1, length); the last piece may be shorter."""
    return [piece[None] for piece in ids[:tokens].split(length) if len(piece) > 1]


def _source(name: str) -> str:
    """What transformers loads for a name: a folder, or a hub id whose configuration is at hand."""
    if name == REFERENCE:
        if not (BUNDLED / "config.json").exists():
            raise ValueError(
                "this installation holds no reference model; needed its files in "
                f"{BUNDLED}: train it (benchmarks/reference_model/) or name another model"
            )
        return str(BUNDLED)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ValueError(
                f"found no config.json in {name}; needed a folder that save_pretrained wrote"
            )
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists():
        raise ValueError(
            f"found no folder {name}; needed a local model folder or a hub id (org/name)"
        )
    _ask_hub(name)
    return name


def _ask_hub(name: str) -> None:
    """Makes sure that the hub or its cache has the model: loading would retry for minutes.

    Raises:
        ValueError: it has not, or cannot be reached.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            get_hf_file_metadata(hf_hub_url(name, "config.json"))
    except Exception as error:  # of the hub, or of its HTTP library, whichever that is
        raise ValueError(
            f"cannot get {name} from the hub, and its cache does not hold it "
            f"({type(error).__name__}: {_first_line(error)}); needed an existing hub id and a "
            "connection, or a local folder"
        ) from error


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ValueError(
            "transformers is not installed; needed to load models: pip install 'loki-compile[eval]'"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _cannot_load(name: str, error: Exception) -> str:
    return f"cannot load {name}: {_first_line(error)}; needed a causal LM that transformers knows"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
