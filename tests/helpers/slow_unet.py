"""Pruned and reused steps, in an implementation that is slow and obvious."""

import math

import torch

from atedm.policy.staleness import Drift

RATIO = 0.6


def split(x, heads):
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def page_rank(attention, tokens, iterations):
    """Return scores ``[N]`` for one picture: the root mean square of the heads' scores."""
    q, k = split(attention.to_q(tokens), attention.heads), split(attention.to_k(tokens), attention.heads)
    scores = []
    for matrix in torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)[0]:
        s = torch.full((len(matrix),), 1 / len(matrix), dtype=matrix.dtype)
        for _ in range(iterations):
            s = matrix.T @ s
            s = s / s.sum()
        scores.append(s)
    return torch.stack(scores).square().mean(0).sqrt()


class SlowBlock:
    """A ``Transformer2DModel`` that keeps what it last added to each token. It computes one batch row at a time."""

    def __init__(self, module, ranking, staleness):
        self.module, self.ranking, self.staleness = module, ranking, staleness
        self.update = self.seen = self.age = None
        self.is_whole = True
        self.projection = Drift().start((1, 1, module.in_channels), torch.float64, "cpu")["projection"]

    def whole(self, x, text):
        return type(self.module).forward(self.module, x, encoder_hidden_states=text, return_dict=False)[0] - x

    def __call__(self, x, encoder_hidden_states, **_):
        text, batch, tokens = encoder_hidden_states, x.shape[0], x.shape[2] * x.shape[3]
        flat = x.flatten(2).mT
        if self.is_whole:
            self.update, self.seen = self.whole(x, text).flatten(2).mT.clone(), flat.clone()
            self.age = torch.zeros(batch, tokens)
            return (x + self.update.mT.view_as(x),)
        keep = math.floor((1 - RATIO) * tokens + 0.5)
        for b in range(batch):
            hidden = self.module.norm(x[b : b + 1])
            hidden = self.module.proj_in(hidden.flatten(2).mT)
            first, *rest = self.module.transformer_blocks
            normed = first.norm1(hidden)
            stale = {
                None: lambda: torch.ones(tokens),
                "steps": lambda: self.age[b] + 1,  # noqa: B023 (called at once)
                "drift": lambda: ((flat[b] - self.seen[b]) @ self.projection.T).norm(dim=1),  # noqa: B023
            }[self.staleness]()
            scores = stale if self.ranking is None else stale * page_rank(first.attn1, normed, 5)
            kept = sorted(sorted(range(tokens), key=lambda i: (-float(scores[i]), i))[:keep])
            compact = (hidden + first.attn1(normed))[:, kept]
            compact = compact + first.attn2(first.norm2(compact), encoder_hidden_states=text[b : b + 1])
            compact = compact + first.ff(first.norm3(compact))
            for layer in rest:
                compact = layer(compact, encoder_hidden_states=text[b : b + 1])
            added = self.module.proj_out(compact)
            for slot, token in enumerate(kept):
                self.update[b, token] = added[0, slot]
                self.seen[b, token] = flat[b, token]
            self.age[b] += 1
            self.age[b, kept] = 0
        return (x + self.update.mT.reshape(x.shape),)


class SlowUNet:
    """Runs steps of all four kinds by hand."""

    def __init__(self, unet, ranking="self", staleness="drift"):
        self.unet, self.blocks = unet, {}
        for name, module in unet.named_modules():
            if type(module).__name__ == "Transformer2DModel":
                self.blocks[name] = module.forward = SlowBlock(module, ranking, staleness)
        self.feature = None
        # The first of each down stage and the last of each up stage (AT-EDM, section 3.4).
        self.whole_when_light = set()
        for path, which in (("down_blocks", 0), ("up_blocks", -1)):
            for n in range(len(unet.down_blocks)):
                names = [name for name in self.blocks if name.startswith(f"{path}.{n}.")]
                self.whole_when_light |= {names[which]} if names else set()

    def remove(self):
        for module in self.unet.modules():
            module.__dict__.pop("forward", None)

    def __call__(self, kind, inputs):
        if kind == "reused":
            return self.reused(**inputs)
        for name, block in self.blocks.items():
            block.is_whole = kind == "whole" or (kind == "light" and name in self.whole_when_light)
        unet = self.unet
        last, skip = unet.up_blocks[-1].resnets[-1], unet.conv_in.out_channels
        hook = last.register_forward_pre_hook(lambda _, args: setattr(self, "feature", args[0][:, :-skip].clone()))
        out = unet(**inputs).sample
        hook.remove()
        return out

    def reused(self, sample, timestep, encoder_hidden_states, added_cond_kwargs):
        unet = self.unet
        embedding = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep))
        embedding = embedding + unet.get_aug_embed(embedding, encoder_hidden_states, added_cond_kwargs)
        hidden = torch.cat([self.feature, unet.conv_in(sample)], 1)
        hidden = unet.up_blocks[-1].resnets[-1](hidden, embedding)
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))
