"""The penalty in the Trainer of transformers, and so of trl and others that build on it."""

from typing import Any

from torch import nn

from consolidate.ewc.penalty import STEPS, WeightPenalty, check_proximal
from consolidate.runtime.shards import is_sharded
from formats.errors import UsageError, install

_HELD = "_max_grad_norm_within_a_step"
_CALLBACK = "_penalty_callback"
_STEP_IN_BACKWARD = ("DeepSpeedOptimizerWrapper", "LayerWiseDummyOptimizer", "Lomo", "AdaLomo")


def penalty_callback(penalty: WeightPenalty, *, step: str = "gradient") -> Any:
    """Make the callback that adds a penalty to a `transformers.Trainer`.

    Once per optimizer step, when all micro-batches have been accumulated, it unscales the gradients
    if the Trainer has not, adds the penalty's, and clips the sum to the ``max_grad_norm`` of the
    TrainingArguments. The Trainer itself does not clip, as it would clip the loss's gradient
    alone. The penalty's value is logged as ``penalty`` beside ``loss`` and ``grad_norm``, which
    remain the task's own; trackers see it if the callback comes before theirs.

    Args:
        penalty: Made for the model that is trained, after an adapter was added to it.
        step: ``gradient``, or ``proximal``, which needs SGD, Adam or AdamW; then the Trainer clips.

    Returns:
        A ``transformers.TrainerCallback``, for ``Trainer(…, callbacks=[…])``.

    Raises:
        UsageError: `penalty` is not a penalty, `step` is neither, or transformers is not installed;
            or, when training begins, the penalty is on parameters that the model does not have or
            that are frozen, the optimizer's rate is not known, it steps within ``backward`` (as
            with DeepSpeed), or there is another such callback.
    """
    if step not in STEPS:
        raise UsageError(f"step {step!r}: expected one of {', '.join(STEPS)}")
    if not hasattr(penalty, "add_gradient_"):
        raise UsageError(f"penalty: expected a Penalty, found {type(penalty).__name__}")
    proximal = getattr(penalty, "proximal_step_", None)
    if step == "proximal" and proximal is None:
        raise UsageError(
            "step 'proximal' cannot be combined with a penalty on merged weights or by blocks, "
            "which is not separable: use gradient"
        )
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        needed = install("transformers", error)
        raise UsageError(f"the callback needs transformers: {needed}") from error

    class PenaltyCallback(TrainerCallback):
        hook: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if hasattr(state, _CALLBACK):  # a state is of one training
                raise UsageError(
                    "the Trainer has two penalty callbacks, or one twice, and would clip before "
                    "the second adds its gradient: give it one, once"
                )
            setattr(state, _CALLBACK, self)
            _check_steps(kwargs["optimizer"])
            there = {id(parameter) for parameter in kwargs["model"].parameters()}
            if any(id(parameter) not in there for parameter in penalty.parameters()):
                if is_sharded(kwargs["model"]):
                    raise UsageError(
                        "the Trainer has sharded the model (FSDP), and the callback needs it "
                        "whole: use DDP, or `consolidate finetune --shard`"
                    )
                raise UsageError(
                    "the penalty is on parameters that are not the trained model's: make it for "
                    "the model that the Trainer is given, after any change of its modules"
                )
            if not any(parameter.requires_grad for parameter in penalty.parameters()):
                raise UsageError(
                    "the model trains none of the penalized parameters, as after peft has frozen "
                    "them: add the adapter first (get_peft_model), then load the penalty"
                )
            _give_back(args)  # of a run that was interrupted within a step
            self.remove_hook()
            if step == "proximal":
                inner = _inner(kwargs["optimizer"])
                check_proximal(inner)
                self.hook = inner.register_step_post_hook(proximal)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if step == "gradient" and not hasattr(args, _HELD):
                setattr(args, _HELD, args.max_grad_norm)
                args.max_grad_norm = 0.0

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if step == "proximal":
                return
            _unscale(kwargs["optimizer"])
            penalty.add_gradient_()
            _give_back(args)
            if args.max_grad_norm:
                nn.utils.clip_grad_norm_(kwargs["model"].parameters(), args.max_grad_norm)

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            logs = kwargs["logs"]
            if "loss" in logs:
                # The Trainer has put a copy into its history already.
                logs["penalty"] = state.log_history[-1]["penalty"] = penalty.value()

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.remove_hook()

        def remove_hook(self) -> None:
            if self.hook is not None:
                self.hook.remove()
                self.hook = None

    return PenaltyCallback()


def _give_back(args: Any) -> None:
    """Give the TrainingArguments their norm back, which is 0 within a step."""
    if hasattr(args, _HELD):
        args.max_grad_norm = getattr(args, _HELD)
        delattr(args, _HELD)


def _check_steps(optimizer: Any) -> None:
    """Refuse an optimizer that has stepped before the callback is called."""
    while optimizer is not None:
        if (name := type(optimizer).__name__) in _STEP_IN_BACKWARD:
            raise UsageError(
                f"the callback cannot add a penalty's gradient with {name}, which takes its steps "
                "within backward: train without DeepSpeed, and with another optimizer"
            )
        optimizer = getattr(optimizer, "optimizer", None)


def _inner(optimizer: Any) -> Any:
    """Unwrap what accelerate wraps around torch's optimizer."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _unscale(optimizer: Any) -> None:
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None:
        return
    try:
        scaler.unscale_(_inner(optimizer))
    except RuntimeError as error:
        if "already been called" not in str(error):  # by the Trainer, to measure the norm
            raise
