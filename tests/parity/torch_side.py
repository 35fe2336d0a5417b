"""What torch says: random models of transformers, their logits and their greedy tokens."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")  # skips who imports this, too
# Its threads wait by spinning: where other workers share the cores, two are ten times slower than one.
torch.set_num_threads(1)

PROMISE = 1e-4  # against float32 torch, which rounds as much as we do
TOLERANCE = 6e-5  # against float64 torch: over 300 draws of all families, float32 torch and we are at 1e-6 to 1.7e-5


def randomize(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draws every parameter, the gains of norms around one and all others around zero.

    At the usual initialisation (0.02, biases 0, norms 1) a layer hardly moves the residual stream, and a model whose
    attention is wrong has nearly the right logits; here everything counts. Gemma stores the gain less one.
    """
    one = 0 if model.config.model_type.startswith("gemma") else 1
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        is_scale = name.endswith("weight") and parameter.dim() == 1
        parameter.data = one + 0.3 * drawn if is_scale else 0.3 * drawn
    return model.eval()


def left_padded(seed: int, vocab_size: int, sizes: tuple[int, ...], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Random prompts: tokens and mask, [B, P]."""
    mask = np.arange(max(sizes)) >= max(sizes) - np.array(sizes)[:, None]
    tokens = np.random.default_rng(seed).integers(0, vocab_size, mask.shape)
    return np.where(mask, tokens, pad_id), mask


def torch_logits(model: torch.nn.Module, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits [B, S, V]; positions are given, since only `generate` derives them from the mask."""
    ones = torch.tensor(mask, dtype=torch.long)
    positions = (ones.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(torch.tensor(tokens), attention_mask=ones, position_ids=positions).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).numpy()  # numpy has no bfloat16


def doubled(model: torch.nn.Module) -> torch.nn.Module:
    """The model in float64; changes it. Torch has no grouped products of doubles, so experts go one by one."""
    if hasattr(model.config, "num_local_experts"):
        model.set_experts_implementation("eager")
    return model.double()


def exact_logits(model: torch.nn.Module, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits [B, S, V] in float64; changes the model."""
    model = doubled(model)
    if model.config.model_type != "gemma2":
        return torch_logits(model, tokens, mask)
    # Each text alone: padded, its eager attention overflows.
    logits = np.zeros((*tokens.shape, model.config.vocab_size))
    for row, keep in enumerate(mask):
        text = tokens[row][keep][None]
        logits[row][keep] = torch_logits(model, text, np.ones_like(text, bool))[0]
    return logits


def torch_greedy(
    model: torch.nn.Module, tokens: np.ndarray, mask: np.ndarray, new: int, eos: list[int] | None, pad_id: int
) -> np.ndarray:
    """Responses [B, new]: `generate` stops when all rows have ended; the rest is padding."""
    out = model.generate(
        torch.tensor(tokens),
        attention_mask=torch.tensor(mask, dtype=torch.long),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=pad_id,
    ).numpy()[:, tokens.shape[1] :]
    return np.pad(out, ((0, 0), (0, new - out.shape[1])), constant_values=pad_id)


def max_relative_error(actual: np.ndarray, expected: np.ndarray, mask: np.ndarray) -> float:
    """Over real tokens: the largest error of a token's logits over the largest magnitude among that token's logits.

    A logit near zero has no relative error to speak of, and what reads logits (softmax, argmax) sees differences
    between those of one token: their own scale is the scale.
    """
    actual, expected = np.asarray(actual, np.float64)[mask], np.asarray(expected, np.float64)[mask]
    return float(np.max(np.abs(actual - expected).max(-1) / np.abs(expected).max(-1)))
