"""How a layer is computed: the mathematics in plain PyTorch, a fast path, Triton kernels, and who is asked.

Implementations register with ``dispatch`` under the name of their backend. The Triton kernels are imported
when the first operation goes to them, so that a machine without Triton never notices.
"""

from lunet_fast.ops import dispatch

dispatch.register_module("pytorch", "lunet_fast.ops.cpu.operations")
dispatch.register_module("triton", "lunet_fast.ops.triton")
