"""Triton kernels of fused-lora, their launch parameters and the choice of those. Imports nothing
from the rest of the library. Installed as `fused_lora.kernels`, never as a top-level package."""
