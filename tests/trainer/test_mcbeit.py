"""mc-BEiT: soft targets and similarities are those of the definition."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from cache_builder.errors import ConfigError
from tests.trainer.caches import make_cache
from tests.trainer.methods import (
    NUM_PATCHES,
    VOCAB,
    drawn_batch,
    draws,
    make_objective,
    paint,
    read_batch,
)
from trainer.objectives.mcbeit import soft_cross_entropy


@pytest.fixture
def make(tiny_cache):
    def make(masked_tokens="keep", **settings):
        return make_objective(tiny_cache, "mcbeit", masked_tokens=masked_tokens, **settings).eval()

    return make


def soft_batch(num_samples=2, top_k=3):
    """Return noise, random ids, and probabilities of which the first is the largest."""
    generator = torch.Generator().manual_seed(1)
    shape = (num_samples, NUM_PATCHES)
    ids = torch.rand(*shape, VOCAB, generator=generator).argsort(-1)[..., :top_k]
    probs = torch.rand(*shape, top_k, generator=generator).sort(-1, descending=True).values
    images, targets = drawn_batch(num_samples)
    probs = probs / probs.sum(-1, keepdim=True)
    return images, targets._replace(token_ids=ids[..., 0], soft_ids=ids, soft_probs=probs)


def dense_loss(rows, logits, targets, masks, *, weight, temperature):
    """The definition: a target of K values for every masked patch, one after another."""
    losses = []
    for b in range(len(rows)):
        p = torch.zeros(NUM_PATCHES, VOCAB)
        for j in range(NUM_PATCHES):
            p[j, targets.soft_ids[b, j]] = targets.soft_probs[b, j]
        for place, i in enumerate(masks.masked_at[b].tolist()):
            cosines = torch.stack([cosine_similarity(rows[b, i], z, dim=0) for z in rows[b]])
            w = torch.softmax(cosines / temperature, 0)
            q = weight * (w @ p) + (1 - weight) * p[i]
            losses.append(-(q * logits[b, place].log_softmax(0)).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("masked_tokens", ["keep", "drop"])
@pytest.mark.parametrize("weight", [0.2, 0, 1])
def test_loss_and_gradients_are_those_of_the_definition(make, masked_tokens, weight):
    settings = {"similarity_temperature": 0.1} if weight else {}
    objective = make(masked_tokens, similarity_weight=weight, **settings)
    images, targets = soft_batch()
    result = objective(images, targets, draws(2))
    masks = objective.masks.draw(draws(2))
    rows, logits = objective.rows_and_logits(images, masks)
    expected = dense_loss(rows, logits, targets, masks, weight=weight, temperature=0.1)
    torch.testing.assert_close(result["loss"], expected)
    parameters = list(objective.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(result["loss"], parameters, materialize_grads=True),
        torch.autograd.grad(expected, parameters, materialize_grads=True),
    )
    wanted = targets.token_ids.gather(1, masks.masked_at)
    entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
    torch.testing.assert_close(result["cross_entropy"], entropy.detach())


def test_gradients_flow_through_the_similarities_unless_they_are_detached(make):
    images, targets = soft_batch()
    losses, gradients = [], []
    for is_detached in (False, True):
        objective = make(similarity_temperature=0.1, detach_similarity=is_detached)
        losses.append(objective(images, targets, draws(2))["loss"])
        losses[-1].backward()
        gradients.append(objective.vit.patch_embed.proj.weight.grad)
    assert torch.equal(losses[0], losses[1])
    assert not torch.allclose(gradients[0], gradients[1])


@pytest.mark.parametrize("masked_tokens", ["keep", "drop"])
def test_what_a_masked_patch_shows_changes_nothing(make, masked_tokens):
    objective = make(masked_tokens)
    images, targets = soft_batch()
    masks = objective.masks.draw(draws(2))
    painted = paint(images, masks.hidden, 0.9)
    first, second = (objective(each, targets, draws(2))["loss"] for each in (images, painted))
    assert torch.equal(first, second)


def test_probabilities_that_were_rounded_are_made_to_add_up(make):
    objective = make()
    images, targets = soft_batch()
    scaled = targets._replace(soft_probs=targets.soft_probs * 0.9)
    losses = [objective(images, each, draws(2))["loss"] for each in (targets, scaled)]
    torch.testing.assert_close(*losses)


def test_targets_of_all_patches_over_the_vocabulary_are_never_made():
    batch, num_patches, num_masked, vocab_size = 1, 40, 2, 1000
    logits = torch.randn(batch, num_masked, vocab_size, requires_grad=True)
    ids = torch.randint(0, vocab_size, (batch, num_patches, 2))
    probs = torch.full((batch, num_patches, 2), 0.5)
    similarity = torch.rand(batch, num_masked, num_patches).softmax(-1)
    sizes = []

    def note(saved):
        sizes.append(saved.untyped_storage().nbytes() // saved.element_size())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        soft_cross_entropy(logits, ids, probs, torch.tensor([[3, 5]]), similarity, 0.2)
    assert max(sizes) == logits.numel()


def test_the_soft_targets_come_from_the_cache(make, tiny_cache):
    objective = make()
    _, targets = read_batch(tiny_cache, objective)
    assert torch.equal(targets.soft_ids[..., 0], targets.token_ids)
    assert targets.soft_probs.shape == (4, NUM_PATCHES, 3)


def test_a_cache_without_soft_targets_is_refused_with_the_flag_that_makes_them(tmp_path):
    cache = make_cache(tmp_path, num_images=4)
    with pytest.raises(ConfigError, match=r"'soft'.*patchcache build --soft-top-k 8"):
        make_objective(cache, "mcbeit")


@pytest.mark.parametrize("settings", [{"detach_similarity": True}, {"similarity_temperature": 0.5}])
def test_settings_of_similarities_without_weight_are_refused(make, settings):
    with pytest.raises(ConfigError, match=r"does nothing with similarity_weight = 0"):
        make(similarity_weight=0, **settings)
