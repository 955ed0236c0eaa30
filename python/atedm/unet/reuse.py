"""Reuse the deep features of an earlier step: a ``reused`` step computes only the first convolution and the last layer.

As for attention blocks, no code of diffusers' forwards is copied: each stage of the UNet gets a ``forward`` that runs
either the stage's own or a stand-in. In a ``reused`` step all stages but the last return tensors that have the right
shape but no meaning; only adapters and ControlNets use them, to add to them. The last stage then starts at its last
layer, with the input that this layer had in the last computed step (DeepCache, section 3.2, at its shallowest branch).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D, CrossAttnUpBlock2D, DownBlock2D, UpBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from atedm.unet.blocks import Place, attention_blocks, unwrapped
from atedm.unet.calls import UNetCalls
from atedm.unet.gradients import refuse_gradients
from atedm.unet.memory import Slot
from atedm.unet.other_tools import runs_its_own_forward, why_not_skippable, why_stage_replaced

_DOWN, _UP = (DownBlock2D, CrossAttnDownBlock2D), (UpBlock2D, CrossAttnUpBlock2D)


def why_not_reusable(unet: UNet2DConditionModel) -> str | None:
    """Why no step of ``unet`` can reuse features; None if steps can."""
    for kinds, stages in ((_DOWN, unet.down_blocks), (_UP, unet.up_blocks)):
        for stage in map(unwrapped, stages):
            if type(stage) not in kinds:
                return f"it has a {type(stage).__name__}; expected stages of {' or '.join(k.__name__ for k in kinds)}"
    if len(unet.up_blocks) < 2:
        return "it has one up stage; expected at least two"
    if unet.up_blocks[-1].upsamplers is not None:
        return "its last up stage has an upsampler; expected none"
    for name, stage in stages_of(unet):
        if not isinstance(stage.__dict__.get("forward"), UNetStage) and not runs_its_own_forward(stage):
            return f"the forward of {name} has been replaced by another tool"
        part = why_stage_replaced(stage)
        if part is not None:
            return f"the forward of {name}.{part} has been replaced by another tool"
    for block in attention_blocks(unet):
        reason = why_not_skippable(block.module)
        if reason is not None:
            return f"{block.name} must run in every step: {reason}"
    return None


def stages_of(unet: UNet2DConditionModel) -> list[tuple[str, nn.Module]]:
    """The stages that run between the first convolution and the output, each with its name."""
    down = [(f"down_blocks.{n}", stage) for n, stage in enumerate(unet.down_blocks)]
    middle = [] if unet.mid_block is None else [("mid_block", unet.mid_block)]
    up = [(f"up_blocks.{n}", stage) for n, stage in enumerate(unet.up_blocks)]
    return [(name, unwrapped(stage)) for name, stage in down + middle + up]


class UNetStage:
    """The ``forward`` of a stage. It runs the stage's own forward, unless the step reuses features."""

    runs_when_reused = True

    def __init__(self, name: str, module: nn.Module, place: Place, calls: UNetCalls, skip_channels: int) -> None:
        self.name = name
        self.module = module
        self.place = place
        self.calls = calls
        self.skip_channels = skip_channels  # of the first convolution's output
        self.forward = type(module).forward  # torch.compile cannot look it up while it traces a graph
        self.previous: Any = None

    @property
    def is_current(self) -> bool:
        """Whether the forward that was looked up is still that of the module's class."""
        return self.forward is type(self.module).forward

    def start(self, slot: Slot, sample: Tensor, dtype: torch.dtype) -> None:
        """Make room in ``slot`` for what the stage remembers of a picture with ``sample`` ``[B, 4, h, w]``."""

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        call = self.calls.current()
        if call.kind == "reused":
            refuse_gradients(args, kwargs)  # the timestep and the text lead to the feature that is reused
            return self.stand_in(hidden_states)
        return self.forward(self.module, hidden_states, *args, **kwargs)

    def stand_in(self, hidden_states: Tensor) -> Any:
        return hidden_states


class DownStage(UNetStage):
    """In a ``reused`` step, returns a tensor that an adapter may add to in place, and a residual for each layer."""

    def stand_in(self, hidden_states: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        batch, _, height, width = hidden_states.shape
        layers = len(self.module.resnets)
        if self.module.downsamplers is not None:
            layers, height, width = layers + 1, -(-height // 2), -(-width // 2)
        channels = self.module.resnets[-1].out_channels
        return hidden_states.new_empty(batch, channels, height, width), (hidden_states.new_empty(()),) * layers


class LastStage(UNetStage):
    """Runs in two parts, so that the input of its last layer can be stored and reused, before FreeU changes it."""

    def start(self, slot: Slot, sample: Tensor, dtype: torch.dtype) -> None:
        channels = self.module.resnets[-1].norm1.num_channels - self.skip_channels
        shape = (sample.shape[0], channels, *sample.shape[2:])
        slot.feature = torch.zeros(shape, dtype=dtype, device=sample.device)
        slot.change = torch.zeros((), device=sample.device)

    def __call__(
        self, hidden_states: Tensor, res_hidden_states_tuple: tuple[Tensor, ...], *args: Any, **kwargs: Any
    ) -> Tensor:
        call = self.calls.current()
        if call.slot is None:
            return self.forward(self.module, hidden_states, res_hidden_states_tuple, *args, **kwargs)
        before, last = slice(None, -1), slice(-1, None)
        # An up stage takes its residuals from the end of the tuple.
        if call.kind != "reused":
            layers, residuals = _Layers(self.module, before), res_hidden_states_tuple[1:]
            hidden_states = self.forward(layers, hidden_states, residuals, *args, **kwargs)
            refuse_gradients(hidden_states)
            _keep(call.slot, hidden_states)
        else:
            refuse_gradients(res_hidden_states_tuple[:1], args, kwargs)
            hidden_states = call.slot.feature.to(hidden_states.dtype)
            if getattr(self.module, "s1", None):  # FreeU writes into its input
                hidden_states = hidden_states.clone()
        layers, residuals = _Layers(self.module, last), res_hidden_states_tuple[:1]
        return self.forward(layers, hidden_states, residuals, *args, **kwargs)


def _keep(slot: Slot, feature: Tensor) -> None:
    """Store the feature for the steps that reuse it, and how much it has changed."""
    now = feature.float()
    slot.change.copy_((now - slot.feature.float()).norm() / now.norm())
    slot.feature.copy_(feature)


class _Layers:
    """Stand-in for a stage that has only some of its layers."""

    def __init__(self, stage: nn.Module, layers: slice) -> None:
        self._stage = stage
        self.resnets = list(stage.resnets)[layers]
        if hasattr(stage, "attentions"):
            self.attentions = list(stage.attentions)[layers]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_stage"], name)


def make_stages(unet: UNet2DConditionModel, calls: UNetCalls) -> list[UNetStage]:
    """Make one ``UNetStage`` for each stage of ``unet``."""
    last = unwrapped(unet.up_blocks[-1])

    def kind(module: nn.Module) -> type[UNetStage]:
        return LastStage if module is last else DownStage if type(module) in _DOWN else UNetStage

    channels = unet.conv_in.out_channels
    return [kind(module)(name, module, Place.of(unet, name), calls, channels) for name, module in stages_of(unet)]
