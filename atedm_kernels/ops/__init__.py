"""One folder per op, with the files that it needs: ``op.py`` (the custom op and its public function), ``reference.py``
(the definition in plain PyTorch), ``triton_kernel.py`` (the kernel and its launch), ``native_kernel.py`` (the CPU
kernel, usually a call into ``csrc/``) and ``torch_kernel.py`` (the call of torch's own kernel)."""
