"""The kernels of turnfast: functions of tensors, independent of trajectories."""

if __name__ == "kernels":
    # Python runs in the root of the repository, and transformers imports the Hugging Face package
    # of this name. A second copy of this package would register every operator again and replace
    # the first registration. So this copy is empty, with a version that transformers rejects.
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
