"""Random inputs of KDA, what is run on them, and how far the results are from float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from models.bench.costs import Sizes
from models.bench.timing import failure
from models.kda.api import kda, kda_step
from models.kda.reference import gate_bias

HALF_LIVES = (2.0, 2048.0)
"""Of the channels' memory in tokens, log-spaced: what a converted model starts from."""
LOWER_BOUND = -5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Of one call, with the shapes and dtypes of `models.kda.api.kda`."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    A_log: Tensor
    dt_bias: Tensor
    state: Tensor
    """[B, H, K, V] float32: a decode step's state; of longer inputs, the initial one."""
    do: Tensor
    """The output's gradient, [B, T, H, V]."""

    def arguments(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.g, self.beta, self.A_log, self.dt_bias

    def map(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        return replace(self, **{field.name: change(getattr(self, field.name)) for field in fields(self)})


def random_inputs(
    sizes: Sizes, gate: str, dtype: torch.dtype, generator: torch.Generator, *, state: bool, gradient: bool
) -> Inputs:
    """Standard normal q, k, v, gate input, beta and output gradient; dt_bias spreads the channels' half-lives.

    Without ``state`` or ``gradient`` those two are empty tensors.
    """
    device = generator.device
    B, T, H, HK, K, V = (
        sizes.batch,
        sizes.tokens,
        sizes.heads,
        sizes.kv_heads,
        sizes.key_dim,
        sizes.value_dim,
    )

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device, generator=generator)

    return Inputs(
        q=normal(B, T, H, K),
        k=normal(B, T, HK, K),
        v=normal(B, T, HK, V),
        g=normal(B, T, H, K),
        beta=normal(B, T, H),
        A_log=0.1 * normal(H, dtype=torch.float32),
        dt_bias=_biases(gate, K).to(device).expand(H, K).contiguous(),
        state=normal(B, H, K, V, dtype=torch.float32) if state else torch.empty(0, device=device),
        do=normal(B, T, H, V) if gradient else torch.empty(0, device=device),
    )


def _biases(gate: str, K: int) -> Tensor:
    """dt_bias [K] with which gate input 0 and A_log 0 forget half in `HALF_LIVES`, log-spaced."""
    low, high = (math.log(tokens) for tokens in HALF_LIVES)
    return gate_bias(torch.linspace(low, high, K).exp(), gate, LOWER_BOUND)


def forward(inputs: Inputs, gate: Any, impl: Any) -> Tensor:
    with torch.no_grad():
        return kda(*inputs.arguments(), gate=gate, lower_bound=LOWER_BOUND, impl=impl)[0]


def forward_backward(inputs: Inputs, gate: Any, impl: Any) -> tuple[Tensor, ...]:
    """The gradients of all seven arguments."""
    leaves = [x.detach().requires_grad_() for x in inputs.arguments()]
    o, _ = kda(*leaves, gate=gate, lower_bound=LOWER_BOUND, impl=impl)
    grads: tuple[Tensor, ...] = torch.autograd.grad(o, leaves, inputs.do)
    return grads


def decode(inputs: Inputs, gate: Any, impl: Any) -> Tensor:
    """The first token of each sequence; the state is updated in place."""
    return kda_step(
        inputs.q[:, 0],
        inputs.k[:, 0],
        inputs.v[:, 0],
        inputs.g[:, 0],
        inputs.beta[:, 0],
        inputs.A_log,
        inputs.dt_bias,
        inputs.state,
        gate=gate,
        lower_bound=LOWER_BOUND,
        impl=impl,
    )


def rms_ratios(inputs: Inputs, gate: Any, impl: Any, *, backward: bool) -> tuple[dict[str, float], dict[str, str]]:
    """RMS of (value - exact) / RMS of exact, for each result; and why a part of them is missing.

    exact: the chunkwise reference on the same inputs in float64. Parts: forward (o, state), backward (d...), decode.
    """
    exact = inputs.map(Tensor.double)
    parts: dict[str, Callable[[Inputs, Any], dict[str, Tensor]]] = {"forward": _outputs, "decode": _stepped}
    if backward:
        parts["backward"] = _gradients
    ratios: dict[str, float] = {}
    failures: dict[str, str] = {}
    for part, results in parts.items():
        try:
            found = results(inputs, (gate, impl))
            wanted = results(exact, (gate, "reference"))
            ratios |= {name: _ratio(name, found[name], wanted[name]) for name in wanted}
        except Exception as error:  # a kernel's compiler, the allocator and the driver each raise types of their own
            failures[part] = failure(error)
    return ratios, failures


def _ratio(name: str, value: Tensor, exact: Tensor) -> float:
    ratio = float((value.double() - exact).norm() / exact.norm())
    if not math.isfinite(ratio):
        raise ValueError(f"{name} is not finite")
    return ratio


def _outputs(inputs: Inputs, how: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        o, state = _whole(inputs.arguments(), inputs.state, how)
    return {"o": o, "state": state}


def _gradients(inputs: Inputs, how: Any) -> dict[str, Tensor]:
    leaves = [x.detach().requires_grad_() for x in (*inputs.arguments(), inputs.state)]
    o, state = _whole(tuple(leaves[:-1]), leaves[-1], how)
    # The final state's gradient: the initial state's values will do, they are random too.
    grads = torch.autograd.grad((o, state), leaves, (inputs.do, inputs.state))
    names = ("dq", "dk", "dv", "dg", "dbeta", "dA_log", "ddt_bias", "dinitial_state")
    return dict(zip(names, grads, strict=True))


def _whole(arguments: tuple[Tensor, ...], state: Tensor, how: Any) -> tuple[Tensor, Tensor]:
    gate, impl = how
    o, final = kda(
        *arguments,
        gate=gate,
        lower_bound=LOWER_BOUND,
        initial_state=state,
        output_final_state=True,
        impl=impl,
    )
    assert final is not None
    return o, final


def _stepped(inputs: Inputs, how: Any) -> dict[str, Tensor]:
    state = inputs.state.clone()
    o = decode(replace(inputs, state=state), *how)
    return {"step_o": o, "step_state": state}
