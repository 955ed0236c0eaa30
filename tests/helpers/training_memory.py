"""Counts what a training step of SDXL keeps from its forward for its backward, with tensors that have no memory.

``python -m tests.helpers.training_memory`` prints the table of docs/training.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import atedm
from atedm.app.models import SDXL_UNET, meta_unet

RATIO = 0.63


def saved_bytes(unet: nn.Module, call: Callable[[], torch.Tensor]) -> int:
    """Return the bytes of all storages that ``call`` saves for its backward, each once, without ``unet``'s weights."""
    weights = {x.untyped_storage()._cdata for x in (*unet.parameters(), *unet.buffers())}
    found: dict[int, torch.UntypedStorage] = {}  # keeps the storages alive, so that no address is used twice

    def keep(x: torch.Tensor) -> torch.Tensor:
        found[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = call()
    assert out.requires_grad
    return sum(storage.nbytes() for address, storage in found.items() if address not in weights)


def add_lora(unet: UNet2DConditionModel) -> None:
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))


def add_checkpoints(unet: UNet2DConditionModel) -> None:
    add_lora(unet)
    # The reentrant kind saves its inputs where the hooks see them.
    unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=True))


# What is trained, by the names in docs/training.md.
STEPS: dict[str, Callable[[UNet2DConditionModel], object]] = {
    "LoRA": add_lora,
    "LoRA, with checkpoints": add_checkpoints,
    "all weights": lambda unet: unet.requires_grad_(True),
}


def _on_a_cpu(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Give ``unet`` fake weights that claim to be on a CPU: attention is fused there, but not on the meta device."""
    for module in unet.modules():
        for name, old in module._parameters.items():
            if old is not None:
                new = torch.empty(old.shape, dtype=torch.bfloat16)
                module._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
    return unet


def sdxl_step(prepare: Callable[[UNet2DConditionModel], object]) -> tuple[int, int]:
    """Return the bytes that a step keeps at 1024², batch 1, bfloat16: whole, and pruned as published, in every step."""
    unet = meta_unet(SDXL_UNET, torch.bfloat16)
    prepare(unet)
    with FakeTensorMode():
        unet = _on_a_cpu(unet)

        def draw(*shape: int) -> torch.Tensor:
            return torch.empty(*shape, dtype=torch.bfloat16)

        known = {"text_embeds": draw(1, 1280), "time_ids": draw(1, 6)}
        sample = draw(1, 4, 128, 128).requires_grad_()

        def call() -> torch.Tensor:
            return unet(sample, 500, draw(1, 77, 2048), added_cond_kwargs=known).sample

        whole = saved_bytes(unet, call)
        with atedm.applied(unet, "paper", ratio=RATIO, schedule=None):
            return whole, saved_bytes(unet, call)


if __name__ == "__main__":
    for name, each in STEPS.items():
        in_whole, pruned = sdxl_step(each)
        print(f"| {name} | {in_whole / 1e9:.2f} GB | {pruned / 1e9:.2f} GB |")
