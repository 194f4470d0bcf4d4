"""config.json -> rotary frequencies, in fp32, by the formulas of transformers and bit-identical to its results.

transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 writes both into `rope_parameters`. Frequencies
are computed on the CPU, whatever device a model is being built on.

Shapes: E the dimensions of a head that are rotated.
"""

import math

import torch
from torch import Tensor

from rm.model.transformer import Rope


def rope(hf: dict, head_dim: int, theta: float = 10000.0, partial: float | None = None) -> Rope:
    """The rotary position embedding that a config.json describes.

    Args:
        theta: base of the frequencies, where the file does not set `rope_theta`.
        partial: fraction of a head's dimensions that is rotated, where the file does not set `partial_rotary_factor`;
            None: this family implements the rotation of whole heads only.

    Raises:
        ValueError: for a kind of scaling or a fraction that is not implemented, or a parameter that is missing.
    """
    parameters = _parameters(hf)
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    if rope_type not in FREQUENCIES or (rope_type == "longrope" and "factors" not in parameters):
        implemented = ", ".join(name for name in FREQUENCIES if name != "longrope")  # which Phi 3 alone has
        raise ValueError(f"rope_scaling of type {rope_type!r} is not implemented for this family, only {implemented}")
    fraction = parameters.get("partial_rotary_factor", partial or 1.0)
    rotated = int(head_dim * fraction)
    if partial is None and rotated != head_dim:
        raise ValueError(f"partial_rotary_factor {fraction} is not implemented for this family, only 1.0")
    if rotated % 2 or not 0 < rotated <= head_dim:
        raise ValueError(
            f"rotary positions would rotate {rotated} dimensions of each head (head_dim {head_dim}), but they rotate "
            "pairs of dimensions: it must be an even number from 2 to head_dim"
        )
    theta = float(parameters.get("rope_theta", theta))
    period = theta ** (torch.arange(0, rotated, 2, dtype=torch.float32, device="cpu") / rotated)  # (E/2,)
    try:
        frequencies, scale = FREQUENCIES[rope_type](period, theta, parameters)
    except KeyError as error:
        raise ValueError(f"rope_scaling of type {rope_type!r} lacks {error}") from error
    except ZeroDivisionError:
        raise ValueError(f"rope_scaling of type {rope_type!r} divides by zero with {parameters}") from None
    # "dynamic" changes with the length of a text beyond the model's own, and not before.
    longest = hf["max_position_embeddings"] if rope_type == "dynamic" else 0
    return Rope(tuple(frequencies.tolist()), scale, longest=longest)


def by_layer_type(hf: dict, head_dim: int, full_theta: float, sliding_theta: float) -> dict[str, Rope]:
    """The rotary positions of layers with full and with sliding attention, whose settings differ.

    transformers 4 writes `rope_theta` and `rope_scaling` for full attention and, of Gemma 3, `rope_local_base_freq` for
    sliding attention; transformers 5 writes `rope_parameters` with an entry for each.
    """
    parameters = hf.get("rope_parameters") or {}
    full = (parameters.get("full_attention") or {}) | (hf.get("rope_scaling") or {})
    sliding = {"rope_parameters": parameters.get("sliding_attention"), "rope_theta": hf.get("rope_local_base_freq")}
    hf = hf | {"rope_scaling": None}
    return {
        "full_attention": rope(hf | {"rope_parameters": full}, head_dim, full_theta),
        "sliding_attention": rope(hf | sliding, head_dim, sliding_theta),
    }


def _parameters(hf: dict) -> dict:
    """All rope parameters of a config.json in one dictionary, without those that are null, as transformers has them."""
    nested = hf.get("rope_scaling") or hf.get("rope_parameters") or {}  # the one replaces the other
    top_level = {name: hf.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    length = {"original_max_position_embeddings": hf.get("max_position_embeddings")}
    first = {"original_max_position_embeddings": hf.get("original_max_position_embeddings")}  # before the nested one
    return length | _not_null(top_level) | _not_null(nested) | _not_null(first)


def _not_null(parameters: dict) -> dict:
    return {name: value for name, value in parameters.items() if value is not None}


def legacy_spelling(hf: dict) -> dict:
    """`rope_theta` and `rope_scaling`, as transformers 4 reads them, for a config.json that has only `rope_parameters`.

    transformers 4 ignores `rope_parameters`, without a warning.
    """
    parameters = hf.get("rope_parameters") or {}
    spelling = {}
    if "full_attention" in parameters:  # an entry for each kind of layer
        if hf["model_type"] == "gemma3_text":
            spelling["rope_local_base_freq"] = (parameters.get("sliding_attention") or {}).get("rope_theta")
        parameters = parameters["full_attention"] or {}
    scaling = {name: value for name, value in parameters.items() if name not in ("rope_theta", "partial_rotary_factor")}
    if parameters.get("rope_type", "default") != "default":
        spelling["rope_scaling"] = scaling
    names = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
    if hf["model_type"] == "gpt_neox":
        names = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
    spelling |= {old_name: parameters.get(name) for name, old_name in names.items()}
    return {name: value for name, value in spelling.items() if value is not None and hf.get(name) is None}


# Each of the following takes the periods of unscaled rope, (E/2,), in positions per radian, their base theta and the
# rope parameters, and returns the frequencies, (E/2,), in radians per position, and a factor on cosine and sine.


def _default(period: Tensor, theta: float, parameters: dict) -> tuple[Tensor, float]:
    return 1.0 / period, 1.0


def _linear(period: Tensor, theta: float, parameters: dict) -> tuple[Tensor, float]:
    """Position interpolation (arXiv 2306.15595)."""
    return 1.0 / period / parameters["factor"], 1.0


def _llama3(period: Tensor, theta: float, parameters: dict) -> tuple[Tensor, float]:
    """Llama 3.1: low frequencies are interpolated, high ones kept, those between blended."""
    factor, low, high = parameters["factor"], parameters["low_freq_factor"], parameters["high_freq_factor"]
    length = parameters["original_max_position_embeddings"]
    unscaled = 1.0 / period
    wavelength = 2 * math.pi / unscaled
    weight = (length / wavelength - low) / (high - low)
    blended = (1 - weight) * unscaled / factor + weight * unscaled
    low_or_blended = torch.where(wavelength > length / low, unscaled / factor, blended)
    return torch.where(wavelength < length / high, unscaled, low_or_blended), 1.0


def _yarn(period: Tensor, theta: float, parameters: dict) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): a linear ramp over the dimensions from unscaled to interpolated frequencies.

    Cosine and sine are scaled as well.
    """
    factor, length, pairs = parameters["factor"], parameters["original_max_position_embeddings"], len(period)

    def pair_of(rotations: float) -> float:
        """Index, not rounded, of the pair of dimensions that makes so many rotations over the original length."""
        return 2 * pairs * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(parameters.get("beta_fast") or 32), pair_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    width = high - low or 0.001  # as in transformers, so that nothing is divided by zero
    weight = 1 - ((torch.arange(pairs, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)  # of unscaled

    def mscale(times: float = 1) -> float:
        return 0.1 * times * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale, times, times_all = (parameters.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if not scale:
        scale = mscale(times) / mscale(times_all) if times and times_all else mscale()
    return 1.0 / (factor * period) * (1 - weight) + 1.0 / period * weight, scale


def _dynamic(period: Tensor, theta: float, parameters: dict) -> tuple[Tensor, float]:
    """Dynamic NTK scaling, of which nothing is seen before `max_position_embeddings`."""
    return 1.0 / period, 1.0


def _longrope(period: Tensor, theta: float, parameters: dict) -> tuple[Tensor, float]:
    """LongRoPE (arXiv 2402.13753) with one list of factors: `factors`, which the family chooses."""
    factors, length = parameters["factors"], parameters["original_max_position_embeddings"]
    if len(factors) != len(period):
        raise ValueError(f"rope_scaling of type 'longrope' has {len(factors)} factors for {len(period)} frequencies")
    factor, scale = parameters["factor"], parameters.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
    return 1.0 / (torch.tensor(factors, dtype=torch.float32, device="cpu") * period), scale


FREQUENCIES = {
    "default": _default,
    "dynamic": _dynamic,
    "linear": _linear,
    "llama3": _llama3,
    "longrope": _longrope,
    "yarn": _yarn,
}
