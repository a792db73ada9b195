"""fused-lora: unmerged LoRA layers at the cost of merged ones.

`lora_linear` is the function, `FusedLoRALinear` the layer, `reference` the specification in plain
PyTorch, `explain` says which path runs and why.
"""

from fused_lora import reference
from fused_lora.explain import explain
from fused_lora.functional import lora_linear
from fused_lora.linear import FusedLoRALinear

__version__ = "0.1.0"

__all__ = ["FusedLoRALinear", "__version__", "explain", "lora_linear", "reference"]
