"""Run any Hugging Face causal language model over packed rows, up to its last hidden states.

The model keeps its own code. Attention is replaced through transformers' attention interface: with
row boundaries it is the kernels' packed attention, without them (generation, probes) transformers'
SDPA. No logits are computed here; the loss head takes hidden states and the head's weight. Loading
a model checks once that this gives the model's own log-probs.
"""

from .architecture import attention_backends, check_context_length, check_modules
from .attention import ATTENTION
from .device import default_tolerance, dtype_of, pick_device
from .load import load_policy
from .policy import Policy, hidden_states, sparse_embedding

__all__ = [
    "ATTENTION",
    "Policy",
    "attention_backends",
    "check_context_length",
    "check_modules",
    "default_tolerance",
    "dtype_of",
    "hidden_states",
    "load_policy",
    "pick_device",
    "sparse_embedding",
]
