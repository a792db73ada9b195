"""backend="triton" where it cannot run: it says why, and aten works. In other processes, since this
one decided at import."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PRELUDE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
"""

CHECKS = """
import torch, fused_lora
from fused_lora import FusedLoRALinear, lora_linear, reference

torch.manual_seed(0)
for backend in ("auto", "aten"):
    layer = FusedLoRALinear(33, 50, r=3, init_lora_weights=False, backend=backend)
    x = torch.randn(7, 33)
    tensors = layer.weight, layer.lora_A, layer.lora_B, layer.bias
    y = layer(x)
    torch.testing.assert_close(y, reference.lora_linear(x, *tensors, scaling=layer.scaling))
    y.sum().backward()
    assert layer.lora_A.grad.any() and layer.lora_B.grad.any()
    assert "aten, 3 library products" in fused_lora.explain(layer)
layer = FusedLoRALinear(33, 50, r=3, backend="triton", lora_dropout=0.5)
state = torch.get_rng_state()
for call in (lambda: layer(x), lambda: lora_linear(x, *tensors, backend="triton")):
    try:
        call()
    except RuntimeError as error:
        print("RAISED", error)
assert "backend='triton' cannot run: " in fused_lora.explain(layer)
assert torch.equal(torch.get_rng_state(), state)
"""


@pytest.mark.parametrize(
    "prelude, reason, remedy",
    [
        pytest.param(
            "",
            "x is on cpu, the kernels run on a GPU",
            "move the layer there, or use backend='aten' (for tests, TRITON_INTERPRET=1",
            id="no GPU",
        ),
        pytest.param(
            PRELUDE + "sys.meta_path.insert(0, Blocked())",
            "triton 3.6 or newer cannot be imported (No module named 'triton')",
            "install it (`pip install 'triton>=3.6'`, Linux only), or use backend='aten'",
            id="no triton",
        ),
        pytest.param(
            "import triton\ndel triton.knobs",
            "triton 3.6 or newer cannot be imported (module 'triton' has no attribute 'knobs')",
            "or use backend='aten'",
            id="a triton that lacks what the kernels use",
        ),
    ],
)
def test_triton_where_it_cannot_run_says_why_and_aten_works(prelude, reason, remedy):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-c", prelude + CHECKS],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    raised = [line for line in process.stdout.splitlines() if line.startswith("RAISED")]
    assert len(raised) == 2
    for line in raised:
        assert f"backend='triton' cannot run: {reason}" in line and remedy in line
