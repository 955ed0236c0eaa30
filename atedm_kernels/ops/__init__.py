"""One folder per op: ``op.py`` (the custom op and its public function), ``reference.py`` (the definition in plain
PyTorch), ``triton_kernel.py`` (the kernel and its launch) and ``native_kernel.py`` (the call into ``csrc/``)."""
