"""MAE's initialisation, as a choice beside that of the BEiT family.

The BEiT family draws weights with a standard deviation of 0.02, which suits a ViT-B: a layer of D
inputs keeps the size of what it is given at about 1 / sqrt(D), 0.036 for 768 and 0.09 for 128. A
narrow model with 0.02 spends its first hundreds of steps on growing its weights. MAE
(arXiv:2111.06377, its code) scales by the width, and starts positions as sines and cosines, which
tell neighbours from strangers at the first step.
"""

import torch
from torch import Tensor, nn

from cache_builder.errors import ConfigError

_LONGEST = 10_000.0  # wavelength over 2 pi, in patches, as in the Transformer (arXiv:1706.03762)


def init_as_mae(module: nn.Module, grid: tuple[int, int]) -> None:
    """Initialise a ViT, or a method around one, as MAE's code does.

    Linear layers and the patch embedding are uniform after Glorot and Bengio (AISTATS 2010), biases
    zero. Whatever is called `pos_embed` gets sines and cosines of row and column, zeros for prefix
    tokens; unlike MAE's it is trained from there.

    Args:
        module: With parameters on the CPU.
        grid: Rows and columns of patches.

    Raises:
        ConfigError: A position embedding's width is no multiple of four.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight.data.flatten(1))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for name, parameter in module.named_parameters():
        if name.endswith("pos_embed"):
            num_prefix = parameter.shape[1] - grid[0] * grid[1]
            parameter.data.zero_()
            parameter.data[0, num_prefix:] = sine_positions(grid, parameter.shape[-1])


def sine_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Return sines and cosines of row and column at D / 4 wavelengths each, (N, D) in raster order.

    Raises:
        ConfigError: `dim` is no multiple of four.
    """
    if dim % 4:
        raise ConfigError(
            f"model.init = 'mae' needs widths that are multiples of four, for sines and cosines of "
            f"rows and columns; {dim} is none. Change the width, or set model.init to 'beit'."
        )
    rates = _LONGEST ** -(torch.arange(dim // 4) / (dim // 4))
    rows, cols = torch.meshgrid(*(torch.arange(size).float() for size in grid), indexing="ij")
    angles = [places.flatten()[:, None] * rates for places in (rows, cols)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
