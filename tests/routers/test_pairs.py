import torch

from flextron_lit.routers.pairs import Memory
from tests.options import seed


def rows(*numbers):
    return {"input0": torch.tensor([[n, n] for n in numbers]), "target": torch.tensor(numbers)}


def test_the_oldest_rows_are_forgotten_first():
    memory = Memory(5)
    assert len(memory) == 0
    memory.add(rows(1, 2, 3))
    assert len(memory) == 3
    memory.add(rows(4, 5, 6))
    assert memory.columns["target"].tolist() == [2, 3, 4, 5, 6]
    memory.add(rows(*range(10, 20)))
    assert memory.columns["target"].tolist() == [15, 16, 17, 18, 19]
    assert len(memory) == 5


def test_a_sample_takes_whole_rows_evenly_and_by_its_generator_alone():
    memory = Memory(8)
    memory.add(rows(*range(8)))
    sample = memory.sample(4000, torch.Generator().manual_seed(seed(0)))
    assert torch.equal(sample["input0"][:, 0], sample["target"])
    counts = sample["target"].bincount(minlength=8)
    assert counts.min() > 400
    again = memory.sample(4000, torch.Generator().manual_seed(seed(0)))
    assert torch.equal(again["target"], sample["target"])
    other = memory.sample(4000, torch.Generator().manual_seed(seed(1)))
    assert not torch.equal(other["target"], sample["target"])


def test_fewer_rows_than_wanted_come_several_times():
    memory = Memory(8)
    memory.add(rows(7))
    assert memory.sample(3, torch.Generator())["target"].tolist() == [7, 7, 7]


def test_it_follows_the_rows_to_their_device():
    memory = Memory(8)
    memory.add(rows(1, 2))
    memory.add({name: column.to("meta") for name, column in rows(3).items()})
    assert {str(column.device) for column in memory.columns.values()} == {"meta"}
    assert len(memory) == 3
