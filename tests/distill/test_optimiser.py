"""The schedule against closed forms, and the masters against torch's AdamW in float64."""

import math

import pytest
import torch
from torch import nn

from distill.optimiser import Masters, schedule
from distill.parallel import Processes
from distill.stage import Stage


def stage(**options: object) -> Stage:
    given = {"name": "s", "loss": "ce", "train": ("all",), "data": "d", "tokens": 1, "seq_len": 8, "batch": 1, "lr": 1.0}
    return Stage.model_validate({**given, **options})


def test_cosine_begins_at_the_peak_after_its_warm_up_and_falls_to_final_lr() -> None:
    s = stage(schedule="cosine", warmup=0.1, final_lr=0.2)
    found = [schedule(s, step, 100) for step in range(101)]
    assert found[:10] == [pytest.approx((step + 1) / 10) for step in range(10)]
    assert found[10] == 1.0 and found[100] == pytest.approx(0.2)
    assert found[55] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 2)) / 2)
    assert all(a >= b for a, b in zip(found[10:], found[11:], strict=False))


def test_wsd_warms_up_stays_and_falls_in_a_line() -> None:
    s = stage(schedule="wsd", warmup=0.1, decay=0.2, final_lr=0.02)
    found = [schedule(s, step, 100) for step in range(101)]
    assert set(found[9:81]) == {1.0}
    assert found[90] == pytest.approx(0.51) and found[100] == pytest.approx(0.02)


def test_constant_stays() -> None:
    assert {schedule(stage(schedule="constant"), step, 7) for step in range(7)} == {1.0}


def model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    return made.to(dtype)


def gradient(made: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in made.parameters():
        parameter.grad = torch.randn_like(parameter)


def test_masters_step_as_torch_s_adamw_does_with_clipping() -> None:
    s = stage(lr=1e-2, weight_decay=0.1, clip=0.5, schedule="cosine", warmup=0.5)
    ours, theirs = model(torch.float32), model(torch.float64)
    masters = Masters(dict(ours.named_parameters()), s, ())
    decay = [p for p in theirs.parameters() if p.ndim == 2]
    rest = [p for p in theirs.parameters() if p.ndim != 2]
    adamw = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-2, betas=s.betas
    )
    for step in range(8):
        gradient(ours, step)
        for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
            p.grad = q.grad.double() if q.grad is not None else None
        masters.collect(first=True)
        masters.step(step, 8, Processes())
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for group in adamw.param_groups:
            group["lr"] = 1e-2 * schedule(s, step, 8)
        adamw.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-5, atol=1e-6)


def test_small_updates_are_not_lost_to_bfloat16() -> None:
    made = model(torch.bfloat16)
    before = [p.detach().clone() for p in made.parameters()]
    masters = Masters(dict(made.named_parameters()), stage(lr=1e-5, clip=1e9, schedule="constant"), ())
    for _ in range(300):
        for p in made.parameters():
            p.grad = torch.ones_like(p)
        masters.collect(first=True)
        masters.step(0, 300, Processes())
    # 300 steps of 1e-5 are 3e-3, while one step is below half a unit in the last place of most weights.
    for p, old in zip(made.parameters(), before, strict=True):
        torch.testing.assert_close(p.float(), old.float() - 3e-3, rtol=0.005, atol=2e-4)


def test_gradients_of_micro_batches_are_added_in_float32() -> None:
    made = model(torch.bfloat16)
    masters = Masters(dict(made.named_parameters()), stage(), ())
    for at, value in enumerate((1.0, *[2**-9] * 64)):  # in bfloat16 1 + 2^-9 is 1
        for p in made.parameters():
            p.grad = torch.full_like(p, value)
        masters.collect(first=at == 0)
    assert set(masters.gradients.tolist()) == {1.0 + 64 * 2**-9}
    assert all(p.grad is None for p in made.parameters())


def test_a_state_goes_on_bit_for_bit() -> None:
    def run(cut: int | None) -> list[torch.Tensor]:
        made = model(torch.bfloat16)
        masters = Masters(dict(made.named_parameters()), stage(lr=1e-2), ())
        for step in range(6):
            if step == cut:
                kept = {name: value.clone() if hasattr(value, "clone") else value for name, value in masters.state_dict().items()}
                made = model(torch.bfloat16)
                masters = Masters(dict(made.named_parameters()), stage(lr=1e-2), ())
                masters.load_state_dict(kept)
            gradient(made, step)
            masters.collect(first=True)
            masters.step(step, 6, Processes())
        return [p.detach().clone() for p in made.parameters()]

    for a, b in zip(run(None), run(3), strict=True):
        assert torch.equal(a, b)
