import torch

from flextron_lit.elastic import ElasticBackbone
from flextron_lit.routers.dynamic import InputScale
from tests.conftest import SPACE, make_llama


@torch.no_grad()
def test_it_runs_the_full_network_and_keeps_the_moments_of_every_input(tokens):
    backbone = ElasticBackbone(make_llama(), SPACE)
    layers = backbone.model.model.layers
    seen = {}
    for layer, module in enumerate(layers):
        for kind, norm in enumerate((module.input_layernorm, module.post_attention_layernorm)):
            norm.register_forward_hook(lambda _, __, out, block=2 * layer + kind: seen.__setitem__(block, out))
    wanted = backbone.model(tokens).logits
    scale = InputScale(backbone.space)
    with backbone.use(scale):
        torch.testing.assert_close(backbone.model(tokens).logits, wanted, atol=1e-5, rtol=1e-5)
    mean, std = scale.mean_and_std()
    assert mean.shape == std.shape == (6, 32)
    for block, inputs in seen.items():
        torch.testing.assert_close(mean[block], inputs.flatten(0, 1).mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(std[block], inputs.flatten(0, 1).std(0), atol=1e-5, rtol=1e-4)
    # blocks read different things
    assert not torch.allclose(mean[0], mean[2], atol=0.1)
