import pytest
import torch

from flextron_lit.costs import Workload, dynamic_table
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.losses.cross_entropy import IGNORED
from flextron_lit.report.spending.routed_text import Recording, given, route_text
from flextron_lit.routers.dynamic import DynamicPolicy, DynamicRouter
from tests.conftest import SPACE, make_llama
from tests.options import seed
from tests.report.spending.texts import byte_tokenizer, routed_text, whole

BATCHES = [(2, 24), (1, 24)]


@pytest.fixture(scope="module")
def backbone():
    return ElasticBackbone(make_llama(vocab_size=257), SPACE)


@pytest.fixture(scope="module")
def table(backbone):
    return dynamic_table(backbone, "flops", Workload())


@pytest.fixture
def policy(backbone, table):
    """Choices that differ from token to token."""
    router = DynamicRouter(backbone.space, backbone.model.config.hidden_size, torch.linspace(0.3, 1, 3))
    with torch.no_grad():
        router.weight.normal_(generator=torch.Generator().manual_seed(seed(5)))
    return DynamicPolicy(router, table, [0.7], [0.0])


def batches():
    generator = torch.Generator().manual_seed(seed(4))
    made = []
    for rows, tokens in BATCHES:
        ids = torch.randint(65, 91, (rows, tokens), generator=generator)
        positions = torch.arange(tokens).expand(rows, -1).clone()
        positions[:, 10:] -= 10  # a second document begins
        made.append({"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, IGNORED)})
    return made


def test_what_is_recorded_is_what_ran(backbone, policy):
    (batch, _) = batches()
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    recording = Recording(policy)
    with torch.no_grad():
        with backbone.use(policy):
            alone = backbone.model(**inputs, use_cache=False).logits
        counted = policy.take()
        with backbone.use(recording):
            recorded = backbone.model(**inputs, use_cache=False).logits
    assert torch.equal(alone, recorded)
    assert recording.choices.shape == (2, 24, len(backbone.space))
    one_hot = torch.nn.functional.one_hot(recording.choices, backbone.space.num_choices)
    assert torch.equal(one_hot.sum((0, 1)).double(), counted)
    assert len(counted[0].nonzero()) > 1, "all tokens are alike: nothing is tested"
    assert policy.take().sum() == 0, "a recorded pass is not counted"


def test_costs_and_widths_are_those_of_the_choices(backbone, table):
    generator = torch.Generator().manual_seed(seed(6))
    subs = [backbone.space.full(), backbone.space.smallest(), *(backbone.space.random(generator) for _ in range(5))]
    got = given(torch.tensor([sub.choices for sub in subs]), backbone.space, table)
    for index, sub in enumerate(subs):
        widths = backbone.space.widths(sub)
        assert float(got["cost"][index]) == pytest.approx(table.ratio(sub), rel=1e-6)
        for kind in ("mlp", "attention"):
            shares = [w / b.full for b, w in zip(backbone.space.blocks, widths, strict=True) if b.kind == kind]
            assert float(got[f"{kind}_width"][index]) == pytest.approx(sum(shares) / len(shares), rel=1e-6)
    assert got["mlp_width"][0] == 1
    assert got["mlp_width"][1] == 0


def test_every_token_has_its_loss_and_cost(backbone, policy, table):
    made = batches()
    routed = route_text(backbone, policy, byte_tokenizer(), made)
    ids = [i for batch in made for i in batch["input_ids"].flatten().tolist()]
    assert whole(routed) == byte_tokenizer().decode(ids)
    assert len(routed) == len(ids) == 3 * 24
    counted = policy.take()
    assert counted.sum() == 0
    # losses are of the token that follows: none behind the last token of a stretch, nor across documents
    missing = routed.loss.isnan().view(3, 24)
    assert [row.nonzero().flatten().tolist() for row in missing] == [[9, 23]] * 3
    with torch.no_grad():
        for losses, selection in ((routed.loss, policy), (routed.full_loss, backbone.space.full())):
            means = []
            for batch in made:
                inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
                with backbone.use(selection):
                    output = backbone.model(**inputs, labels=batch["labels"], use_cache=False)
                means += [output.loss] * len(batch["labels"])
            assert float(losses.nanmean()) == pytest.approx(float(torch.stack(means).mean()), rel=1e-5)
    shares = policy.take() / len(ids)
    assert float(routed.cost.mean()) == pytest.approx(float(table.expected(shares) / table.full), rel=1e-5)
    assert routed.cost.unique().numel() > 5
    assert [piece.start for piece in routed.pieces if piece.cut] == [0, 24, 48]
    assert routed.begins.nonzero().flatten().tolist() == [0, 10, 24, 34, 48, 58]


def test_an_excerpt_begins_with_a_document_that_is_long_enough():
    text = routed_text("one two three four five six", begins=(4, 14))
    assert whole(text.excerpt(100)) == whole(text)
    assert whole(text.excerpt(10)) == "one two th"
    later = routed_text("one two three four five six", begins=(4, 14))
    later.begins[0] = False
    assert whole(later.excerpt(10)) == "two three "
    assert later.excerpt(10).cost.tolist() == later.cost[4:14].tolist()
    assert later.excerpt(10).classes == later.classes[4:14]
    assert [(p.start, p.stop) for p in later.excerpt(10).pieces] == [(i, i + 1) for i in range(10)]
    assert [p.cut for p in later.excerpt(10).pieces] == [True] + [False] * 9
    # no document has as much behind it
    assert whole(later.excerpt(25)) == "one two three four five s"


def test_an_excerpt_keeps_characters_whole():
    assert whole(routed_text("世界世界").excerpt(4)) == "世界"


def test_an_excerpt_stays_within_a_stretch_if_it_can(backbone, policy):
    routed = route_text(backbone, policy, byte_tokenizer(), batches())
    assert whole(routed.excerpt(14)) == whole(routed)[:14]
    assert sum(piece.cut for piece in routed.excerpt(24).pieces) == 1
    assert sum(piece.cut for piece in routed.excerpt(30).pieces) == 2
