from atedm_kernels.ops.sum_rows.op import sum_rows as sum_rows
