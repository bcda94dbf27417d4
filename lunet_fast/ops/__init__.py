"""How a layer is computed: the mathematics in plain PyTorch, a fast CPU path, Triton, and who is asked."""
