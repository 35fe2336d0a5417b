"""Records the small models beside this file, with the logits and greedy tokens that torch computes from them.

    python tests/golden/record_models.py

Needs torch and transformers; the versions stand in each `golden.json`. Weights are random, larger than at a usual
initialisation and random in every bias and norm as well, so that a tensor that is swapped, transposed or left out
shows. They are stored in half precision, and the numbers are those of the stored weights in float64.
"""

import json
import pathlib
import platform
import shutil

import numpy as np
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

HERE = pathlib.Path(__file__).parent
SIZES = (7, 4, 1)  # tokens of each prompt; the shorter ones are padded left
NEW_TOKENS = 12
PAD = 0

MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=40,
            n_positions=24,
            n_embd=12,
            n_layer=2,
            n_head=3,
            n_inner=20,
            layer_norm_epsilon=1e-4,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            max_position_embeddings=24,
            hidden_size=12,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            rms_norm_eps=1e-4,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
}
STORED = {"gpt2": torch.float16, "llama": torch.bfloat16}
SEED = {"gpt2": 4, "llama": 10}  # their greedy tokens vary, which those of a random model often do not


def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Draws every parameter: norms around one, all others around zero."""
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        is_scale = name.endswith("weight") and parameter.dim() == 1
        parameter.data = 1 + 0.3 * drawn if is_scale else 0.4 * drawn


def left_padded(generator: torch.Generator, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts (tokens, mask), each [3, 7]."""
    mask = torch.tensor([[0] * (max(SIZES) - size) + [1] * size for size in SIZES])
    tokens = torch.randint(3, vocab_size, mask.shape, generator=generator)
    return torch.where(mask == 1, tokens, PAD), mask


def greedy(model: torch.nn.Module, tokens: torch.Tensor, mask: torch.Tensor, eos: int | None) -> list[list[int]]:
    """Responses up to and with EOS."""
    out = model.generate(
        tokens, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=PAD, eos_token_id=eos
    )
    responses = out[:, tokens.shape[1] :].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in responses]


def record(name: str) -> None:
    """Writes one folder."""
    generator = torch.Generator().manual_seed(SEED[name])
    model = MODELS[name]().eval()
    randomize(model, generator)
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.to(STORED[name]).save_pretrained(folder)
    # Opened again: `to` has rounded the rotary frequencies, which are a buffer, along with the weights.
    model = type(model).from_pretrained(folder, dtype=torch.float32).double().eval()
    tokens, mask = left_padded(generator, model.config.vocab_size)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask, position_ids=positions).logits.numpy()
    free = greedy(model, tokens, mask, None)
    eos = free[0][4]  # the first row stops in the middle
    golden = {
        "command": "python tests/golden/record_models.py",
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "reference": f"float64 forward of weights stored in {str(STORED[name]).removeprefix('torch.')}",
        "pad_id": PAD,
        "tokens": tokens.tolist(),
        "mask": mask.tolist(),
        "logits": [[[float(f"{x:.9g}") for x in position] for position in row] for row in logits],
        "eos_id": eos,
        "greedy": greedy(model, tokens, mask, eos),
        "greedy_without_eos": free,
    }
    # One row of logits a line.
    text = json.dumps(golden, indent=None, separators=(", ", ": ")).replace("], [", "],\n[").replace(', "', ',\n"')
    assert json.loads(text) == golden
    (folder / "golden.json").write_text(text + "\n")
    (folder / "model.safetensors").chmod(0o644)


if __name__ == "__main__":
    for model_name in MODELS:
        record(model_name)
