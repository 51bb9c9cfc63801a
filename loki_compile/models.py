"""Models, tokenizers and text for the command line: by hub id, local folder, or bundled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BUNDLED = Path(__file__).parent / "reference_model"
REFERENCE = "reference"


def load_model(
    name: str,
    *,
    device: str | None = None,
    dtype: str = "auto",
    random_weights: bool = False,
) -> Any:
    """A causal LM in eval mode.

    Args:
        name: hub id, local folder, or "reference" for the bundled model.
        device: "cpu", "cuda", ...; None for CUDA where there is a device.
        dtype: "auto" for the checkpoint's own, else a torch dtype's name.
        random_weights: build the architecture from its configuration alone.

    Raises:
        ValueError: no such model, or it cannot be had here; says what to do.
    """
    transformers, source = _transformers(), _source(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"found dtype {dtype!r}; needed auto, float32, bfloat16 or float16")
    try:
        if random_weights:
            config = transformers.AutoConfig.from_pretrained(source)
            torch.manual_seed(0)
            chosen = torch.float32 if dtype == "auto" else getattr(torch, dtype)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=chosen)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        return model.to(device).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(_cannot_load(name, error)) from error


def load_tokenizer(name: str) -> Any:
    """The tokenizer that belongs to a model.

    Raises:
        ValueError: no such model, or it has no tokenizer.
    """
    transformers, source = _transformers(), _source(name)
    try:
        return transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(_cannot_load(name, error)) from error


def longest_context(model: Any) -> int:
    """Positions that the model's configuration allows, or a large number where it says none."""
    config = getattr(model, "config", None)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return 1 << 20


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
