"""The model that the package ships: its files, how it is loaded, the words it knows."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open

from atedm import embedded
from atedm.unet.blocks import attention_blocks
from atedm_bench.scenes import caption
from atedm_bench.scenes.split import scenes

MAX_BYTES = 25e6
PARTS = ("text_encoder", "text_encoder_2", "unet", "vae")


def names(part):
    """Name and type of every tensor in the files of ``part``."""
    found = {}
    for path in (embedded.WEIGHTS / part).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return found


@pytest.fixture(scope="module")
def pipe():
    return embedded.embedded_pipeline()


def test_weights_are_small():
    assert 0 < sum(path.stat().st_size for path in embedded.WEIGHTS.rglob("*")) <= MAX_BYTES


def test_weights_are_safetensors_in_half_precision():
    assert {path.suffix for path in embedded.WEIGHTS.rglob("*") if path.is_file()} == {".json", ".safetensors", ".txt"}
    for part in PARTS:
        assert set(names(part).values()) == {"F16"}, part


def test_every_supported_transformers_can_read_the_files():
    """Releases before 5 want these files of a tokenizer, and this prefix in the names of an encoder's tensors."""
    for tokenizer in ("tokenizer", "tokenizer_2"):
        assert {"vocab.json", "merges.txt"} <= {path.name for path in (embedded.WEIGHTS / tokenizer).iterdir()}
    for part in ("text_encoder", "text_encoder_2"):
        assert {name.partition(".")[0] for name in names(part)} <= {"text_model", "text_projection"}


def test_unet_has_the_structure_of_sdxl(pipe):
    config = pipe.unet.config
    assert config.use_linear_projection
    assert config.addition_embed_type == "text_time"
    depths = {2: set(), 3: set()}
    for block in attention_blocks(pipe.unet):
        depths[block.level].add(len(block.module.transformer_blocks))
    assert depths[2] == {2}
    assert min(depths[3]) >= 4


def test_pipeline_is_for_inference_in_float32(pipe):
    for name in PARTS:
        part = getattr(pipe, name)
        assert not part.training
        assert {(p.dtype, p.device.type, p.requires_grad) for p in part.parameters()} == {(torch.float32, "cpu", False)}


def test_loading_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    embedded.embedded_pipeline()
    assert torch.equal(torch.rand(3), expected)


def test_loading_is_silent_and_needs_no_network():
    code = (
        "import socket\n"
        "def refuse(*args): raise SystemExit('asked for the network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from atedm.embedded import embedded_pipeline; embedded_pipeline()\n"
    )
    online = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=online)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_missing_transformers_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'atedm-kernels\[generate\]'"):
        embedded.embedded_pipeline()


def test_missing_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "WEIGHTS", tmp_path / "weights")
    with pytest.raises(FileNotFoundError, match="model_index"):
        embedded.embedded_pipeline()


def test_any_prompt_is_tokenized_without_unknowns(pipe):
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        for prompt in ("a red circle", "Ünïcode 日本語 🎉", "4k!? (x:1.2)\n\ttab"):
            ids = tokenizer(prompt).input_ids
            assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
            # The end token doubles as the unknown one, as in CLIP.
            assert tokenizer.eos_token_id not in ids[1:-1]
            assert tokenizer.decode(ids[1:-1]).replace(" ", "") == "".join(prompt.lower().split())
        assert len(tokenizer("a red circle").input_ids) == 5


def test_the_listed_words_are_those_of_the_captions():
    rng = np.random.default_rng(0)
    captions = [caption(scene, rng) for scene in itertools.islice(scenes(rng, test=False), 1000)]
    assert embedded.unknown_words(" ".join(captions)) == []
    assert set(" ".join(captions).replace(",", "").split()) == embedded._known_words()


def test_unknown_words_are_named_once_each():
    assert embedded.unknown_words("A fox, a grey Circle and a FOX!") == ["fox", "grey"]
