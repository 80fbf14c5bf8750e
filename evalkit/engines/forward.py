"""One pass of a transformers model: float32 logits at the asked positions alone.

The output head runs in float32: a bfloat16 head rounds logits so coarsely that 2 to 12 % of four-way items tie.
"""

import contextlib
import inspect
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class Forward:
    """Calls ``model``; its head is changed during a call only."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        accepted = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in accepted
        self.cache_name = next((name for name in ("cache", "past_key_values") if name in accepted), "")
        """transformers' name for the cache: past_key_values in 5.17, cache in 5.24. Empty: the model takes none."""
        self._keeps_logits = "logits_to_keep" in accepted
        self._head: tuple[Tensor, Tensor | None] | None = None
        """The output head's weight and bias in float32, made once."""

    @property
    def head_dtype(self) -> str:
        """What the output head computes in: float32, but for a wrapped or quantised head, which keeps its own."""
        head = self._output_head()
        return "float32" if _plain_linear(head) else f"as in {type(head).__name__}"

    def __call__(
        self,
        ids: Tensor,
        picks: tuple[Sequence[int], Sequence[int]] | None,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Float32 logits [picks, vocabulary] after the tokens at ``picks`` (rows, columns) of ids [B, T]; without
        picks [B, vocabulary], after the last column. ``cache`` grows by T columns; mask as the model takes it.
        """
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": cache is not None}
        if positions is not None and self.takes_positions:
            inputs["position_ids"] = positions
        if cache is not None:
            inputs[self.cache_name] = cache
        if picks is None:
            if self._keeps_logits:
                inputs["logits_to_keep"] = 1
            with self.float32_head():
                return self.model(**inputs).logits[:, -1].float()
        rows, columns = (torch.tensor(list(one), dtype=torch.long, device=self.device) for one in picks)
        if _plain_linear(self._output_head()):
            with self.float32_head((rows, columns)):
                return self.model(**inputs).logits[0].float()
        if self._keeps_logits:
            kept, columns = columns.unique(return_inverse=True)
            inputs["logits_to_keep"] = kept
        logits = self.model(**inputs).logits
        return logits[rows.to(logits.device), columns.to(logits.device)].float()

    def _output_head(self) -> Any:
        return self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None

    @contextlib.contextmanager
    def float32_head(self, picks: tuple[Tensor, Tensor] | None = None) -> Iterator[None]:
        """Run the output head in float32, at ``picks`` alone (as one row), keeping what the model does behind it (soft
        caps, scaling)."""
        head: Any = self._output_head()
        if not _plain_linear(head):
            yield
            return
        if self._head is None:
            self._head = (head.weight.float(), None if head.bias is None else head.bias.float())
        weight, bias = self._head

        def forward(hidden: Tensor) -> Tensor:
            if picks is not None:
                rows, columns = (one.to(hidden.device) for one in picks)
                hidden = hidden[rows, columns][None]
            return F.linear(hidden.float(), weight, bias)

        head.forward = forward
        try:
            yield
        finally:
            del head.forward


def logprobs(logits: Tensor, wanted: Sequence[Collection[int]]) -> list[dict[int, float]]:
    """For each row of ``logits`` [n, vocabulary] the log-probability of each token ``wanted`` of it (nats)."""
    out: list[dict[int, float]] = []
    # A full-vocabulary copy of all rows would double the memory; on a GPU few rows would be nothing but launches.
    step = 32 if logits.device.type == "cpu" else max(32, 2**26 // logits.shape[-1])
    for start in range(0, len(logits), step):
        # logsumexp would be nearer to float64 by some 1e-5 nats a token, but sums agree with lm-eval's this way.
        rows = logits[start : start + step].log_softmax(-1)
        asked = wanted[start : start + step]
        at = [(r, token) for r, tokens in enumerate(asked) for token in tokens]
        index = torch.tensor(at, dtype=torch.long, device=rows.device).view(-1, 2)
        values = iter(rows[index[:, 0], index[:, 1]].tolist())
        out += [{token: next(values) for token in tokens} for tokens in asked]
    return out


def _plain_linear(head: Any) -> bool:
    """A linear layer that nothing wraps, patches or quantises."""
    linear = torch.nn.Linear
    own = isinstance(head, linear) and type(head).forward is linear.forward and "forward" not in vars(head)
    # torchao's packed weights call themselves floating-point.
    return own and bool(head.weight.is_floating_point()) and not is_traceable_wrapper_subclass(head.weight)
