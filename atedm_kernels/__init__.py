"""AT-EDM's token pruning as torch custom ops (``torch.ops.atedm``): tensors in, tensors out, no model library."""

from importlib import metadata as _metadata

from atedm_kernels._checks import MAX_COUNT as MAX_COUNT
from atedm_kernels._checks import MAX_FLOAT32 as MAX_FLOAT32
from atedm_kernels._checks import MAX_HEAD_DIM as MAX_HEAD_DIM
from atedm_kernels._checks import MIN_HEAD_DIM as MIN_HEAD_DIM
from atedm_kernels.backends import backend
from atedm_kernels.ops.attention_column_sums import attention_column_sums
from atedm_kernels.ops.attention_with_logsumexp import attention_with_logsumexp
from atedm_kernels.ops.gather_tokens import gather_tokens
from atedm_kernels.ops.ranking import DEFAULT_MAX_ITERATIONS as DEFAULT_MAX_ITERATIONS
from atedm_kernels.ops.ranking import DEFAULT_TOLERANCE as DEFAULT_TOLERANCE
from atedm_kernels.ops.recover_feature_map import recover_feature_map
from atedm_kernels.ops.recover_tokens import recover_tokens
from atedm_kernels.ops.select_tokens import REDUCTIONS as REDUCTIONS
from atedm_kernels.ops.select_tokens import select_tokens
from atedm_kernels.ops.similarity_source import similarity_source
from atedm_kernels.ops.update_feature_map import update_feature_map
from atedm_kernels.ops.weighted_page_rank import weighted_page_rank
from atedm_kernels.ops.weighted_page_rank_cross import weighted_page_rank_cross

try:
    __version__ = _metadata.version("atedm-kernels")
except _metadata.PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "attention_column_sums",
    "attention_with_logsumexp",
    "backend",
    "gather_tokens",
    "recover_feature_map",
    "recover_tokens",
    "select_tokens",
    "similarity_source",
    "update_feature_map",
    "weighted_page_rank",
    "weighted_page_rank_cross",
]
