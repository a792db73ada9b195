"""The README's code runs as it stands, on small models in the place of its reader's."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fused_lora
from fused_lora import FusedLoRALinear

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.M | re.S)
SMALL = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 2, "intermediate_size": 24}


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval()


def classifier():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))


def saved(folder, model, **options):
    options = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear"} | options
    fused_lora.save_adapter(fused_lora.apply_lora(model, **options), folder)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = FusedLoRALinear(8, 12, r=2), FusedLoRALinear(12, 8, r=2)

    def forward(self, x):
        return self.down(self.up(x))


class Blocks(nn.Module):
    """With the names that the README's plans have."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])


def at_first(path):
    return {"model": llama()}


def one_layer(path):
    return {"model": llama().model.layers[0].self_attn}


def distributed(path):
    return {"model": Blocks(), "torch": torch}


def whole(path):
    saved(path / "task-b", classifier(), r=2)
    return {"model": classifier()}


def many(path):
    for name in ("french", "code"):
        saved(path / "adapters" / name, llama(), target_modules=["v_proj"])
    prompts = {"input_ids": torch.arange(3, 9).view(3, 2), "max_new_tokens": 2}
    return {"model": llama(), "prompts": prompts}


# what a block has, and what its reader brings along
READERS = {
    "merge_adapter(model)  # for inference": at_first,
    "FusedLoRALinear.from_linear": one_layer,
    "DistributedDataParallel": distributed,
    "fully_shard": distributed,
    "parallelize_module": distributed,
    "export_adapter": whole,
    "get_peft_model": at_first,
    "use_adapters": many,
}


def test_every_block_is_run():
    assert len(BLOCKS) == len(READERS)
    for block in BLOCKS:
        assert len([mark for mark in READERS if mark in block]) == 1, block


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mark", READERS)
def test_the_code_runs_as_it_stands(mark, tmp_path, monkeypatch):
    if "peft" in mark:
        pytest.importorskip("peft")
    (block,) = [block for block in BLOCKS if mark in block]
    given = READERS[mark](tmp_path)
    monkeypatch.chdir(tmp_path)
    parallel = READERS[mark] is distributed
    if parallel:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        exec(compile(block.replace('"cuda"', '"cpu"'), "README.md", "exec"), given)
    finally:
        if parallel:
            dist.destroy_process_group()
