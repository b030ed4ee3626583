import pytest
import torch
from lightning.pytorch import Callback

from flextron_lit.losses.cross_entropy import distillation, mean_cross_entropy
from flextron_lit.sources import load_dense
from flextron_lit.stages import Distillation, FullWeight
from tests.stages.training import PLAN, TINY, Gradients, Plan, fit, stage


def losses_of(module, batch, sub_network):
    """Logits of the dense original, the full network and a sub-network of it."""
    inputs = {k: batch[k] for k in ("input_ids", "position_ids")}
    original = load_dense(TINY)(**inputs, use_cache=False).logits.detach()
    full = module.model(**inputs, use_cache=False).logits
    with module.backbone.use(sub_network):
        return original, full, module.model(**inputs, use_cache=False).logits


@pytest.mark.parametrize(
    ("weights", "logged"),
    [
        ({}, set()),
        ({"sampled_from_full": 0.5}, {"sampled/kl_full"}),
        ({"sampled_from_original": 0.5}, {"sampled/kl_original"}),
        ({"full_from_original": 0.5}, {"full/kl_original"}),
        ({"sampled_from_full": 0.5, "language": 0.0}, {"sampled/kl_full"}),
        ({"sampled_from_full": 0.5, "temperature": 2.0}, {"sampled/kl_full"}),
    ],
)
def test_distillation_adds_the_terms_it_says(weights, logged):
    kept, sub_network = Gradients(), PLAN[0]
    chosen = Distillation(**weights)
    module = stage(distillation=chosen)
    trainer = fit(module, Plan([sub_network]), Shaken(), kept)
    assert {n.removeprefix("train/") for n in trainer.callback_metrics if "kl_" in n} == logged
    assert not any("_original" in n for n in module.state_dict())
    module.model.load_state_dict(kept.weights, strict=False)
    module.zero_grad()
    labels = kept.batches[0]["labels"]
    original, full, sampled = losses_of(module, kept.batches[0], sub_network)
    t = chosen.temperature
    expected = (
        mean_cross_entropy(full, labels)
        + chosen.language * mean_cross_entropy(sampled, labels)
        + chosen.sampled_from_full * distillation(sampled, full, labels, t)
        + chosen.sampled_from_original * distillation(sampled, original, labels, t)
        + chosen.full_from_original * distillation(full, original, labels, t)
    )
    expected.backward()
    names = dict(module.model.named_parameters())
    assert all(torch.allclose(kept.kept[n], p.grad, rtol=1e-3, atol=1e-5) for n, p in names.items())
    if weights:
        module.zero_grad()
        _, full, sampled = losses_of(module, kept.batches[0], sub_network)
        (mean_cross_entropy(full, labels) + mean_cross_entropy(sampled, labels)).backward()
        assert not all(torch.allclose(kept.kept[n], p.grad, rtol=1e-3, atol=1e-5) for n, p in names.items())


class Shaken(Callback):
    """Moves the full network away from the original, so that its distillation has something to do."""

    def on_train_start(self, trainer, pl_module):
        with torch.no_grad():
            pl_module.model.model.layers[0].mlp.up_proj.weight.mul_(3)


def test_the_full_networks_weight_goes_from_start_to_end():
    shares = []

    class Share(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.plan = PLAN[:1]

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            shares.append(pl_module.model.lm_head.weight.grad.norm().item())

    frozen = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.0), "distillation": Distillation(language=1e-9)}
    fit(stage(full_weight=FullWeight(start=0.5, end=2.0), **frozen), Share(), steps=4)
    weighted = list(shares)
    shares.clear()
    fit(stage(**frozen), Share(), steps=4)
    ratios = [a / b for a, b in zip(weighted, shares, strict=True)]
    assert ratios == pytest.approx([0.5, 1.0, 1.5, 2.0], rel=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Distillation(sampled_from_full=-1), "must be 0 or more"),
        (lambda: Distillation(sampled_from_full=1, temperature=0), "temperature above 0"),
        (lambda: Distillation(language=0), "nothing else trains the sampled sub-networks"),
        (lambda: Distillation(temperature=2), "temperature 2 has no effect without"),
        (lambda: FullWeight(end=0), "full_weight must be above 0"),
    ],
)
def test_a_wrong_objective_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
