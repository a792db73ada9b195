"""PEFT's bitsandbytes layers with a fused forward. Imported by `peft`, and by unpickling, where
PEFT's own module for them is: never the first to import bitsandbytes."""

from __future__ import annotations

import bitsandbytes
from peft.tuners.lora import bnb as lora_bnb

from fused_lora.integrations.peft import FRESH_BASES, Fused, register


class FusedLinear4bit(Fused, lora_bnb.Linear4bit):
    """PEFT clones what its base returned, since writing to a view could fail in backward. Here the
    term goes in place where that is no view, else into a copy."""

    peft_class = lora_bnb.Linear4bit
    keeps_dtype = True


class FusedLinear8bitLt(Fused, lora_bnb.Linear8bitLt):
    peft_class = lora_bnb.Linear8bitLt
    keeps_dtype = True


bases = bitsandbytes.nn
FRESH_BASES.update({bases.Linear4bit, bases.LinearNF4, bases.LinearFP4, bases.Linear8bitLt})
register(FusedLinear4bit, FusedLinear8bitLt)
