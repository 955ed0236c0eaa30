from atedm_kernels.ops.gather_pair.op import gather_pair as gather_pair
