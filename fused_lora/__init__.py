"""fused-lora: unmerged LoRA layers at the cost of merged ones.

`lora_linear` is the function, `FusedLoRALinear` the layer, `reference` the specification in plain
PyTorch, `explain` says which path runs and why. `multi_lora_linear`, `MultiLoRALinear` and
`use_adapters` serve and train the adapters of an `AdapterPack` in one batch.
"""

from fused_lora import reference
from fused_lora.adapter_pack import AdapterPack
from fused_lora.explain import explain
from fused_lora.functional import lora_linear
from fused_lora.linear import FusedLoRALinear
from fused_lora.multi import MultiLoRALinear, multi_lora_linear, use_adapters

__version__ = "0.1.0"

__all__ = [
    "AdapterPack",
    "FusedLoRALinear",
    "MultiLoRALinear",
    "__version__",
    "explain",
    "lora_linear",
    "multi_lora_linear",
    "reference",
    "use_adapters",
]
