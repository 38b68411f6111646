import torch

from consolidate.merging import merge_online


def test_the_total_decays_and_the_new_task_is_weighed() -> None:
    total = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([4.0])}
    fisher = {"a": torch.tensor([10.0, 0.0]), "c": torch.tensor([3.0])}
    merged = merge_online(total, fisher, gamma=0.5, weight=2.0)
    assert list(merged) == ["a", "b", "c"]
    assert merged["a"].tolist() == [20.5, 1.0]
    assert merged["b"].tolist() == [2.0]
    assert merged["c"].tolist() == [6.0]


def test_a_narrow_total_is_added_in_float32() -> None:
    total = {"a": torch.ones(1, dtype=torch.bfloat16)}
    merged = merge_online(total, {"a": torch.full((1,), 1e-3)})
    assert merged["a"].dtype == torch.float32
    assert merged["a"].item() == torch.tensor(1.0 + 1e-3).item()


def test_without_a_past_the_task_is_the_total() -> None:
    fisher = {"a": torch.tensor([0.1, 0.0])}
    assert torch.equal(merge_online({}, fisher)["a"], fisher["a"])
