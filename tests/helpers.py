"""Small things to test on."""

from pathlib import Path

import nbformat
import torch

from unlearnlib.models import loading

VOCABULARY, LENGTH = 40, 12
ARCHITECTURES = {
    "opt": loading.small_opt(VOCABULARY, hidden_size=16, layers=2, heads=2, context=32),
    "llama": {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCABULARY,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 32,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}
TINY = ARCHITECTURES["opt"]


def tiny_model(architecture="opt", seed=0, dtype=torch.float64, device="cpu"):
    return loading.load_model(ARCHITECTURES[architecture], seed=seed, dtype=dtype, device=device)


def random_sequences(number, length=LENGTH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (number, length), generator=generator)


def smallest_model(vocabulary):
    """So small that its Hessian can be written down."""
    config = loading.small_opt(vocabulary, hidden_size=4, layers=1, heads=2, context=16)
    model = loading.load_model(config, dtype=torch.float64, device="cpu")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():  # biases of zero would hide mistakes, and small weights saddles
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def chapter_prose(path: Path) -> str:
    """The text of a chapter: its cells of Markdown, with blank lines between them."""
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
