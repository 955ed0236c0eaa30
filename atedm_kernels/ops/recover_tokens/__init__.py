from atedm_kernels.ops.recover_tokens.op import recover_tokens as recover_tokens
