"""The losses of distillation, each from whole logits and one number a token: definitions, and the oracle of the rest.

distill/chunked.py computes the same from hidden states without ever holding [tokens, V] logits; training uses that.

V is the size of the vocabulary. Teacher and student logits are [..., V], any float dtype; a loss is [...], in nats and
float32 (float64 where an input is float64). p and q are the teacher's and the student's softmax of logits /
temperature. A loss between them is multiplied by temperature^2, so that its gradient keeps its size at any temperature
(Hinton et al., arXiv:1503.02531, section 2). Logits are finite: NaN makes a token's loss NaN, and so does infinity in
a loss between two distributions.
"""

import difflib
import math

import torch
from torch import Tensor

from models.kda.reference import compute_dtype, l2norm

LOSSES = ("forward-kl", "reverse-kl", "jensen-shannon", "top-k-kl", "kl-ce", "ce")
"""The losses on logits, as stages name them."""
WITH_TEACHER = ("forward-kl", "reverse-kl", "jensen-shannon", "top-k-kl", "kl-ce")
WITH_TARGETS = ("kl-ce", "ce")


def token_loss(
    name: str,
    teacher_logits: Tensor | None,
    student_logits: Tensor,
    targets: Tensor | None = None,
    *,
    temperature: float = 1.0,
    alpha: float = 0.0,
    beta: float = 0.5,
    k: int = 64,
) -> Tensor:
    """The loss that a stage calls ``name``, with the stage's options; each loss takes those that it knows."""
    check_loss(name, teacher_logits is not None, targets is not None)
    if name == "ce":
        assert targets is not None
        return cross_entropy(student_logits, targets)
    assert teacher_logits is not None
    if name == "forward-kl":
        return forward_kl(teacher_logits, student_logits, temperature=temperature)
    if name == "reverse-kl":
        return reverse_kl(teacher_logits, student_logits, temperature=temperature)
    if name == "jensen-shannon":
        return jensen_shannon(teacher_logits, student_logits, temperature=temperature, beta=beta)
    if name == "top-k-kl":
        return top_k_kl(teacher_logits, student_logits, temperature=temperature, k=k)
    assert targets is not None
    return kl_ce(teacher_logits, student_logits, targets, temperature=temperature, alpha=alpha)


def forward_kl(teacher_logits: Tensor, student_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """T^2 KL(p || q) = T^2 sum p (log p - log q): the student covers all that the teacher finds likely.

    Hinton et al., arXiv:1503.02531, less the teacher's entropy, which has no gradient.
    """
    log_p, log_q = _log_probs(teacher_logits, student_logits, temperature)
    return temperature**2 * _kl(log_p, log_q)


def reverse_kl(teacher_logits: Tensor, student_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """T^2 KL(q || p) = T^2 sum q (log q - log p): the student keeps to what the teacher finds likely.

    The divergence of MiniLLM (Gu et al., arXiv:2306.08543), there over the student's own samples of whole answers;
    here token by token, after a given text.
    """
    log_p, log_q = _log_probs(teacher_logits, student_logits, temperature)
    return temperature**2 * _kl(log_q, log_p)


def jensen_shannon(
    teacher_logits: Tensor, student_logits: Tensor, *, temperature: float = 1.0, beta: float = 0.5
) -> Tensor:
    """T^2 (beta KL(p || m) + (1 - beta) KL(q || m)), where m = beta p + (1 - beta) q; 0 < beta < 1.

    The generalised Jensen-Shannon divergence of GKD (Agarwal et al., arXiv:2306.13649). At most T^2 ln 2 at beta 0.5.
    Divided by beta it tends to the forward KL as beta tends to 0, divided by 1 - beta to the reverse KL at 1: a small
    beta also asks for a larger learning rate.
    """
    check_options(beta=beta)
    log_p, log_q = _log_probs(teacher_logits, student_logits, temperature)
    # In logarithms: of a token that both find impossible m is 0 in float32, and its logarithm is not.
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return temperature**2 * (beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m))


def top_k_kl(teacher_logits: Tensor, student_logits: Tensor, *, temperature: float = 1.0, k: int = 64) -> Tensor:
    """T^2 KL(P || Q) over k + 1 bins: the teacher's k likeliest tokens, and all other tokens together.

    1 <= k <= V; at k = V there are no other tokens, and this is `forward_kl`. Otherwise it is no more than that, since
    merging tokens never adds to a divergence. Dropping the rest instead of binning it biases the student towards the
    k tokens (Anshumann et al., arXiv:2503.16870).
    """
    check_options(k=k, vocabulary=teacher_logits.shape[-1])
    log_p, log_q = _log_probs(teacher_logits, student_logits, temperature)
    top = log_p.detach().topk(k, -1).indices
    return temperature**2 * _kl(bins(log_p, top), bins(log_q, top))


def cross_entropy(student_logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(student logits)[target], at temperature 1; targets: [...] int64 from 0 to V - 1."""
    if targets.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}: expected {list(student_logits.shape[:-1])}, "
            f"student_logits' shape without V"
        )
    return -_wide(student_logits).log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def kl_ce(
    teacher_logits: Tensor, student_logits: Tensor, targets: Tensor, *, temperature: float = 1.0, alpha: float = 0.0
) -> Tensor:
    """forward_kl + alpha cross_entropy; the latter at temperature 1 (arXiv:1503.02531, section 2). alpha >= 0."""
    check_options(alpha=alpha)
    kl = forward_kl(teacher_logits, student_logits, temperature=temperature)
    return kl + alpha * cross_entropy(student_logits, targets)


def hidden_alignment(student: Tensor, teacher: Tensor) -> Tensor:
    """||student - teacher||_2 / sqrt(d): the RMS difference of two layers' mixer outputs [..., d]; [...], no unit.

    GenDistill, arXiv:2603.26556; hidden-state alignment of MOHAWK (Li et al., arXiv:2408.10189). Where both are equal
    the gradient is 0.
    """
    _check_same("student", student, "teacher", teacher)
    return torch.linalg.vector_norm(_wide(student) - _wide(teacher), dim=-1) / math.sqrt(student.shape[-1])


def qk_alignment(student: Tensor, teacher: Tensor) -> Tensor:
    """||s/|s| - t/|t|||^2 = 2 - 2 cos(s, t) a head, of queries or keys s, t [..., H, K]; [..., H], 0 to 4, no unit.

    GenDistill, arXiv:2603.26556. Vectors are normalised as KDA normalises them, with an eps under the root: a zero
    vector stays zero and has a finite gradient.
    """
    _check_same("student", student, "teacher", teacher)
    return (l2norm(student) - l2norm(teacher)).square().sum(-1)


def bins(log_probs: Tensor, top: Tensor) -> Tensor:
    """Log-probabilities [..., V] -> those of the tokens ``top`` [..., k], then of all others together, if any."""
    chosen = log_probs.gather(-1, top)
    if top.shape[-1] == log_probs.shape[-1]:
        return chosen
    # Not 1 - sum of the chosen: a sharp teacher's rest is below float32's step at 1, and would be noise.
    others = log_probs.scatter(-1, top, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([chosen, others], -1)


def check_loss(name: str, teacher: bool, targets: bool) -> None:
    """ValueError for an unknown loss, or one whose inputs are missing."""
    if name not in LOSSES:
        near = difflib.get_close_matches(name, LOSSES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? Expected" if near else "expected"
        raise ValueError(f"unknown loss {name!r}: {hint} one of {', '.join(LOSSES)}")
    if name in WITH_TEACHER and not teacher:
        raise ValueError(f"the teacher is None: {name} compares the student with one")
    if name in WITH_TARGETS and not targets:
        raise ValueError(f"targets is None: {name} needs the ids of the right tokens")


def check_options(
    *, temperature: float = 1.0, alpha: float = 0.0, beta: float = 0.5, k: int = 1, vocabulary: int | None = None
) -> None:
    """ValueError for an option outside its range."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: expected a finite number above 0")
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha is {alpha}: expected a finite weight of the cross-entropy, 0 or more")
    if not 0 < beta < 1:
        raise ValueError(f"beta is {beta}: expected the teacher's weight in the mixture, above 0 and below 1")
    if k < 1 or (vocabulary is not None and k > vocabulary):
        most = "" if vocabulary is None else f", at most the vocabulary's {vocabulary:,}"
        raise ValueError(f"k is {k}: expected a number of tokens, 1 or more{most}")


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _log_probs(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    check_options(temperature=temperature)
    _check_same("teacher_logits", teacher_logits, "student_logits", student_logits)
    log_p, log_q = ((_wide(x) / temperature).log_softmax(-1) for x in (teacher_logits, student_logits))
    return log_p, log_q


def _check_same(name: str, x: Tensor, other: str, y: Tensor) -> None:
    if x.shape != y.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, {other} {tuple(y.shape)}: expected the same")


def _wide(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x))
