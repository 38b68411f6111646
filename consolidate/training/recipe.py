"""How a fine-tuning descends, as one value."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """How a run descends: the options of `finetune` of these names."""

    penalty_step: str = "gradient"
    epochs: int | None = None
    max_steps: int | None = None
    max_examples: int | None = None
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    learning_rate: float = 5e-5
    optimizer: str = "adamw"
    momentum: float | None = None
    weight_decay: float = 0.0
    lr_scheduler: str = "constant"
    warmup_steps: int = 0
    max_grad_norm: float | None = None
    mixed_precision: str = "no"
    norm_statistics: str = "frozen"
    log_every: int = 50
    evaluate_every: int | None = None
    seed: int = 0

    def step_examples(self, processes: int) -> int:
        """Return the examples of one optimizer step, over all micro-batches and processes."""
        return self.batch_size * self.gradient_accumulation_steps * processes
