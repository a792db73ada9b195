"""Long runs: a model trained fused follows the one trained with plain PyTorch LoRA as closely as
two plain ones follow each other, and memory does not grow. `make soak` runs the long form."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import soak
import torch

ROOT = Path(__file__).resolve().parents[1]
MEBIBYTE = 2**20

transformers = pytest.importorskip("transformers", reason="needs the extra `examples`")


def load(name):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def assert_healthy(histories):
    fused, plain, other = (histories[kind].losses for kind in soak.KINDS)

    def apart(a, b):
        return max(abs(x - y) for x, y in zip(a, b, strict=True))

    # both distances grow from rounding errors: their ratio is what says that nothing else is there
    spread = max(apart(plain, other), max(plain) * 2**-23)
    assert apart(fused, plain) <= 10 * spread, f"{apart(fused, plain)} against {spread}"
    tenth = len(fused) // 10
    assert sum(fused[-tenth:]) < 0.9 * sum(fused[:tenth]), "it learned nothing"
    for kind, history in histories.items():
        assert len(set(history.live)) == 1, f"{kind}: {history.live} bytes of live tensors"
        grown = history.resident[-1] - history.resident[0]
        assert grown < 64 * MEBIBYTE, f"{kind}: the process grew by {grown} bytes"


def decoder(device):
    """A Llama of two layers, with dropout and checkpointing, that reads the licence by letters."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 128}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).to(device)
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name since 5.23
    (enable or model.gradient_checkpointing_enable)()
    return model


def batches_of_text(steps, device):
    """Of changing lengths: what is cached per shape shows."""
    text = torch.tensor(list((ROOT / "LICENSE").read_bytes()), device=device)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        length = int(torch.randint(16, 32, (), generator=generator))
        starts = torch.randint(len(text) - length, (8,), generator=generator)
        yield torch.stack([text[start : start + length] for start in starts.tolist()])


def test_fifty_steps_of_a_small_decoder_are_those_of_plain_pytorch(device):
    histories = {}
    for kind in soak.KINDS:
        model = decoder(device)
        options = {"r": 4, "lora_alpha": 10, "lora_dropout": 0.1}
        soak.adapt(model, kind, ("_proj",), **options).train()
        for module in (model.model.embed_tokens, model.lm_head):
            module.requires_grad_(True)
        torch.manual_seed(3)
        histories[kind] = soak.train(
            model,
            lambda model, ids: model(input_ids=ids, labels=ids, use_cache=False).loss,
            list(batches_of_text(50, device)),
            lr=5e-3,
            every=10,
        )
    assert_healthy(histories)


@pytest.mark.slow
def test_five_hundred_steps_of_minilm_are_those_of_plain_pytorch(device):
    data = load("data")
    finetune = load("finetune")
    try:
        folder = data.fetch_model(data.default_cache())
        reviews = data.fetch_reviews(data.default_cache())
    except RuntimeError as error:
        pytest.skip(f"the model and the reviews cannot be downloaded: {error}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    classes = ["negative", "positive"]
    examples = data.encode(data.load_examples(reviews), classes, tokenizer)
    batches = [
        data.collate([examples[i] for i in batch], device)
        for batch in data.schedule(len(examples), steps=500, batch_size=8, seed=0)
    ]
    histories = {}
    for kind in soak.KINDS:
        encoder = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
        options = {"r": 8, "lora_alpha": 20, "lora_dropout": 0.05}
        torch.manual_seed(0)
        soak.adapt(encoder, kind, ("query", "value"), **options)
        model = finetune.Classifier(encoder, len(classes), torch.float32).to(device).train()
        torch.manual_seed(3)
        histories[kind] = soak.train(
            model,
            lambda model, batch: torch.nn.functional.cross_entropy(model(*batch[:2]), batch[2]),
            batches,
            lr=2e-3,
            every=50,
        )
        print(kind, histories[kind].losses[::50], histories[kind].resident, flush=True)
    assert_healthy(histories)
