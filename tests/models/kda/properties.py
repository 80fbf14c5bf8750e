"""KDA's properties, each written once: `test_kda.py` asks them of every implementation on small inputs, and
`test_kda_cuda.py` of the kernels at full size on a GPU."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.kda import PAD_LOGIT, kda_step
from tests.models.kda.oracles import (
    Subject,
    Tensors,
    assert_bitwise,
    assert_near,
    cotangents,
    draw,
    exact,
    only_row,
    pad,
    run,
    tokens,
)


def check_equals_the_oracle(subject: Subject, x: Tensors, gate: str, *, gradients: Sequence[str] = ()) -> None:
    found = run(subject.impl, x, gate=gate, gradients=gradients)
    assert_near(subject, found, exact(subject, x, gate=gate, gradients=gradients))


def check_split_with_carried_state(subject: Subject, x: Tensors, gate: str, cuts: Sequence[int]) -> None:
    """Cut into pieces, each beginning with the state that the one before left: the whole."""
    carried, outputs = x, []
    for start, end in zip((0, *cuts), (*cuts, x["q"].shape[1]), strict=True):
        found = run(subject.impl, tokens(carried, start, end), gate=gate)
        outputs.append(found["o"])
        carried = {**x, "initial_state": found["state"]}
    pieces = {"o": torch.cat(outputs, 1), "state": found["state"]}
    assert_near(subject, pieces, exact(subject, x, gate=gate), f"split at {cuts}")


def check_packed_equals_a_loop(
    subject: Subject,
    x: Tensors,
    gate: str,
    lengths: Sequence[int],
    *,
    gradients: Sequence[str] = (),
    segments: int | None = None,
) -> None:
    """Sequences of these lengths packed into one row, against each one alone through the oracle."""
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    found = run(subject.impl, x, gate=gate, cu_seqlens=starts, gradients=gradients, segments=segments)
    alone = []
    do, dstate = cotangents(x)
    for n, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        part = only_row({**x, "initial_state": x["initial_state"][n : n + 1]}, 0, start, end)
        by = (do[:, start:end], dstate[n : n + 1])
        alone.append(exact(subject, part, gate=gate, gradients=gradients, by=by))
    assert_near(subject, found, joined(alone, 1), f"packed {list(lengths)}")


def joined(parts: Sequence[Tensors], tokens_dim: int) -> Tensors:
    """One result of several sequences': outputs and token gradients put together, states stacked, the rest summed."""
    whole = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name in ("state", "dinitial_state"):
            whole[name] = torch.cat(values)
        elif name in ("dA_log", "ddt_bias"):
            whole[name] = torch.stack(values).sum(0)
        else:
            whole[name] = torch.cat(values, tokens_dim)
    return whole


def check_padding_changes_nothing(
    subject: Subject, x: Tensors, gate: str, lengths: Sequence[int], *, gradients: Sequence[str] = ()
) -> None:
    """Rows of these lengths, padded on the left or the right to one length, against each row alone."""
    T = x["q"].shape[1]
    do, dstate = cotangents(x)
    for side in ("left", "right"):
        spans = [(T - n, T) if side == "left" else (0, n) for n in lengths]
        at = torch.arange(T, device=x["q"].device)
        is_pad = torch.stack([(at < start) | (at >= end) for start, end in spans])
        found = run(subject.impl, pad(x, is_pad), gate=gate, gradients=gradients)
        assert not found["o"][is_pad].any(), f"{side} padding reads 0"
        for name in {"dk", "dv", "dg", "dbeta"} & set(found):
            assert not found[name][is_pad].any(), f"{name} of {side} padding"
        for row, (start, end) in enumerate(spans):
            by = (do[row : row + 1, start:end], dstate[row : row + 1])
            alone = exact(subject, only_row(x, row, start, end), gate=gate, gradients=gradients, by=by)
            own = {
                name: value[row : row + 1] if name in ("state", "dinitial_state") else value[row : row + 1, start:end]
                for name, value in found.items()
                if name not in ("dA_log", "ddt_bias")
            }
            alone = {name: alone[name] for name in own}
            assert_near(subject, own, alone, f"{side}-padded row of {lengths[row]}")


def check_the_future_changes_nothing(subject: Subject, x: Tensors, gate: str, cuts: Sequence[int]) -> None:
    """Other, larger tokens from ``cut`` on leave the outputs before it bitwise the same; none at all, nearly so."""
    base = run(subject.impl, x, gate=gate)["o"]
    shape = {"B": x["q"].shape[0], "H": x["q"].shape[2], "K": x["q"].shape[3]}
    shape |= {"HK": x["v"].shape[2], "V": x["v"].shape[3]}
    other = draw(subject, x["q"].shape[1], seed=99, **shape)
    for cut in cuts:
        changed = {
            name: torch.cat([t[:, :cut], 10 * other[name][:, cut:]], 1) if t.ndim > 2 and name != "initial_state" else t
            for name, t in x.items()
        }
        assert torch.equal(run(subject.impl, changed, gate=gate)["o"][:, :cut], base[:, :cut]), (
            f"other tokens from {cut}"
        )
    cut = cuts[-1]
    prefix = run(subject.impl, tokens(x, 0, cut), gate=gate)["o"]
    assert_near(subject, {"o": prefix}, {"o": exact(subject, x, gate=gate)["o"][:, :cut]}, f"only {cut} tokens")


def check_runs_are_bitwise_equal(
    subject: Subject, x: Tensors, gate: str, *, gradients: Sequence[str] = (), segments: int | None = None
) -> None:
    first, *others = (run(subject.impl, x, gate=gate, gradients=gradients, segments=segments) for _ in range(3))
    for other in others:
        assert_bitwise(other, first, "from run to run")


def check_inputs_are_left_alone(subject: Subject, x: Tensors, gate: str, *, gradients: Sequence[str] = ()) -> None:
    """Not even written with the same value: autograd would refuse a backward through it."""
    before = {name: (t.clone(), t._version) for name, t in x.items()}
    run(subject.impl, x, gate=gate, gradients=gradients)
    for name, (value, version) in before.items():
        assert torch.equal(x[name], value), name
        assert x[name]._version == version, name


def strided(x: Tensors) -> Tensors:
    """The same values, none of them contiguous: transposed, cut out of wider tensors, every second one, expanded."""
    return {
        "q": x["q"].transpose(1, 2).contiguous().transpose(1, 2),
        "k": torch.cat([x["k"], x["k"] + 1], -1)[..., : x["k"].shape[-1]],
        "v": torch.stack([x["v"], x["v"] - 1], -1).flatten(-2)[..., ::2],
        "g": x["g"][:, :, :1].expand_as(x["g"]),
        "beta": x["beta"][:, :1].expand_as(x["beta"]),
        "A_log": torch.stack([x["A_log"], x["A_log"] + 1], -1)[:, 0],
        "dt_bias": x["dt_bias"][:1].expand_as(x["dt_bias"]),
        "initial_state": x["initial_state"].mT.contiguous().mT,
    }


def check_strides_do_not_matter(subject: Subject, x: Tensors, gate: str, *, gradients: Sequence[str] = ()) -> None:
    y = strided(x)
    assert not any(t.is_contiguous() for t in y.values())
    check_equals_the_oracle(subject, y, gate, gradients=gradients)


def check_steps_equal_the_whole(subject: Subject, x: Tensors, gate: str, steps: int) -> None:
    """The last ``steps`` tokens one by one, from the state that the others left, in a part of a larger buffer."""
    T = x["q"].shape[1]
    whole = exact(subject, x, gate=gate)
    start = run(subject.impl, tokens(x, 0, T - steps), gate=gate)["state"]
    pool = torch.full((len(start) + 2, *start.shape[1:]), 7.0, dtype=start.dtype, device=start.device)
    state = pool[1:-1]
    state.copy_(start)
    address, outputs = state.data_ptr(), []
    for t in range(T - steps, T):
        one = {name: part[:, 0] for name, part in tokens(x, t, t + 1).items() if name in ("q", "k", "v", "g", "beta")}
        gates = (x["A_log"], x["dt_bias"])
        outputs.append(kda_step(*one.values(), *gates, state, gate=gate, impl=subject.impl))  # type: ignore[arg-type]
    found = {"o": torch.stack(outputs, 1), "state": state}
    assert found["o"].dtype == x["v"].dtype
    assert state.data_ptr() == address
    assert (pool[0] == 7).all() and (pool[-1] == 7).all(), "rows beside the state"
    assert_near(subject, found, {"o": whole["o"][:, T - steps :], "state": whole["state"]}, f"after {steps} steps")


def _everywhere(name: str, value: float) -> Callable[[Tensors], Tensors]:
    return lambda x: {**x, name: torch.full_like(x[name], value)}


def _unbounded(x: Tensors) -> Tensors:
    """Log-decays of -50 at every token and channel."""
    return {**x, "g": torch.full_like(x["g"], 50.0), "A_log": x["A_log"] * 0, "dt_bias": x["dt_bias"] * 0}


def _unbounded_here_and_there(x: Tensors) -> Tensors:
    """Log-decays of -50 at some whole tokens and at some single channels, near 0 elsewhere."""
    g = torch.full_like(x["g"], -12.0)
    g[:, 2::7] = 50.0
    g[:, 15:17, :, ::3] = 50.0
    g[:, ::5, :, 1::4] = 50.0
    return {**x, "g": g, "A_log": x["A_log"] * 0, "dt_bias": x["dt_bias"] * 0}


def _nearly_equal_keys(x: Tensors) -> Tensors:
    """Keys within a percent of each other, all written with beta near 1: the triangular systems at their hardest."""
    k = x["k"][:, :1] + 0.01 * x["k"]
    return {**x, "k": k, "beta": torch.full_like(x["beta"], 6.0), "g": torch.full_like(x["g"], -12.0)}


def _zero_q_and_k(x: Tensors) -> Tensors:
    q, k = x["q"].clone(), x["k"].clone()
    q[:, ::3], k[:, 1::4], k[:, -1] = 0, 0, 0
    return {**x, "q": q, "k": k}


def _short_q_and_k(x: Tensors) -> Tensors:
    """Of a length about the square root of the norm's eps, and below."""
    return {**x, "q": 1e-4 * x["q"], "k": 3e-4 * x["k"]}


EXTREMES: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "g = 0 (bounded)": ("bounded", _everywhere("g", PAD_LOGIT)),
    "g = 0 (softplus)": ("softplus", _everywhere("g", PAD_LOGIT)),
    "g = -5, saturated": ("bounded", _everywhere("g", 1e3)),
    "g = -50": ("softplus", _unbounded),
    "g = -50 here and there": ("softplus", _unbounded_here_and_there),
    "A_log = 50, saturated": ("bounded", _everywhere("A_log", 50.0)),
    "beta = 0": ("bounded", _everywhere("beta", PAD_LOGIT)),
    "beta = 0 (logit -200)": ("softplus", _everywhere("beta", -200.0)),
    "beta = 1": ("bounded", _everywhere("beta", 200.0)),
    "nearly equal keys": ("softplus", _nearly_equal_keys),
    "zero q and k": ("bounded", _zero_q_and_k),
    "short q and k": ("bounded", _short_q_and_k),
}
"""Name -> the gate, and what it makes of ordinary inputs."""


def check_extreme(subject: Subject, x: Tensors, name: str, *, gradients: Sequence[str] = ()) -> None:
    """Values as the oracle's; gradients finite, and as the oracle's where these do not vanish."""
    gate, change = EXTREMES[name]
    x = change(x)
    found = run(subject.impl, x, gate=gate, gradients=gradients)
    expected = exact(subject, x, gate=gate, gradients=gradients)
    for quantity, value in found.items():
        assert value.isfinite().all(), f"{name}: {quantity} is not finite"
    told = {"o", "state"} | {f"d{n}" for n in gradients if _tells(expected, f"d{n}")}
    assert_near(subject, {n: found[n] for n in told}, {n: expected[n] for n in told}, name)
    for quantity in found.keys() - told:  # nothing, but for the rounding of what is something
        assert found[quantity].abs().max() <= 1e-4 * _largest(expected), f"{name}: {quantity} should vanish"


def _largest(expected: Tensors) -> float:
    return max(value.abs().max().item() for name, value in expected.items() if name.startswith("d"))


def _tells(expected: Tensors, name: str) -> bool:
    return bool(expected[name].abs().max() > 1e-9 * _largest(expected))


def check_later_write_wins(subject: Subject, x: Tensors) -> None:
    """All keys equal, nothing forgotten, beta = 1: each token replaces what the one before wrote. In closed form,
    S_t = S_0 + k (v_t - S_0^T k)^T, so o_t = scale (S_0^T q_t + (k . q_t) (v_t - S_0^T k))."""
    k = 1e4 * x["k"][:, :1].expand_as(x["k"])  # long, so that eps leaves its norm 1
    beta, g = torch.full_like(x["beta"], 200.0), torch.full_like(x["g"], PAD_LOGIT)
    x = {**x, "k": k, "beta": beta, "g": g}
    found = run(subject.impl, x, gate="bounded")

    groups = x["q"].shape[2] // k.shape[2]
    q, S = x["q"].double(), x["initial_state"].double()
    q = q / (q.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    key = torch.nn.functional.normalize(k.double(), dim=-1)[:, 0].repeat_interleave(groups, 1)  # [B, H, K]
    v = x["v"].double().repeat_interleave(groups, 2)
    held = torch.einsum("bhkv,bhk->bhv", S, key)
    new = v - held[:, None]
    o = torch.einsum("bhkv,bthk->bthv", S, q) + torch.einsum("bhk,bthk->bth", key, q)[..., None] * new
    state = S + key[..., None] * new[:, -1, :, None, :]
    assert_near(subject, found, {"o": o * q.shape[-1] ** -0.5, "state": state}, "duplicate keys")


def check_nothing_written(subject: Subject, x: Tensors, gate: str, log_decay: Tensor) -> None:
    """beta = 0, so the initial state only fades: o_t = scale (exp(G_t) S_0)^T q_t, G the sums of ``log_decay``
    [B, T, H, K], in float64."""
    x = {**x, "beta": torch.full_like(x["beta"], PAD_LOGIT)}
    found = run(subject.impl, x, gate=gate)
    q, S, G = x["q"].double(), x["initial_state"].double(), log_decay.cumsum(1)
    q = q / (q.square().sum(-1, keepdim=True) + 1e-6).sqrt() * q.shape[-1] ** -0.5
    o = torch.einsum("bhkv,bthk->bthv", S, q * G.exp())
    assert_near(subject, found, {"o": o, "state": S * G[:, -1].exp()[..., None]}, "beta = 0")
