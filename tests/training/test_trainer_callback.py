"""The callback in the real Trainer, against loops by hand with the penalty in autograd."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from consolidate.ewc.block_penalty import BlockPenalty
from consolidate.ewc.low_rank_penalty import MergedPenalty
from consolidate.ewc.penalty import Penalty
from consolidate.training.trainer_callback import penalty_callback
from formats.errors import UsageError
from formats.fisher_json import Block

LAMBDA = 4.0
EXAMPLES = 6


class Network(nn.Module):
    """What the Trainer asks of a model: it returns its own loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(inputs)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def examples() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"inputs": torch.randn(5, generator=generator).double(), "labels": i % 3}
        for i in range(EXAMPLES)
    ]


def fisher_and_anchor(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    fisher = {name: torch.full_like(p, 0.5) for name, p in model.named_parameters()}
    return fisher, {name: p.detach() + 0.3 for name, p in model.named_parameters()}


def by_blocks(model: nn.Module) -> BlockPenalty:
    """As the penalty of `fisher_and_anchor`: 0.5 · out · I in place of 0.5 for each layer."""
    factors, blocks = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            one = torch.eye(module.in_features + 1, dtype=torch.float64)
            factors[f"{name}.weight.R"] = 0.5 * module.out_features * one
            blocks[f"{name}.weight.R"] = Block("R", (1,), (f"{name}.weight", f"{name}.bias"))
    return BlockPenalty(
        model, *fisher_and_anchor(model), factors=factors, blocks=blocks, ewc_lambda=LAMBDA
    )


def trainer(
    model: nn.Module, folder: Path, optimizer: Any, callback: Any, steps: int = 3, **options: Any
) -> Trainer:
    """One step takes all examples, so that their order does not matter."""
    size = EXAMPLES // options.get("gradient_accumulation_steps", 1)
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        num_train_epochs=steps,
        per_device_train_batch_size=size,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return Trainer(
        model,
        arguments,
        train_dataset=examples(),
        optimizers=(optimizer, schedule),
        callbacks=[callback],
    )


def by_hand(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float | None,
    steps: int = 3,
    autocast: bool = False,
) -> list[float]:
    """Train with the penalty in the loss; return its value after each step."""
    fisher, anchor = fisher_and_anchor(model)
    rows = examples()
    inputs = torch.stack([row["inputs"] for row in rows])
    labels = torch.tensor([row["labels"] for row in rows])
    values = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(inputs.to(next(model.parameters())), labels)["loss"]
        pull = sum((fisher[n] * (p - anchor[n]) ** 2).sum() for n, p in model.named_parameters())
        (loss + LAMBDA / 2 * pull).backward()
        if max_grad_norm is not None:
            assert nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm) > max_grad_norm
        optimizer.step()
        with torch.no_grad():
            moves = [(fisher[n] * (p - anchor[n]) ** 2).sum() for n, p in model.named_parameters()]
        values.append(LAMBDA / 2 * sum(moves).item())
    return values


def assert_alike(model: nn.Module, expected: nn.Module, **tolerance: float) -> None:
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, **tolerance)


EXACT = {"rtol": 1e-12, "atol": 1e-14}


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("blocks", [False, True])
def test_the_trainer_takes_the_steps_of_a_loop_by_hand(
    tmp_path: Path, kind: Any, accumulate: int, max_grad_norm: float | None, blocks: bool
) -> None:
    model = Network()
    twin = copy.deepcopy(model)
    diagonal = Penalty(model, *fisher_and_anchor(model), ewc_lambda=LAMBDA)
    penalty = by_blocks(model) if blocks else diagonal
    runner = trainer(
        model,
        tmp_path,
        kind(model.parameters(), lr=0.1),
        penalty_callback(penalty),
        gradient_accumulation_steps=accumulate,
        max_grad_norm=max_grad_norm or 0.0,
    )
    runner.train()
    values = by_hand(twin, kind(twin.parameters(), lr=0.1), max_grad_norm)
    assert_alike(model, twin, **EXACT)
    logged = [entry["penalty"] for entry in runner.state.log_history if "loss" in entry]
    assert logged == pytest.approx(values)
    assert runner.args.max_grad_norm == (max_grad_norm or 0.0)  # what the user set is back


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_loss_scaler_is_unscaled_once_and_its_skipped_steps_stay_skipped(
    tmp_path: Path, unscaled: bool
) -> None:
    model = Network().float()
    twin = copy.deepcopy(model)
    penalty = Penalty(model, *fisher_and_anchor(model), ewc_lambda=LAMBDA)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    runner = trainer(
        model, tmp_path, optimizer, penalty_callback(penalty), steps=4, max_grad_norm=0.5
    )
    for row in runner.train_dataset:
        row["inputs"] = row["inputs"].float()
    # accelerate's fp16 is refused on a CPU; a scaler of the CPU is not.
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    runner.accelerator.scaler = scaler
    factors = iter([float("inf"), 1.0, 1.0, 1.0])
    model.layers[0].weight.register_hook(lambda gradient: gradient * next(factors))
    if unscaled:  # as fp16 on a GPU has it: the Trainer unscales to measure the norm
        runner.accelerator.native_amp = True
        runner.accelerator.state._mixed_precision = "fp16"
        runner.accelerator.prepare_model = lambda model, **_: model
    runner.train()
    assert scaler.get_scale() == 512
    by_hand(twin, torch.optim.SGD(twin.parameters(), lr=0.1), 0.5, steps=3)
    assert_alike(model, twin, rtol=1e-5, atol=1e-6)


def test_bf16_on_the_cpu(tmp_path: Path) -> None:
    model = Network().float()
    twin = copy.deepcopy(model)
    penalty = Penalty(model, *fisher_and_anchor(model), ewc_lambda=LAMBDA)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    runner = trainer(
        model, tmp_path, optimizer, penalty_callback(penalty), bf16=True, max_grad_norm=0.5
    )
    for row in runner.train_dataset:
        row["inputs"] = row["inputs"].float()
    runner.train()
    by_hand(twin, torch.optim.SGD(twin.parameters(), lr=0.1), 0.5, autocast=True)
    assert_alike(model, twin, rtol=1e-2, atol=1e-3)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_proximal_steps_in_the_trainer(tmp_path: Path) -> None:
    model = Network()
    twin = copy.deepcopy(model)
    penalty = Penalty(model, *fisher_and_anchor(model), ewc_lambda=LAMBDA)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    callback = penalty_callback(penalty, step="proximal")
    runner = trainer(model, tmp_path, optimizer, callback, max_grad_norm=0.5)
    runner.train()
    assert not optimizer._optimizer_step_post_hooks
    held = Penalty(twin, *fisher_and_anchor(twin), ewc_lambda=LAMBDA)
    other = torch.optim.AdamW(twin.parameters(), lr=0.1)
    rows = examples()
    inputs = torch.stack([row["inputs"] for row in rows])
    labels = torch.tensor([row["labels"] for row in rows])
    for _ in range(3):
        other.zero_grad()
        twin(inputs, labels)["loss"].backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        other.step()
        held.proximal_step_(other)
    assert_alike(model, twin, **EXACT)
    logged = [entry["penalty"] for entry in runner.state.log_history if "loss" in entry]
    assert logged[-1] == pytest.approx(held.value())


@pytest.mark.parametrize("again", ["the same Trainer", "another with the same arguments"])
def test_a_run_that_was_interrupted_clips_as_before(tmp_path: Path, again: str) -> None:
    model = Network()
    penalty = Penalty(model, *fisher_and_anchor(model), ewc_lambda=LAMBDA)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    runner = trainer(model, tmp_path, optimizer, penalty_callback(penalty), max_grad_norm=0.5)
    fault = model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runner.train()
    fault.remove()
    twin = copy.deepcopy(model)
    if again != "the same Trainer":
        runner = Trainer(
            model,
            runner.args,
            train_dataset=examples(),
            optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
            callbacks=[penalty_callback(penalty)],
        )
    runner.train()
    by_hand(twin, torch.optim.SGD(twin.parameters(), lr=0.1), 0.5)
    assert_alike(model, twin, **EXACT)
    assert runner.args.max_grad_norm == 0.5


def test_a_second_callback_is_refused(tmp_path: Path) -> None:
    model = Network()
    penalty = Penalty(model, *fisher_and_anchor(model), ewc_lambda=LAMBDA)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    runner = trainer(model, tmp_path, optimizer, penalty_callback(penalty))
    runner.add_callback(penalty_callback(penalty))
    with pytest.raises(UsageError, match="two penalty callbacks"):
        runner.train()
    callback = penalty_callback(penalty)
    runner = trainer(model, tmp_path, optimizer, callback)
    runner.callback_handler.callbacks.insert(0, callback)
    with pytest.raises(UsageError, match="or one twice"):
        runner.train()


@pytest.mark.parametrize("name", ["DeepSpeedOptimizerWrapper", "LayerWiseDummyOptimizer"])
def test_optimizers_that_have_stepped_before_are_refused(name: str) -> None:
    model = Network()
    penalty = Penalty(model, *fisher_and_anchor(model), ewc_lambda=LAMBDA)
    inner = type(name, (), {})()
    outer = SimpleNamespace(optimizer=inner)
    with pytest.raises(UsageError, match=f"{name}, which takes its steps within backward"):
        penalty_callback(penalty).on_train_begin(
            SimpleNamespace(), SimpleNamespace(), None, model=model, optimizer=outer
        )


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model, other = Network(), Network()
    penalty = Penalty(other, *fisher_and_anchor(other), ewc_lambda=LAMBDA)
    with pytest.raises(UsageError, match="expected a Penalty, found str"):
        penalty_callback("my-model")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"'implicit'.*gradient, proximal"):
        penalty_callback(penalty, step="implicit")
    for inseparable in (MergedPenalty.__new__(MergedPenalty), by_blocks(model)):
        with pytest.raises(UsageError, match="not separable"):
            penalty_callback(inseparable, step="proximal")
    optimizer = torch.optim.RMSprop(model.parameters())
    with pytest.raises(UsageError, match="not the trained model's"):
        trainer(model, tmp_path, optimizer, penalty_callback(penalty)).train()
    penalty = Penalty(model, *fisher_and_anchor(model), ewc_lambda=LAMBDA)
    callback = penalty_callback(penalty, step="proximal")
    with pytest.raises(UsageError, match="not RMSprop"):
        trainer(model, tmp_path, optimizer, callback).train()


@pytest.mark.parametrize("head", [False, True])
def test_adapters_of_peft_are_held_like_any_parameter(tmp_path: Path, head: bool):
    config = peft.LoraConfig(
        r=2,
        target_modules=["layers.0"] if head else ["layers.0", "layers.2"],
        modules_to_save=["layers.2"] if head else None,
        init_lora_weights=False,
    )
    model = peft.get_peft_model(Network(), config).double()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 4
    assert any("modules_to_save" in name for name, _ in trained) == head
    before = trained[0][1].detach().clone()
    reference = copy.deepcopy(model)
    by_hand(reference, torch.optim.SGD(reference.parameters(), lr=0.1), max_grad_norm=0.5)
    fisher, anchor = fisher_and_anchor(model)
    held = [name for name, _ in trained]
    penalty = Penalty(
        trained,
        {name: fisher[name] for name in held},
        {name: anchor[name] for name in held},
        ewc_lambda=LAMBDA,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    callback = penalty_callback(penalty)
    trainer(model, tmp_path, optimizer, callback, max_grad_norm=0.5).train()
    assert_alike(model, reference, **EXACT)
    assert not torch.equal(trained[0][1], before)


def test_a_penalty_on_weights_that_an_adapter_has_frozen_is_refused(tmp_path: Path) -> None:
    model = Network().float()
    fisher, anchor = fisher_and_anchor(model)
    penalty = Penalty(model, fisher, anchor, ewc_lambda=LAMBDA)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    with pytest.raises(UsageError, match=r"frozen them: add the adapter first"):
        trainer(adapted, tmp_path, optimizer, penalty_callback(penalty)).train()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_wrapped_model_has_the_names_of_the_one_inside(wrap: Any) -> None:
    model = Network()
    fisher, anchor = fisher_and_anchor(model)
    wrapped = Penalty(wrap(model), fisher, anchor, ewc_lambda=LAMBDA)
    assert wrapped.value() == Penalty(model, fisher, anchor, ewc_lambda=LAMBDA).value() > 0
    alike = Penalty.l2(wrap(model), anchor, ewc_lambda=LAMBDA)
    assert alike.value() == Penalty.l2(model, anchor, ewc_lambda=LAMBDA).value() > 0
    # A Fisher that was measured with the wrapper's names fits the wrapper.
    prefix = "module." if wrap is nn.DataParallel else "_orig_mod."
    own = ({f"{prefix}{name}": value for name, value in each.items()} for each in (fisher, anchor))
    assert Penalty(wrap(model), *own, ewc_lambda=LAMBDA).value() == wrapped.value()
