"""What CUDA graphs cannot capture is not in the graph of a pruned UNet; a GPU's own modes run in ``test_gpu.py``."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.utils._pytree import tree_map_only

import atedm
from atedm.policy.options import PUBLISHED

# In the GPU's place: tensors on it have no values, so that to read one is an error, and nothing else is on it.
DEVICE = torch.device("meta")

OPTIONS = [
    {},
    {"ranking": "cross", "placement": "paper", "recovery": "bicubic"},
    {"ranking": "keys", "recovery": "keys", "grid": 2},
]


@pytest.fixture
def graphs(fresh_compiler):
    return []


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_all_of_the_graph_is_on_the_device_and_writes_over_none_of_its_inputs(
    unet_to_compile, make_inputs, graphs, options
):
    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    unet = unet_to_compile.to(DEVICE)
    inputs = tree_map_only(torch.Tensor, lambda tensor: tensor.to(DEVICE), make_inputs())
    inputs["timestep"] = torch.empty((), device=DEVICE)
    compiled = torch.compile(unet, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    atedm.apply(compiled, PUBLISHED, schedule=None, **options)
    with torch.inference_mode():
        assert compiled(**inputs).sample.device == DEVICE
    (graph,) = graphs
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert sum(node.target is torch.ops.atedm.select_tokens.default for node in calls) == len(atedm.pruned_blocks(unet))
    values = [node.meta["val"] for node in graph.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert values and {value.device for value in values} == {DEVICE}
    # A result whose size depends on values, or a value that the host reads, would have a symbol of its own.
    assert not any(isinstance(side, torch.SymInt) for value in values for side in value.shape)
    assert not any(node.target is torch.ops.aten._local_scalar_dense.default for node in calls)
    given = {node for node in graph.graph.nodes if node.op == "placeholder"}
    assert not any(given.intersection(_written(node)) for node in calls)


def _written(node):
    """The arguments that an operator writes over."""
    arguments = getattr(getattr(node.target, "_schema", None), "arguments", ())
    return [given for a, given in zip(arguments, node.args, strict=False) if a.alias_info and a.alias_info.is_write]
