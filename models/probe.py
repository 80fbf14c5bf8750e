"""How near a student is to its teacher, layer by layer and at the end, on text that it was not calibrated on."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.convert import Report, watch

CHUNK = 128
"""Tokens whose logits are held at a time: over a vocabulary of 150,000 they are 75 MB a model."""


@torch.no_grad()  # type: ignore[untyped-decorator]
def probe(student: Any, teacher: Any, tokens: Tensor, report: Report | None = None) -> dict[str, Any]:
    """Compare ``student`` with ``teacher`` on ``tokens`` [B, T], ready for JSON:

    layers: for each KDA layer, its mixer's output against the teacher's attention's, both given the teacher's own
    hidden states, so that no layer answers for another: ``cosine`` (mean over tokens, -1 to 1) and ``relative_error``
    (norm of the difference by the norm of the teacher's). kl_nats: KL(teacher || student) of the next token, mean over
    tokens. top1_agreement: fraction of tokens where both find the same next token likeliest. tokens: how many.
    """
    kda_layers = student.config.kda_layers
    layers = []
    for done, seen in enumerate(watch(teacher, kda_layers, tokens), 1):
        kda = student.model.layers[seen.layer].kda
        output = kda(seen.hidden_states, position_embeddings=seen.position_embeddings)
        layers.append({"layer": seen.layer, **likeness(output, seen.output)})
        if report:
            report("probe", done, len(kda_layers))
    return {"layers": layers, **end_to_end(student, teacher, tokens), "tokens": tokens.numel()}


def likeness(output: Tensor, wanted: Tensor) -> dict[str, float]:
    """Cosine (mean over tokens) and relative error of ``output`` against ``wanted``, both [..., hidden]."""
    output, wanted = output.double(), wanted.double()
    return {
        "cosine": float(F.cosine_similarity(output, wanted, dim=-1).mean()),
        "relative_error": float((output - wanted).norm() / wanted.norm()),
    }


@torch.no_grad()  # type: ignore[untyped-decorator]
def end_to_end(student: Any, teacher: Any, tokens: Tensor) -> dict[str, float]:
    """kl_nats and top1_agreement of any two models with one vocabulary on ``tokens`` [B, T]; see `probe`."""
    divergence, agreed = 0.0, 0
    for row in tokens.to(teacher.device):
        hidden = [model.model(row[None], use_cache=False).last_hidden_state[0] for model in (teacher, student)]
        for start in range(0, len(row), CHUNK):
            logits = [
                model.get_output_embeddings()(one[start : start + CHUNK]).float()
                for model, one in zip((teacher, student), hidden, strict=True)
            ]
            p, q = (F.log_softmax(one, -1) for one in logits)
            divergence += float(F.kl_div(q, p, log_target=True, reduction="sum"))
            agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
    return {"kl_nats": divergence / tokens.numel(), "top1_agreement": agreed / tokens.numel()}
