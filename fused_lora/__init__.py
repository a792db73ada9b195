"""fused-lora: unmerged LoRA layers at the cost of merged ones.

`lora_linear` is the function, `FusedLoRALinear` the layer, `apply_lora` puts layers into a model,
`reference` is the specification in plain PyTorch, `explain` says which path runs and why.
`multi_lora_linear`, `MultiLoRALinear` and `use_adapters` serve and train the adapters of an
`AdapterPack` in one batch; `apply_lora(adapters=...)` puts such layers into a model.
"""

from fused_lora import reference
from fused_lora.adapter_io import load_adapter, save_adapter
from fused_lora.adapter_pack import AdapterPack
from fused_lora.explain import explain
from fused_lora.export import export_adapter
from fused_lora.functional import lora_linear
from fused_lora.linear import FusedLoRALinear
from fused_lora.model import (
    apply_lora,
    disable_adapters,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merge_adapter,
    trainable_parameters,
    unload,
    unmerge_adapter,
)
from fused_lora.multi import MultiLoRALinear, multi_lora_linear, use_adapters
from fused_lora.packs import add_adapter, delete_adapter
from fused_lora.quantized import QuantizedLoRALinear

__version__ = "0.1.0"

__all__ = [
    "AdapterPack",
    "FusedLoRALinear",
    "MultiLoRALinear",
    "QuantizedLoRALinear",
    "__version__",
    "add_adapter",
    "apply_lora",
    "delete_adapter",
    "disable_adapters",
    "explain",
    "export_adapter",
    "load_adapter",
    "lora_linear",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merge_adapter",
    "multi_lora_linear",
    "reference",
    "save_adapter",
    "trainable_parameters",
    "unload",
    "unmerge_adapter",
    "use_adapters",
]
