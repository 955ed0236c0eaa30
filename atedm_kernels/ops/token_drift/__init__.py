from atedm_kernels.ops.token_drift.op import token_drift as token_drift
