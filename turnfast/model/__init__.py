"""Any Hugging Face causal language model, run over packed rows up to its last hidden state.

The model keeps its own code. Attention enters through transformers' attention interface: with row
boundaries the kernels' packed attention answers, without them (generation, probes) transformers'
own SDPA does, so one module serves both. Logits are never made here; the loss head takes the hidden
states and the head's weight. Whether that gives the model's own log-probs is asked once, when a
model is loaded.
"""

from .architecture import attention_backends, refuse_long_context, refuse_unsupported
from .attention import ATTENTION
from .device import default_tolerance, dtype_of, pick_device
from .load import load_policy
from .policy import Policy, hidden_states, sparse_embedding

__all__ = [
    "ATTENTION",
    "Policy",
    "attention_backends",
    "default_tolerance",
    "dtype_of",
    "hidden_states",
    "load_policy",
    "pick_device",
    "refuse_long_context",
    "refuse_unsupported",
    "sparse_embedding",
]
