"""The kernels of turnfast: they know tensors, not trajectories."""

if __name__ == "kernels":
    # Python was started in the repository's root, and transformers looks for the Hugging Face
    # package of this name. A second copy of ours would register every operator anew and pull the
    # first one's from under it, so this copy stays empty, and too old for anyone to use.
    __version__ = "0.0.0"
    __all__ = []
else:
    from .loss_head import (
        LinearLogprobs,
        PolicyLoss,
        PolicyRule,
        PolicyStats,
        linear_logprobs,
        turn_policy_loss,
    )

    __all__ = [
        "LinearLogprobs",
        "PolicyLoss",
        "PolicyRule",
        "PolicyStats",
        "linear_logprobs",
        "turn_policy_loss",
    ]
