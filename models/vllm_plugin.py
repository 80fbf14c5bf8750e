"""What vLLM calls as it starts (entry point group vllm.general_plugins): Hybrid-KDA models become known to it."""


def register() -> None:
    """Tell vLLM, and the transformers that it reads configurations with, of HybridKDAForCausalLM."""
    from vllm import ModelRegistry

    import models.hybrid  # noqa: F401  (tells transformers)

    ModelRegistry.register_model("HybridKDAForCausalLM", "models.vllm_hybrid:HybridKDAForCausalLM")
