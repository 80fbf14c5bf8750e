"""Kimi Delta Attention (Kimi Linear, arXiv:2510.26692): `kda` over whole sequences, `kda_step` for one token."""

from models.kda.api import PAD_LOGIT, kda, kda_step

__all__ = ["PAD_LOGIT", "kda", "kda_step"]
