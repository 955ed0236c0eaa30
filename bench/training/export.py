"""Writes the trained parts as one pipeline folder in half precision, which the package ships."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from atedm.files import whole_file, whole_folder
from atedm_bench.training.config import Config
from atedm_bench.training.loop import Counter
from atedm_bench.training.models import sampling_scheduler


def export(config: Config, folder: Path, target: Path) -> Counter:
    """Write the pipeline with the newest moving average to ``target``. Returns its training progress.

    Raises:
        FileNotFoundError: ``folder`` holds no checkpoint of the UNet.
    """
    from atedm_bench.training.unet import load_average

    model, counter = load_average(config, folder)
    pipe = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=model.encoders.first,
        text_encoder_2=model.encoders.second,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=model.unet,
        scheduler=sampling_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        torch.nn.Module.to(part, torch.float16)
    with whole_folder(target) as partial:
        pipe.save_pretrained(partial, safe_serialization=True)
        _suit_older_releases(folder, partial)
        _forget_paths(partial)
    return counter


def _suit_older_releases(folder: Path, target: Path) -> None:
    """Add what transformers before 5 needs: the tokenizer's own files, and a prefix in the first encoder's names."""
    for tokenizer in ("tokenizer", "tokenizer_2"):
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(folder / "tokenizer" / name, target / tokenizer / name)
    file = target / "text_encoder" / "model.safetensors"
    tensors = {n if n.startswith("text_model.") else f"text_model.{n}": t for n, t in load_file(file).items()}
    # Not over the file itself: the tensors are still mapped from it.
    with whole_file(file) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})


def _forget_paths(target: Path) -> None:
    """Remove the paths that diffusers writes into each part's configuration."""
    for file in target.rglob("*.json"):
        document = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(document, dict) and document.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
