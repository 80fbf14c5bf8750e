"""KDA's Triton kernels: forward.py, backward.py and decode.py; layout.py cuts sequences; autograd.py joins them."""
