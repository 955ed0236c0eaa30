"""What other tools do to a UNet, and the reason for which a pruned UNet refuses each."""

import tomesd
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import LayerSkipConfig, PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from diffusers.hooks.layer_skip import apply_layer_skip
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn


def block_of(unet):
    return unet.mid_block.attentions[0]


def replace_forward(module):
    module.forward = lambda *args, _old=module.forward, **kwargs: _old(*args, **kwargs)


def double(module):
    """Exchange the class of a module for one whose forward does more."""

    original = type(module).forward

    class Doubled(type(module)):
        def forward(self, *args, **kwargs):
            found = original(self, *args, **kwargs)  # a stand-in for self has no super()
            if isinstance(found, torch.Tensor):
                return 2 * found
            return tuple(2 * part if isinstance(part, torch.Tensor) else part for part in found)

    module.__class__ = Doubled


class PlacedAttention(AttnProcessor2_0):
    """Counts on the places of its tokens."""


def exchange_layer(unet):
    block_of(unet).transformer_blocks[1] = nn.Identity()


def broadcast(unet):
    config = PyramidAttentionBroadcastConfig(
        2, current_timestep_callback=lambda: 500, spatial_attention_block_identifiers=("transformer_blocks",)
    )
    apply_pyramid_attention_broadcast(unet, config)


def skip(unet, **parts):
    name = "mid_block.attentions.0.transformer_blocks"
    apply_layer_skip(unet, LayerSkipConfig(indices=[0], fqn=name, **parts))


def replace_hooked_forward(module):
    """Over a hook of accelerate's, which alone would be harmless."""
    add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    replace_forward(module)


def merge(unet):
    tomesd.apply_patch(unet, ratio=0.5, max_downsample=4)
    unet._tome_info["hooks"].pop().remove()  # it wants the sample by place, and tells the size of the image alone
    unet._tome_info["size"] = (16, 24)


OTHER_OF_THE_SAME_NAME = type("AttnProcessor2_0", (), {"__call__": lambda _, *args, **kwargs: args[1]})()

BLOCK, FIRST_BLOCK = "mid_block.attentions.0", "down_blocks.1.attentions.0"
OF_THE_FIRST = "the forward of its first layer or of the self-attention there has been replaced by another tool"
PAIR = "its first layer has no pair of one self-attention and one cross-attention"
METHODS = (
    "get_attention_scores",
    "prepare_attention_mask",
    "head_to_batch_dim",
    "batch_to_head_dim",
    "norm_encoder_hidden_states",
)


def layer(unet, n):
    return block_of(unet).transformer_blocks[n]


# Each change, and the reason for which it is refused.
CHANGES = {
    "forward of the first layer": (lambda unet: replace_forward(layer(unet, 0)), OF_THE_FIRST),
    "forward of the first self-attention": (lambda unet: replace_forward(layer(unet, 0).attn1), OF_THE_FIRST),
    "forward of a later layer": (
        lambda unet: replace_forward(layer(unet, 2)),
        "the forward of its layer 2 has been replaced by another tool",
    ),
    "forward of a later attention": (
        lambda unet: replace_forward(layer(unet, 1).attn1),
        "the forward of its layer 1.attn1 has been replaced by another tool",
    ),
    "forward of every attention": (
        lambda unet: [
            replace_forward(module) for name, module in unet.named_modules() if name.endswith(("attn1", "attn2"))
        ],
        OF_THE_FIRST,
    ),
    "pyramid attention broadcast": (broadcast, "its layer 0.attn1 has diffusers' hook 'pyramid_attention_broadcast'"),
    "layer skip, scores": (
        lambda unet: skip(unet, skip_attention=False, skip_attention_scores=True, skip_ff=False),
        "its layer 0.attn1 has diffusers' hook 'layer_skip_hook'",
    ),
    "layer skip": (skip, "its layer 0 has diffusers' hook 'layer_skip_hook'"),
    "hook on the first layer": (
        lambda unet: layer(unet, 0).register_forward_hook(lambda *_: None),
        "its first layer has forward hooks",
    ),
    "processor of a cross-attention": (
        lambda unet: layer(unet, 1).attn2.set_processor(PlacedAttention()),
        "its layer 1.attn2 runs through PlacedAttention",
    ),
    "processor of the first self-attention": (
        lambda unet: layer(unet, 0).attn1.set_processor(PlacedAttention()),
        "its self-attention runs through PlacedAttention",
    ),
    "processor of a later self-attention": (
        lambda unet: layer(unet, 1).attn1.set_processor(PlacedAttention()),
        "its layer 1.attn1 runs through PlacedAttention",
    ),
    "processor that is named as diffusers' own": (
        lambda unet: layer(unet, 0).attn1.set_processor(OTHER_OF_THE_SAME_NAME),
        "its self-attention runs through AttnProcessor2_0 of another tool",
    ),
    "later processor that is named so": (
        lambda unet: layer(unet, 1).attn2.set_processor(OTHER_OF_THE_SAME_NAME),
        "its layer 1.attn2 runs through AttnProcessor2_0 of another tool",
    ),
    **{
        f"{name} of the first self-attention": (
            lambda unet, name=name: setattr(layer(unet, 0).attn1, name, lambda *_: None),
            f"its layer 0.attn1 has another tool's method {name}",
        )
        for name in METHODS
    },
    "output of a block": (
        lambda unet: setattr(block_of(unet), "_get_output_for_continuous_inputs", lambda *_, **__: None),
        "its method _get_output_for_continuous_inputs has been replaced by another tool",
    ),
    "feed-forward of another class": (
        lambda unet: setattr(layer(unet, 1), "ff", nn.Identity()),
        "its layer 1.ff is a Identity",
    ),
    "class of a feed-forward": (lambda unet: double(layer(unet, 1).ff), "its layer 1.ff is a Doubled"),
    "class of a layer": (exchange_layer, "its layer 1 is a Identity"),
    "class of a later self-attention": (lambda unet: double(layer(unet, 1).attn1), "its layer 1.attn1 is a Doubled"),
    "positions in the first layer": (
        lambda unet: setattr(layer(unet, 0), "pos_embed", nn.Identity()),
        "its layer 0 has positional embeddings",
    ),
    "positions in a later layer": (
        lambda unet: setattr(layer(unet, 1), "pos_embed", nn.Identity()),
        "its layer 1 has positional embeddings",
    ),
    "norm of a later attention": (
        lambda unet: setattr(layer(unet, 1).attn2, "group_norm", nn.GroupNorm(4, 64)),
        "its layer 1.attn2 has a norm over all tokens",
    ),
    "norm of the first self-attention": (
        lambda unet: setattr(layer(unet, 0).attn1, "group_norm", nn.GroupNorm(4, 64)),
        "its self-attention has a norm or residual of its own",
    ),
    "forward over a hook of accelerate's": (
        lambda unet: replace_hooked_forward(layer(unet, 1).attn1),
        "the forward of its layer 1.attn1 has been replaced by another tool",
    ),
    "pairs of self-attentions": (lambda unet: setattr(layer(unet, 0), "double_self_attention", True), PAIR),
    "no self-attention": (lambda unet: setattr(layer(unet, 0), "only_cross_attention", True), PAIR),
    "norms of the first layer": (
        lambda unet: setattr(layer(unet, 0), "norm_type", "ada_norm"),
        "its first layer has norm_type 'ada_norm'",
    ),
    "tomesd": (merge, "its layer 0 is a ToMeBlock"),
}
# These change every block, so the first is named.
OF_EVERY_BLOCK = ("forward of every attention", "pyramid attention broadcast", "tomesd")
