from atedm_kernels.ops.select_tokens.op import REDUCTIONS as REDUCTIONS
from atedm_kernels.ops.select_tokens.op import select_tokens as select_tokens
from atedm_kernels.ops.select_tokens.reference import join_heads as join_heads
