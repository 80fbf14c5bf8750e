"""One token at a time, the state updated in place: n steps are the last n tokens of the whole."""

import pytest
import torch

from models.kda import PAD_LOGIT, kda_step
from tests.models.kda.oracles import (
    GATES,
    GROUPED,
    OVERFLOW_TO_A_LIMIT,
    PLAIN,
    TOKENWISE,
    Subject,
    Tensors,
    assert_near,
    draw,
    exact,
    tokens,
)
from tests.models.kda.properties import check_steps_equal_the_whole

pytestmark = OVERFLOW_TO_A_LIMIT


def one_token(x: Tensors) -> Tensors:
    """The arguments of a step: the first token of each sequence, and the state in place of the initial one."""
    x = {name: t[:, 0] if name in TOKENWISE else t for name, t in x.items()}
    x["state"] = x.pop("initial_state").clone()
    return x


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shape", [GROUPED, PLAIN], ids=["grouped", "plain"])
def test_steps_equal_the_whole(subject: Subject, gate: str, shape: dict[str, int]) -> None:
    check_steps_equal_the_whole(subject, draw(subject, 24, **shape), gate, 7)


def test_a_step_of_strided_inputs(subject: Subject) -> None:
    """As a fused projection leaves them: cut out of one wide row, its heads outermost, or expanded."""
    x = one_token(draw(subject, 1, **{**GROUPED, "B": 3}))
    y = {
        **x,
        "q": torch.cat([x["q"], x["q"]], 1)[:, : x["q"].shape[1]],
        "k": x["k"].transpose(0, 1).contiguous().transpose(0, 1),
        "v": torch.stack([x["v"], x["v"]], -1)[..., 0],
        "g": x["g"][:1].expand_as(x["g"]),
        "beta": x["beta"][:, :1].expand_as(x["beta"]),
        "dt_bias": x["dt_bias"].T.contiguous().T,
        "state": x["state"].clone(),
    }
    plain = {name: t.contiguous() for name, t in y.items()}
    plain["state"] = x["state"].clone()
    assert not any(y[name].is_contiguous() for name in (*TOKENWISE, "dt_bias"))
    assert torch.equal(kda_step(**y, impl=subject.impl), kda_step(**plain, impl=subject.impl))  # type: ignore[arg-type]
    assert torch.equal(y["state"], plain["state"])


def test_a_step_of_other_scale_and_lower_bound(subject: Subject) -> None:
    x = draw(subject, 1, **GROUPED)
    for options in ({"scale": 0.7}, {"lower_bound": -1.5}):
        one = one_token(x)
        o = kda_step(**one, impl=subject.impl, **options)  # type: ignore[arg-type]
        found = {"o": o[:, None], "state": one["state"]}
        assert_near(subject, found, exact(subject, tokens(x, 0, 1), **options), str(options))


def test_a_step_of_padding_leaves_the_state_bitwise_as_it_was(subject: Subject) -> None:
    x = one_token(draw(subject, 1, **GROUPED))
    x |= {name: torch.full_like(x[name], PAD_LOGIT) for name in ("g", "beta")}
    before = x["state"].clone()
    kda_step(**x, impl=subject.impl)  # type: ignore[arg-type]
    assert torch.equal(x["state"], before)


def test_a_step_keeps_no_graph_and_changes_only_the_state(subject: Subject) -> None:
    x = one_token(draw(subject, 1, **GROUPED))
    before = {name: t.clone() for name, t in x.items() if name != "state"}
    x = {name: t if name == "state" else t.requires_grad_() for name, t in x.items()}
    assert not kda_step(**x, impl=subject.impl).requires_grad  # type: ignore[arg-type]
    assert not x["state"].requires_grad
    for name, t in before.items():
        assert torch.equal(x[name], t), name


def test_three_steps_are_bitwise_equal(subject: Subject) -> None:
    runs = [one_token(draw(subject, 1, **PLAIN)) for _ in range(3)]
    outputs = [kda_step(**x, impl=subject.impl) for x in runs]  # type: ignore[arg-type]
    for o, x in zip(outputs, runs, strict=True):
        assert torch.equal(o, outputs[0])
        assert torch.equal(x["state"], runs[0]["state"])


def test_a_state_that_is_not_contiguous_is_refused(subject: Subject) -> None:
    x = one_token(draw(subject, 1, **GROUPED))
    x["state"] = x["state"].mT.contiguous().mT
    with pytest.raises(ValueError, match=r"^state is not contiguous.*state\.contiguous\(\)"):
        kda_step(**x, impl=subject.impl)  # type: ignore[arg-type]
