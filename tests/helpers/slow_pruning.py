"""A pruned call of a UNet as in the paper, in an implementation that is slow and obvious."""

import math

import torch


def split(x, heads):
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def dense_map(attention, queries, keys):
    q, k = split(attention.to_q(queries), attention.heads), split(attention.to_k(keys), attention.heads)
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)


def page_rank(attention_map, iterations):
    scores = []
    for matrix in attention_map:  # one head
        s = torch.full((matrix.shape[0],), 1 / matrix.shape[0], dtype=matrix.dtype)
        for _ in range(iterations):
            s = matrix.T @ s
            s = s / s.sum()
        scores.append(s)
    return torch.stack(scores)


def page_rank_cross(attention_map, iterations):
    scores = []
    for matrix in attention_map:
        s = torch.full((matrix.shape[0],), 1 / matrix.shape[0], dtype=matrix.dtype)
        entropy = -(matrix * matrix.log()).sum(1)
        for _ in range(iterations):
            s = matrix @ (matrix.T @ s) / entropy
            s = s / s.sum()
        scores.append(s)
    return torch.stack(scores)


def key_similarity(attention, tokens):
    k = split(attention.to_k(tokens), attention.heads)
    length = k.square().sum(-1).sqrt()
    return ((k @ k.transpose(-1, -2)) / (length[..., None] * length[..., None, :])).exp()


def slow_transformer(module, x, text, keep, *, ranking, recovery, grid, iterations):
    """A ``Transformer2DModel`` pruned as the paper does: token by token, with the map in memory."""
    batch, channels, height, width = x.shape
    tokens = module.norm(x)
    if module.use_linear_projection:
        tokens = module.proj_in(tokens.permute(0, 2, 3, 1).reshape(batch, height * width, channels))
    else:
        tokens = module.proj_in(tokens).permute(0, 2, 3, 1).reshape(batch, height * width, -1)
    first, *rest = module.transformer_blocks
    normed = first.norm1(tokens)
    self_map = dense_map(first.attn1, normed, normed)
    attended = (self_map @ split(first.attn1.to_v(normed), first.attn1.heads)).transpose(1, 2).flatten(2)
    tokens = tokens + first.attn1.to_out[0](attended)
    cross_map = dense_map(first.attn2, first.norm2(tokens), text)
    tokens = tokens + first.attn2(first.norm2(tokens), encoder_hidden_states=text)
    tokens = tokens + first.ff(first.norm3(tokens))
    out = torch.empty(batch, height * width, channels, dtype=x.dtype)
    for b in range(batch):
        scores = {
            "self": lambda: page_rank(self_map[b], iterations),  # noqa: B023 (called at once)
            "cross": lambda: page_rank_cross(cross_map[b], iterations),  # noqa: B023
            "keys": lambda: 1 / key_similarity(first.attn1, normed)[b].mean(1),  # noqa: B023
        }[ranking]()
        importance = scores.square().mean(0).sqrt().tolist()
        on_grid = [False] * (height * width)
        for stride in range(grid or height * width, height * width):
            on_grid = [i // width % stride == 0 and i % width % stride == 0 for i in range(height * width)]
            if sum(on_grid) <= keep:
                break
        kept = sorted(sorted(range(height * width), key=lambda i: (not on_grid[i], -importance[i], i))[:keep])
        compact = tokens[b : b + 1, kept]
        for layer in rest:
            compact = compact + layer.attn1(layer.norm1(compact))
            compact = compact + layer.attn2(layer.norm2(compact), encoder_hidden_states=text[b : b + 1])
            compact = compact + layer.ff(layer.norm3(compact))
        similarity = (key_similarity(first.attn1, normed) if recovery == "keys" else self_map)[b].mean(0)[kept]
        for i in range(height * width):
            slot = kept.index(i) if i in kept else int(similarity[:, i].argmax())
            out[b, i] = compact[0, slot]
    if module.use_linear_projection:
        out = module.proj_out(out).view(batch, height, width, -1).permute(0, 3, 1, 2)
    else:
        out = module.proj_out(out.view(batch, height, width, -1).permute(0, 3, 1, 2))
    return out + x


def slow_unet(unet, inputs, ratio, levels, *, ranking="self", recovery="similarity", grid=None, iterations=5):
    """Run the UNet with each block of ``levels`` replaced by the slow one."""
    level_of = {f"down_blocks.{i}": i + 1 for i in range(3)} | {f"up_blocks.{i}": 3 - i for i in range(3)}
    for name, module in unet.named_modules():
        if type(module).__name__ != "Transformer2DModel":
            continue
        if level_of.get(".".join(name.split(".")[:2]), 3) not in levels:
            continue

        def forward(x, encoder_hidden_states, module=module, **_):
            keep = math.floor((1 - ratio) * x.shape[2] * x.shape[3] + 0.5)
            chosen = {"ranking": ranking, "recovery": recovery, "grid": grid, "iterations": iterations}
            return (slow_transformer(module, x, encoder_hidden_states, keep, **chosen),)

        module.forward = forward
    out = unet(**inputs).sample
    for module in unet.modules():
        module.__dict__.pop("forward", None)
    return out
