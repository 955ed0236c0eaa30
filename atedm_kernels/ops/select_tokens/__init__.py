from atedm_kernels.ops.select_tokens.op import select_tokens as select_tokens
