from atedm_kernels.ops.gather_tokens.op import gather_tokens as gather_tokens
