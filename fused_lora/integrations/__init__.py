"""fused-lora inside other libraries. Each module here needs its library, and is imported by name:
`from fused_lora.integrations import peft`."""
