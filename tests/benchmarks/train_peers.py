"""What `bench_train` compares the trainer with: the same work done the usual way.

Written from the papers and from `docs/methods.md`; the models and their weights are the trainer's.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from trainer.draws import SampleGenerator
from trainer.objectives import beit, mapet
from trainer.objectives.hiding import encode
from trainer.objectives.interface import Targets

_UNSEEN = -1e30  # what MaPeT's code adds to the scores of what is not seen


class TwoStreams(nn.Module):
    """MaPeT with masks of every picture and head, and dense attention, as its code has it.

    The masks are made on the CPU as a data loader makes them, and carried to the device.
    """

    def __init__(self, objective: mapet.PermutedTokens) -> None:
        super().__init__()
        self.objective = objective
        self.mask_bytes = 0  # of the last batch

    def forward(self, images: Tensor, targets: Targets, generator: SampleGenerator) -> Tensor:
        """Return the loss of the objective, for the same draws."""
        objective, vit = self.objective, self.objective.vit
        order = objective.draw_order(generator)
        num_prefix = vit.num_prefix_tokens
        least = num_prefix + order.visible_at.shape[1]
        ranks = _ranks(order.visible_at, order.masked_at, num_prefix)
        masks = [m.to(images.device) for m in dense_masks(ranks.cpu(), least, _num_heads(vit))]
        self.mask_bytes = sum(mask.nbytes for mask in masks)
        patches = vit.patch_embed(objective.normalise(images))
        predicted_at = order.masked_at.sort(dim=1).values
        positions = mapet.patch_positions(vit).expand(len(patches), -1, -1)
        query = objective.positional_token + mapet.take(positions, predicted_at)
        keys = torch.cat([vit.norm_pre(vit._pos_embed(patches)), query], dim=1)
        for block in vit.blocks:
            query, keys = (
                _attend(block, rows, keys, mask)
                for rows, mask in zip((query, keys), masks, strict=True)
            )
        logits = objective.head(vit.norm(query))
        wanted = targets.token_ids.gather(1, predicted_at)
        return cross_entropy(logits.float().flatten(0, 1), wanted.flatten())


def dense_masks(ranks: Tensor, least: int, num_heads: int) -> tuple[Tensor, Tensor]:
    """Return float masks (B, heads, rows, N + P) of queries and contents, one picture at a time."""
    pictures = [mapet.visibility(row[None], least) for row in ranks]
    queries, contents = (
        torch.stack(
            [
                torch.zeros(sees.shape[1:]).masked_fill_(~sees[0], _UNSEEN).repeat(num_heads, 1, 1)
                for sees in stream
            ]
        )
        for stream in zip(*pictures, strict=True)
    )
    return queries, contents


def loss_over_all_positions(
    objective: beit.MaskedTokens, images: Tensor, targets: Targets, generator: SampleGenerator
) -> Tensor:
    """Return BEiT's loss from logits of all patches, of which the masked ones are selected last."""
    vit = objective.vit
    masks = objective.masks.draw(generator)
    patches = vit.patch_embed(objective.normalise(images))
    encoded = encode(vit, objective.hiding.tokens(vit, patches, masks))
    logits = objective.head(objective.hiding.rows(vit, encoded, masks))
    return cross_entropy(logits[masks.hidden].float(), targets.token_ids[masks.hidden])


def bytes_kept(module: nn.Module, forward: Callable[[], Any]) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}
    alive = []  # or a later tensor would get the address of an earlier one

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        alive.append(forward())
    return sum(kept.values())


def _ranks(visible_at: Tensor, masked_at: Tensor, num_prefix: int) -> Tensor:
    """Return the rank of every position, (B, prefix + N)."""
    visited = torch.cat([visible_at, masked_at], dim=1)
    later = torch.arange(visited.shape[1], device=visited.device).expand_as(visited)
    ranks = torch.empty_like(visited).scatter(1, visited, later + num_prefix)
    prefix = torch.arange(num_prefix, device=visited.device).expand(len(visited), -1)
    return torch.cat([prefix, ranks], dim=1)


def _num_heads(vit: VisionTransformer) -> int:
    return int(vit.blocks[0].attn.num_heads)


def _attend(block: Block, rows: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """Run a block on rows (B, R, D) that see keys (B, S, D) where the mask is 0."""
    attention = block.attn
    weight_q, *weights_kv = attention.qkv.weight.chunk(3)
    bias_q, *biases_kv = attention.qkv.bias.chunk(3)

    def heads(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        projected = nn.functional.linear(tokens, weight, bias)
        return projected.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)

    seen = block.norm1(keys)
    query = heads(block.norm1(rows), weight_q, bias_q) * attention.head_dim**-0.5
    key, value = (heads(seen, w, b) for w, b in zip(weights_kv, biases_kv, strict=True))
    shares = (query @ key.mT + mask).softmax(dim=-1)
    attended = (shares @ value).transpose(1, 2).flatten(2)
    rows = rows + block.drop_path1(block.ls1(attention.proj(attended)))
    return rows + block.drop_path2(block.ls2(block.mlp(block.norm2(rows))))
