"""KDA's Triton kernels: forward.py, backward.py and decode.py over parts.py, and mixer.py for the layer around them.

layout.py cuts sequences, plan.py holds the configurations, launch.py runs a step, autograd.py joins the steps.
"""

import importlib.util

if importlib.util.find_spec("triton") is None:
    raise ValueError(
        "impl='triton' needs triton, which is not installed: pip install 'evalkit[kda]', or use impl='reference'"
    )
