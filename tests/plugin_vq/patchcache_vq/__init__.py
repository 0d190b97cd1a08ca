"""A VQ autoencoder whose codebook is that of vector-quantize-pytorch, and how it is trained."""

from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from vector_quantize_pytorch import VectorQuantize


class VQAutoencoder(nn.Module):
    """Four convolutions of stride 2, a codebook, and the way back."""

    patch_size = 16

    def __init__(self, image_size: int, vocab_size: int, dim: int = 32, width: int = 32) -> None:
        """Make one with random weights."""
        super().__init__()
        self.image_size, self.vocab_size = image_size, vocab_size
        widths = [3, width, width, width, dim]
        self.encoder = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(a, b, 4, 2, 1), nn.SiLU()) for a, b in pairwise(widths)),
            nn.Conv2d(dim, dim, 1),
        )
        self.quantizer = VectorQuantize(
            dim, vocab_size, decay=0.9, kmeans_init=True, threshold_ema_dead_code=1
        )
        self.decoder = nn.Sequential(
            *(
                nn.Sequential(nn.ConvTranspose2d(a, b, 4, 2, 1), nn.SiLU())
                for a, b in ((dim, width), (width, width), (width, width), (width, width))
            ),
            nn.Conv2d(width, 3, 1),
        )

    @property
    def centroids(self) -> Tensor:
        """What ids stand for, (K, D)."""
        return self.quantizer.codebook

    def features(self, pixels: Tensor) -> Tensor:
        """Return what is quantised, (B, N, D) of (B, 3, S, S) uint8 pixels."""
        return self.encoder(pixels.float() / 127.5 - 1).flatten(2).transpose(1, 2)

    def encode(self, pixels: Tensor) -> Tensor:
        """Return ids (B, rows, cols)."""
        _, ids, _ = self.quantizer(self.features(pixels))
        side = self.image_size // self.patch_size
        return ids.view(-1, side, side)

    def decode(self, ids: Tensor) -> Tensor:
        """Return pixels (B, 3, S, S), 0..255, of ids (B, rows, cols)."""
        return self._draw(self.quantizer.codebook[ids].permute(0, 3, 1, 2))

    def fit(self, pixels: Tensor, *, steps: int, batch_size: int = 16, lr: float = 2e-3) -> float:
        """Train on (n, 3, S, S) uint8 pixels; return the last mean squared error."""
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(self.parameters(), lr=lr)
        self.train()
        for _ in range(steps):
            batch = pixels[torch.randint(len(pixels), (batch_size,))]
            features = self.features(batch)
            quantised, _, commitment = self.quantizer(features)
            side = self.image_size // self.patch_size
            drawn = self._draw(quantised.transpose(1, 2).unflatten(2, (side, side)))
            error = mse_loss(drawn / 127.5, batch.float() / 127.5)
            optimizer.zero_grad()
            (error + commitment).backward()
            optimizer.step()
        self.eval()
        return float(error.detach()) * 127.5**2

    def save(self, path: Path) -> None:
        """Write the weights."""
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, path)

    def _draw(self, codes: Tensor) -> Tensor:
        drawn = self.decoder(codes)
        assert drawn.shape[-1] == self.image_size
        return (drawn + 1) * 127.5


def load(weights: Path, image_size: int = 64, vocab_size: int = 64) -> VQAutoencoder:
    """Make the tokenizer of a weights file: what the entry point names."""
    model = VQAutoencoder(image_size, vocab_size)
    model.load_state_dict(load_file(weights))
    return model
