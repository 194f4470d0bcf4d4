"""config.json -> rotary frequencies, in fp32 and by the formulas of transformers, to the last bit.

transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 writes both into `rope_parameters`. Numbers are
made on the CPU, whatever device a model is being built on.
"""

import math

import torch
from torch import Tensor

from rm.model.transformer import Rope


def rope(hf: dict, head_dim: int, theta: float = 10000.0, partial: float | None = None) -> Rope:
    """The rotary positions that a config.json asks for.

    Args:
        theta: the base of the frequencies, where the file is silent.
        partial: which part of a head turns, where the file is silent; None: this family turns whole heads only.
    """
    asked = _asked(hf)
    kind = asked.get("rope_type") or asked.get("type") or "default"
    if kind not in SCALED:
        raise ValueError(f"rope_scaling of type {kind!r} is not implemented, only {', '.join(SCALED)}")
    share = asked.get("partial_rotary_factor", partial or 1.0)
    turned = int(head_dim * share)
    if partial is None and turned != head_dim:
        raise ValueError(f"partial_rotary_factor {share} is not implemented for this family, only 1.0")
    if turned % 2 or not 0 < turned <= head_dim:
        raise ValueError(f"{turned} of head_dim {head_dim} would rotate: rotary positions turn pairs")
    theta = float(asked.get("rope_theta", theta))
    period = theta ** (torch.arange(0, turned, 2, dtype=torch.float32, device="cpu") / turned)  # (E/2,)
    try:
        frequencies, scale = SCALED[kind](period, theta, asked)
    except KeyError as error:
        raise ValueError(f"rope_scaling of type {kind!r} lacks {error}") from error
    return Rope(tuple(frequencies.tolist()), scale)


def _asked(hf: dict) -> dict:
    """All that a file says of rope, in one dictionary; null is silence."""
    outside = {name: hf.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    length = {"original_max_position_embeddings": hf.get("max_position_embeddings")}
    asked = length | outside | (hf.get("rope_scaling") or {}) | (hf.get("rope_parameters") or {})
    return {name: value for name, value in asked.items() if value is not None}


# Each: periods (E/2,), base and what is asked -> frequencies (E/2,), and a factor for cosine and sine.


def _default(period: Tensor, theta: float, asked: dict) -> tuple[Tensor, float]:
    return 1.0 / period, 1.0


def _linear(period: Tensor, theta: float, asked: dict) -> tuple[Tensor, float]:
    """Positions interpolated (arXiv 2306.15595)."""
    return 1.0 / period / asked["factor"], 1.0


def _llama3(period: Tensor, theta: float, asked: dict) -> tuple[Tensor, float]:
    """Llama 3.1: slow turns interpolated, fast ones kept, those between blended."""
    factor, low, high = asked["factor"], asked["low_freq_factor"], asked["high_freq_factor"]
    length = asked["original_max_position_embeddings"]
    kept = 1.0 / period
    wavelength = 2 * math.pi / kept
    share = (length / wavelength - low) / (high - low)
    blended = (1 - share) * kept / factor + share * kept
    slow_or_blended = torch.where(wavelength > length / low, kept / factor, blended)
    return torch.where(wavelength < length / high, kept, slow_or_blended), 1.0


def _yarn(period: Tensor, theta: float, asked: dict) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): from kept to interpolated turns on a ramp; what is turned is also scaled."""
    if asked.get("mscale") or asked.get("mscale_all_dim"):
        raise ValueError("rope_scaling of type 'yarn' with mscale is not implemented")
    factor, length, pairs = asked["factor"], asked["original_max_position_embeddings"], len(period)

    def pair_turning(times: float) -> float:
        """Number of the pair of dimensions that turns so often over the original length."""
        return 2 * pairs * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_turning(asked.get("beta_fast") or 32), pair_turning(asked.get("beta_slow") or 1)
    if asked.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    kept = 1 - ((torch.arange(pairs, dtype=torch.float32, device="cpu") - low) / (high - low or 0.001)).clamp(0, 1)
    scale = asked.get("attention_factor") or (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    return 1.0 / (factor * period) * (1 - kept) + 1.0 / period * kept, scale


SCALED = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
