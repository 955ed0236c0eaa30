"""One short text for what a pipeline's pictures depend on: its weights, configurations and vocabularies, by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

# Entries of a configuration that say where it came from, not what it does.
_ORIGINS = {"transformers_version", "name_or_path", "dtype", "torch_dtype"}


def fingerprint(pipe: Any) -> str:
    """A SHA-256 in 64 hexadecimal digits, equal for equal content, whatever the names and places of its files.

    Weights count as loaded, in their dtype. SDXL takes seconds, because all its weights are read.
    """
    parts = sorted((name, part) for name, part in pipe.components.items() if part is not None)
    parts.append(("pipeline", pipe))
    if getattr(pipe, "watermark", None) is not None:  # diffusers adds one if invisible-watermark is installed
        parts.append(("watermark", pipe.watermark))
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        digests = pool.map(lambda item: _digest(*item), _contents(parts))
        return hashlib.sha256(b"".join(digests)).hexdigest()


def _contents(parts: list[tuple[str, Any]]) -> Iterator[tuple[str, Tensor | str]]:
    for name, part in parts:
        yield name, type(part).__name__
        if isinstance(part, nn.Module):
            yield from ((f"{name}.{key}", value) for key, value in sorted(part.state_dict().items()))
        if hasattr(part, "get_vocab"):
            yield f"{name} rules", _rules(part)
        config = getattr(part, "config", None)
        if config is not None:
            yield f"{name} configuration", json.dumps(_settings(config), sort_keys=True, default=str)


def _rules(tokenizer: Any) -> str:
    """Everything that decides how a tokenizer turns text into numbers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python
        text = json.dumps([tokenizer.get_vocab(), repr(getattr(tokenizer, "bpe_ranks", None))], sort_keys=True)
    else:
        rules = json.loads(backend.to_str())
        rules["truncation"] = rules["padding"] = None  # these depend on the tokenizer's last call
        text = json.dumps(rules, sort_keys=True)
    ways = tokenizer.special_tokens_map, tokenizer.model_max_length, tokenizer.padding_side, tokenizer.truncation_side
    return f"{text}\n{ways}"


def _settings(config: Any) -> dict[str, Any]:
    values: Mapping[str, Any] = config.to_dict() if hasattr(config, "to_dict") else config
    return {key: value for key, value in values.items() if not key.startswith("_") and key not in _ORIGINS}


def _digest(name: str, content: Tensor | str) -> bytes:
    if isinstance(content, Tensor):
        found = hashlib.sha256(f"{name} {content.dtype} {list(content.shape)}\n".encode())
        found.update(content.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    else:
        found = hashlib.sha256(f"{name}\n{content}".encode())
    return found.digest()
