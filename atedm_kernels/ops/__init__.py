"""One folder an op: ``op.py`` (the custom op and its public function), ``reference.py`` (the definition in
plain PyTorch, the oracle of the tests) and ``triton_kernel.py`` (the kernel and its launch)."""
