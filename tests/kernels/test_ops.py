"""What holds for every op as a torch op: registration, ``torch.compile``, errors, memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import atedm_kernels
from atedm_kernels.ops.attention_column_sums.reference import attention_column_sums_reference
from atedm_kernels.ops.attention_with_logsumexp.reference import attention_with_logsumexp_reference
from atedm_kernels.ops.similarity_source.reference import similarity_source_reference
from atedm_kernels.ops.weighted_page_rank.reference import weighted_page_rank_reference
from atedm_kernels.ops.weighted_page_rank_cross.reference import weighted_page_rank_cross_reference

ops = torch.ops.atedm


def inputs(device: torch.device, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 9, 2, 16).to(device, dtype).transpose(1, 2) for _ in range(3))
    _, lse = atedm_kernels.attention_with_logsumexp(q, k, v)
    index = torch.tensor([[0, 3, 8], [1, 2, 5]], device=device)
    source = torch.randint(0, 3, (2, 9)).to(device)
    return {
        "q": q,
        "k": k,
        "v": v,
        "lse": lse,
        "weights": torch.rand(2, 2, 9).to(device),
        "scores": torch.rand(2, 2, 9).to(device),
        "x": torch.randn(2, 9, 5).to(device, dtype),
        "compact": torch.randn(2, 3, 5).to(device, dtype),
        "cache": torch.randn(2, 9, 5).to(device, dtype),
        "residual": torch.randn(2, 5, 3, 3).to(device, dtype),
        "index": index,
        "source": source,
    }


CALLS = {
    "attention_with_logsumexp": lambda t: (t["q"], t["k"], t["v"]),
    "attention_column_sums": lambda t: (t["q"], t["k"], t["lse"], t["weights"], 0.3),
    "weighted_page_rank": lambda t: (t["q"], t["k"], t["lse"], None, 1, 1e-3),
    "weighted_page_rank_cross": lambda t: (t["q"], t["k"][:, :, :7], t["lse"], None, 1, 1e-3, t["scores"]),
    "select_tokens": lambda t: (t["scores"], 4, "rms"),
    "gather_tokens": lambda t: (t["x"], t["index"]),
    "similarity_source": lambda t: (t["q"], t["k"], t["lse"], t["index"]),
    "recover_tokens": lambda t: (t["compact"], t["source"]),
    "recover_feature_map": lambda t: (t["compact"], t["source"], t["residual"]),
    "update_feature_map": lambda t: (t["compact"], t["index"], t["cache"], t["residual"]),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_opcheck(backend, device, name, dtype):
    arguments = CALLS[name](inputs(device, dtype))
    with atedm_kernels.backend(backend):
        torch.library.opcheck(getattr(ops, name).default, arguments)


def test_opcheck_channels_last(backend, device):
    t = inputs(device)
    residual = t["residual"].to(memory_format=torch.channels_last)
    with atedm_kernels.backend(backend):
        torch.library.opcheck(ops.recover_feature_map.default, (t["compact"], t["source"], residual))
        torch.library.opcheck(
            ops.update_feature_map.default, (t["compact"], t["index"], t["cache"].mT.contiguous().mT, residual)
        )


def prune_and_recover(q, k, v, x, residual):
    """Every op, as an attention block uses them."""
    out, lse = atedm_kernels.attention_with_logsumexp(q, k, v)
    scores, _ = atedm_kernels.weighted_page_rank(q, k, lse, max_iterations=2)
    cross, _ = atedm_kernels.weighted_page_rank_cross(q, k[:, :, :7], lse, max_iterations=2)
    sums = atedm_kernels.attention_column_sums(q, k, lse, scores)
    index = atedm_kernels.select_tokens(scores + sums + cross, 4)
    source = atedm_kernels.similarity_source(q, k, lse, index)
    compact = atedm_kernels.gather_tokens(x, index) * 2
    tokens = atedm_kernels.recover_tokens(compact, source)
    cache = x * 0.5
    updated = atedm_kernels.update_feature_map(compact, index, cache, residual)
    return out, tokens, atedm_kernels.recover_feature_map(compact, source, residual), cache, updated


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_compiles_without_graph_breaks(backend, device, compiler):
    t = inputs(device, torch.float32)
    arguments = [t[name] for name in ("q", "k", "v", "x", "residual")]
    torch._dynamo.reset()
    with atedm_kernels.backend(backend), torch.no_grad():
        expected = prune_and_recover(*arguments)
        got = torch.compile(prune_and_recover, fullgraph=True, backend=compiler)(*arguments)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


def test_backends_agree(device):
    t = inputs(device, torch.float32)
    arguments = [t[name] for name in ("q", "k", "v", "x", "residual")]
    with atedm_kernels.backend("reference"):
        expected = prune_and_recover(*arguments)
    with atedm_kernels.backend("triton"):
        got = prune_and_recover(*arguments)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def meta(x: torch.Tensor) -> torch.Tensor:
    return x.to("meta")


# function, changed arguments, the error, what its message names
WRONG = [
    ("attention_column_sums", {"q": lambda t: t["q"][0]}, ValueError, "q has shape"),
    ("attention_column_sums", {"q": lambda t: t["q"].int()}, TypeError, "q has dtype"),
    ("attention_column_sums", {"k": lambda t: t["k"].double()}, TypeError, "k has dtype"),
    ("attention_column_sums", {"k": lambda t: t["k"][:, :1]}, ValueError, "k has shape"),
    ("attention_column_sums", {"q": lambda t: t["q"][..., :4], "k": lambda t: t["k"][..., :4]}, ValueError, "head dim"),
    ("attention_column_sums", {"q": lambda t: t["q"][:, :, :0]}, ValueError, "q has shape"),
    ("attention_column_sums", {"lse": lambda t: t["lse"][..., None]}, ValueError, "lse has shape"),
    ("attention_column_sums", {"lse": lambda t: t["lse"].half()}, TypeError, "lse has dtype"),
    ("attention_column_sums", {"weights": lambda t: t["weights"][..., :3]}, ValueError, "weights has shape"),
    ("attention_column_sums", {"weights": lambda t: t["weights"].double()}, TypeError, "weights has dtype"),
    ("attention_column_sums", {"scale": lambda t: float("nan")}, ValueError, "scale is"),
    ("attention_column_sums", {"scale": lambda t: 1e39}, ValueError, "scale is"),
    ("attention_column_sums", {"scale": lambda t: -(10**400)}, ValueError, "scale is"),
    ("attention_with_logsumexp", {"v": lambda t: t["v"][:, :, :4]}, ValueError, "v has shape"),
    ("attention_with_logsumexp", {"scale": lambda t: float("inf")}, ValueError, "scale is"),
    ("weighted_page_rank", {"k": lambda t: t["k"][:, :, :4]}, ValueError, "k has 4 tokens"),
    ("weighted_page_rank", {"max_iterations": lambda t: 0}, ValueError, "max_iterations is"),
    ("weighted_page_rank", {"tolerance": lambda t: -1.0}, ValueError, "tolerance is"),
    ("weighted_page_rank", {"tolerance": lambda t: float("nan")}, ValueError, "tolerance is"),
    ("weighted_page_rank", {"tolerance": lambda t: 10**400}, ValueError, "tolerance is"),
    ("weighted_page_rank", {"initial": lambda t: t["scores"][..., :3]}, ValueError, "initial has shape"),
    ("weighted_page_rank", {"initial": lambda t: t["scores"].double()}, TypeError, "initial has dtype"),
    ("weighted_page_rank_cross", {"initial": lambda t: 1.0}, TypeError, "initial is a float"),
    ("weighted_page_rank_cross", {"max_iterations": lambda t: 0}, ValueError, "max_iterations is"),
    ("weighted_page_rank_cross", {"lse": lambda t: t["lse"][..., :4]}, ValueError, "lse has shape"),
    ("select_tokens", {"keep": lambda t: 0}, ValueError, "keep is 0"),
    ("select_tokens", {"keep": lambda t: 10}, ValueError, "keep is 10"),
    ("select_tokens", {"keep": lambda t: 2.0}, TypeError, "keep is"),
    ("select_tokens", {"reduction": lambda t: "median"}, ValueError, "reduction is"),
    ("select_tokens", {"scores": lambda t: t["scores"].half()}, TypeError, "scores has dtype"),
    ("select_tokens", {"scores": lambda t: t["scores"][0]}, ValueError, "scores has shape"),
    ("gather_tokens", {"index": lambda t: t["index"].int()}, TypeError, "index has dtype"),
    ("gather_tokens", {"index": lambda t: t["index"][:1]}, ValueError, "index has batch size"),
    ("gather_tokens", {"x": lambda t: t["x"].int()}, TypeError, "x has dtype"),
    ("similarity_source", {"index": lambda t: t["source"].repeat(1, 2)}, ValueError, "index names 18"),
    ("similarity_source", {"scale": lambda t: float("nan")}, ValueError, "scale is"),
    ("recover_tokens", {"source": lambda t: t["source"][0]}, ValueError, "source has shape"),
    ("recover_feature_map", {"source": lambda t: t["source"][:, :8]}, ValueError, "source has shape"),
    ("recover_feature_map", {"residual": lambda t: t["residual"][0]}, ValueError, "residual has shape"),
    ("recover_feature_map", {"x": lambda t: t["compact"][..., :4]}, ValueError, "x has shape"),
    ("update_feature_map", {"x": lambda t: t["compact"][..., :4]}, ValueError, "x has shape"),
    ("update_feature_map", {"x": lambda t: t["compact"][:, :2]}, ValueError, "index has shape"),
    ("update_feature_map", {"index": lambda t: t["index"].int()}, TypeError, "index has dtype"),
    (
        "update_feature_map",
        {"index": lambda t: t["index"].repeat(1, 4), "x": lambda t: t["compact"].repeat(1, 4, 1)},
        ValueError,
        "index names 12",
    ),
    ("update_feature_map", {"cache": lambda t: t["cache"][:, :8]}, ValueError, "cache has shape"),
    ("update_feature_map", {"cache": lambda t: t["cache"].float()}, TypeError, "cache has dtype"),
    ("update_feature_map", {"cache": lambda t: t["cache"][:1].expand(2, -1, -1)}, ValueError, "cache has strides"),
    ("update_feature_map", {"residual": lambda t: t["residual"][:, :4]}, ValueError, "x has shape"),
    ("update_feature_map", {"residual": lambda t: t["residual"].long()}, TypeError, "residual has dtype"),
]
WRONG_VALUES = [
    ("select_tokens", {"scores": lambda t: t["scores"].log() * float("nan")}, ValueError, "scores holds"),
    ("weighted_page_rank", {"initial": lambda t: t["scores"] - 0.5}, ValueError, "initial holds -"),
    ("weighted_page_rank", {"initial": lambda t: t["scores"].log() * float("nan")}, ValueError, "initial holds nan"),
    ("weighted_page_rank", {"initial": lambda t: t["scores"] / 0}, ValueError, r"initial sums to inf at .* \(0, 0\)"),
    ("weighted_page_rank_cross", {"initial": lambda t: t["scores"] * 0}, ValueError, "initial sums to 0"),
    ("gather_tokens", {"index": lambda t: t["index"] + 1}, ValueError, "index holds"),
    ("gather_tokens", {"index": lambda t: t["index"] - 1}, ValueError, "index holds"),
    ("similarity_source", {"index": lambda t: t["index"] + 1}, ValueError, "index holds"),
    ("recover_tokens", {"source": lambda t: t["source"] + 3}, ValueError, "source holds"),
    ("recover_feature_map", {"source": lambda t: t["source"] - 3}, ValueError, "source holds"),
    ("update_feature_map", {"index": lambda t: t["index"] + 1}, ValueError, "index holds values from 1 to 9"),
    ("update_feature_map", {"index": lambda t: t["index"] - 1}, ValueError, "index holds values from -1 to 7"),
    ("update_feature_map", {"index": lambda t: t["index"].flip(1)}, ValueError, "index holds 3 after 8 in row 0"),
    ("update_feature_map", {"index": lambda t: t["index"].clamp(min=2)}, ValueError, "index holds 2 after 2 in row 1"),
    ("update_feature_map", {"x": lambda t: t["cache"][:, 3:6]}, ValueError, "x shares memory with cache"),
    (
        "update_feature_map",
        {"residual": lambda t: t["cache"].mT.unflatten(2, (3, 3))},
        ValueError,
        "residual shares memory with cache",
    ),
]


def good_arguments(name: str, t: dict[str, torch.Tensor]) -> dict[str, object]:
    names = {
        "attention_with_logsumexp": ("q", "k", "v"),
        "attention_column_sums": ("q", "k", "lse", "weights"),
        "weighted_page_rank": ("q", "k", "lse"),
        "weighted_page_rank_cross": ("q", "k", "lse"),
        "select_tokens": ("scores",),
        "gather_tokens": ("x", "index"),
        "similarity_source": ("q", "k", "lse", "index"),
        "recover_tokens": ("source",),
        "recover_feature_map": ("source", "residual"),
        "update_feature_map": ("index", "cache", "residual"),
    }
    arguments: dict[str, object] = {key: t[key] for key in names[name]}
    if name.startswith(("recover", "update")):
        arguments["x"] = t["compact"]
    if name == "select_tokens":
        arguments["keep"] = 4
    if name.startswith("weighted_page_rank"):
        arguments["initial"] = t["scores"]
    return arguments


@pytest.mark.parametrize("name", CALLS)
def test_good_arguments(backend, device, monkeypatch, name):
    """Those that the next test spoils one by one."""
    monkeypatch.setenv("ATEDM_CHECK", "1")
    with atedm_kernels.backend(backend):
        getattr(atedm_kernels, name)(**good_arguments(name, inputs(device)))


@pytest.mark.parametrize(("name", "changes", "error", "message"), WRONG + WRONG_VALUES)
def test_wrong_arguments(backend, device, monkeypatch, name, changes, error, message):
    monkeypatch.setenv("ATEDM_CHECK", "1")
    t = inputs(device)
    arguments = good_arguments(name, t)
    function = getattr(atedm_kernels, name)
    with atedm_kernels.backend(backend), pytest.raises(error, match=message):
        function(**{**arguments, **{key: change(t) for key, change in changes.items()}})


@pytest.mark.parametrize(("name", "changes", "error", "message"), WRONG)
def test_wrong_arguments_of_meta_tensors(name, changes, error, message):
    """The fake kernels make the same checks."""
    t = {key: meta(x) for key, x in inputs(torch.device("cpu")).items()}
    arguments = good_arguments(name, t)
    with pytest.raises(error, match=message):
        getattr(atedm_kernels, name)(**{**arguments, **{key: change(t) for key, change in changes.items()}})


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("attention_column_sums", "k"),
        ("attention_column_sums", "lse"),
        ("weighted_page_rank", "lse"),
        ("weighted_page_rank", "initial"),
        ("gather_tokens", "index"),
        ("similarity_source", "index"),
        ("recover_feature_map", "residual"),
        ("update_feature_map", "index"),
        ("update_feature_map", "cache"),
    ],
)
def test_wrong_device(device, name, moved):
    arguments = good_arguments(name, inputs(device))
    arguments[moved] = meta(arguments[moved])
    with pytest.raises(ValueError, match=f"{moved} is on meta"):
        getattr(atedm_kernels, name)(**arguments)


def test_forced_backend_that_cannot_serve(device, monkeypatch):
    t = inputs(device)
    with atedm_kernels.backend("triton"), pytest.raises(ValueError, match=r"triton.*cannot serve.*float64"):
        atedm_kernels.attention_column_sums(t["q"].double(), t["k"].double(), t["lse"].double())
    with pytest.raises(ValueError, match="backend name is 'tritom'"), atedm_kernels.backend("tritom"):
        pass
    monkeypatch.setenv("ATEDM_BACKEND", "fast")
    with pytest.raises(ValueError, match="ATEDM_BACKEND is 'fast'"):
        atedm_kernels.gather_tokens(t["x"], t["index"])
    if device.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with atedm_kernels.backend("triton"), pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
            atedm_kernels.gather_tokens(t["x"], t["index"])


def test_import_needs_no_triton():
    """A machine without triton still has the references."""
    code = """
import sys
sys.modules["triton"] = None
import torch, atedm_kernels
print(atedm_kernels.gather_tokens(torch.ones(1, 2, 3), torch.tensor([[1]])).tolist())
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(atedm_kernels.__file__).parents[1]), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.strip() == "[[[1.0, 1.0, 1.0]]]", done.stderr[-2000:]


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return out


REFERENCES = {
    "attention": lambda q, k, lse: attention_with_logsumexp_reference(q, k, k, 0.25),
    "column sums": lambda q, k, lse: attention_column_sums_reference(q, k, lse, None, 0.25),
    "page rank": lambda q, k, lse: weighted_page_rank_reference(q, k, lse, 0.25, 2, 0.0),
    "page rank, cross": lambda q, k, lse: weighted_page_rank_cross_reference(q, k, lse, 0.25, 1, 0.0),
    "similarity": lambda q, k, lse: similarity_source_reference(q, k, lse, torch.arange(0, 4096, 3)[None], 0.25),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_reference_never_stores_the_map(name):
    """4096 tokens and 2 heads: the map would take 134 MB. Called below the op, because a mode cannot see inside it."""
    q, k = torch.randn(2, 1, 2, 4096, 16).unbind()
    _, lse = atedm_kernels.attention_with_logsumexp(q, k, k)
    with LargestTensor() as largest:
        REFERENCES[name](q, k, lse)
    assert 2**16 < largest.bytes <= 20 * 2**20


@pytest.mark.parametrize(
    "name", ["attention_column_sums", "weighted_page_rank", "weighted_page_rank_cross", "similarity_source"]
)
def test_logits_beyond_what_float32_holds_are_refused_if_asked(monkeypatch, name):
    t = inputs(torch.device("cpu"))
    arguments = good_arguments(name, t)
    for large in (2000.0, -2000.0, float("nan")):
        lse = arguments["lse"].clone()
        lse[0, 0, 0] = large
        monkeypatch.setenv("ATEDM_CHECK", "1")
        with pytest.raises(ValueError, match=r"lse reaches (2000|nan); expected at most 300"):
            getattr(atedm_kernels, name)(**{**arguments, "lse": lse})
        monkeypatch.delenv("ATEDM_CHECK")
        if large > 0:
            getattr(atedm_kernels, name)(**{**arguments, "lse": lse})


def test_up_to_that_the_promised_accuracy_holds(backend, device):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 64, 64, generator=generator) * 1.5 for _ in range(2))
    for x in (q, k):  # one direction that all have in common
        x[..., 0] = (290 * 8) ** 0.5
    q, k = q.to(device), k.to(device)
    exact = torch.softmax(q.double() @ k.double().mT / 8, -1)
    with atedm_kernels.backend(backend):
        _, lse = atedm_kernels.attention_with_logsumexp(q, k, k)
        sums = atedm_kernels.attention_column_sums(q, k, lse)
    assert 280 < lse.abs().max() < 300
    torch.testing.assert_close(sums.double(), exact.mean(-2), rtol=2e-4, atol=0)
