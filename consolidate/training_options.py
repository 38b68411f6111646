"""Options of `finetune` alone: λ, the penalty, the output layer, the descent, the measuring."""

import click

from consolidate.options import BATCH_SIZE, numbers_of, options


def _strengths(
    context: click.Context, option: click.Parameter, value: str | None
) -> float | list[float] | str | None:
    if value is None or value == "auto":
        return value
    try:
        numbers = numbers_of(value)
    except ValueError:
        raise click.BadParameter(
            f"{value!r}: expected a number, several with commas between them, or auto"
        ) from None
    if not all(0 <= number < float("inf") for number in numbers):
        raise click.BadParameter(f"{value!r}: expected finite numbers from 0")
    return numbers if len(numbers) > 1 else numbers[0]


STRENGTH = options(
    click.option(
        "--ewc-lambda",
        metavar="X|X,Y,…|auto",
        callback=_strengths,
        help="λ, the strength of the penalty. Several, or auto, are trained from the same start "
        "and one of them is chosen: see --validation and --choose.",
    ),
    click.option(
        "--validation",
        multiple=True,
        metavar="NAME=DATA",
        help="Held-out data to choose λ by, of old tasks and of the new one; may be repeated. A "
        "tenth of the new task's data is held out where none is given for it.",
    ),
    click.option(
        "--choose",
        type=click.Choice(["mean", "least", "most"]),
        help="mean: the λ of the largest mean score. least: the least that stays under "
        "--max-forgetting. most: the largest that keeps 95% of what the new task gains. By default "
        "most without old data, least with --max-forgetting, else mean.",
    ),
    click.option(
        "--search-plot",
        metavar="FILE",
        help="Draw the search as .png, .svg or .pdf (needs matplotlib).",
    ),
)

PENALTY = options(
    click.option(
        "--penalty",
        type=click.Choice(["ewc", "l2", "none"]),
        default="ewc",
        show_default=True,
        help="ewc holds each weight by its Fisher, l2 all alike.",
    ),
    click.option(
        "--penalty-step",
        type=click.Choice(["gradient", "proximal"]),
        default="gradient",
        show_default=True,
        help="proximal: implicitly, after the optimizer's step; stable for every λ.",
    ),
    click.option(
        "--penalty-dtype",
        type=click.Choice(["float32", "bfloat16"]),
        help="Of Λ and μ in memory; as they are stored by default.",
    ),
    click.option(
        "--penalty-device",
        metavar="DEVICE",
        help="Where Λ and μ are; beside the weights by default.",
    ),
    click.option(
        "--fisher",
        metavar="PATH|REPO",
        help="Take the Fisher from here; from beside the weights by default.",
    ),
)

ADAPTER = options(
    click.option(
        "--lora-rank",
        type=click.IntRange(min=1),
        metavar="R",
        help="Train a fresh low-rank adapter W + s·B·A in place of the weights W. The output is a "
        "whole checkpoint, with the adapter merged (needs peft).",
    ),
    click.option(
        "--lora-targets",
        multiple=True,
        metavar="PATTERN",
        help="Layers that get one, such as '*.q_proj' or q_proj; may be repeated. By default those "
        "that peft has for the architecture.",
    ),
    click.option(
        "--lora-alpha",
        type=click.FloatRange(min=0, min_open=True),
        metavar="X",
        help="α of s = α/R; R by default, so that s = 1.",
    ),
    click.option("--rslora", is_flag=True, help="s = α/√R instead."),
    click.option(
        "--penalty-on",
        type=click.Choice(["adapter", "merged"]),
        help="Where an adapter is trained: adapter holds its own parameters by their Fisher, "
        "merged holds W + s·B·A by the Fisher of the whole weights. By default adapter for a "
        "CHECKPOINT that is an adapter with a Fisher, else merged.",
    ),
)

HEAD = options(
    click.option(
        "--head",
        type=click.Choice(["keep", "new", "extend"]),
        default="keep",
        show_default=True,
        help="The output layer: keep it, for data with its labels; new puts it aside for the tasks "
        "that use it and starts a fresh one; extend adds rows for new labels.",
    ),
    click.option(
        "--head-parameters",
        multiple=True,
        metavar="PATTERN",
        help="Names of the output layer's parameters; by default those outside the base model of "
        "transformers, else those of the last module that has some. May be repeated.",
    ),
)

TRAINING = options(
    click.option(
        "--epochs", type=click.IntRange(min=1), help="Passes over the data; 1 by default."
    ),
    click.option("--max-steps", type=click.IntRange(min=1), help="Optimizer steps in all."),
    click.option(
        "--max-examples",
        type=click.IntRange(min=1),
        help="Train on a seeded random subset of this size.",
    ),
    BATCH_SIZE,
    click.option(
        "--gradient-accumulation-steps",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Batches per optimizer step.",
    ),
    click.option(
        "--learning-rate",
        type=click.FloatRange(min=0, min_open=True),
        default=5e-5,
        show_default=True,
        help="The peak of the schedule.",
    ),
    click.option(
        "--optimizer",
        type=click.Choice(["adamw", "adam", "sgd"]),
        default="adamw",
        show_default=True,
    ),
    click.option(
        "--momentum",
        type=click.FloatRange(0, 1, max_open=True),
        help="Of sgd; 0 by default.",
    ),
    click.option(
        "--weight-decay",
        type=click.FloatRange(min=0),
        default=0.0,
        show_default=True,
        help="0 by default: it would pull unprotected weights to zero, task after task.",
    ),
    click.option(
        "--lr-scheduler",
        type=click.Choice(["constant", "linear", "cosine"]),
        default="constant",
        show_default=True,
        help="After the warm-up.",
    ),
    click.option("--warmup-steps", type=click.IntRange(min=0), default=0, show_default=True),
    click.option(
        "--max-grad-norm",
        type=click.FloatRange(min=0, min_open=True),
        help="Clip the norm of the whole gradient, an added penalty's included.",
    ),
    click.option(
        "--mixed-precision",
        type=click.Choice(["no", "bf16", "fp16"]),
        default="no",
        show_default=True,
        help="Autocast of the forward pass; the master weights are float32.",
    ),
    click.option(
        "--norm-statistics",
        type=click.Choice(["frozen", "update"]),
        help="Running statistics of batch norms. By default frozen, whatever the penalty; update "
        "only without a penalty, a Fisher and another task to evaluate.",
    ),
)

EVALUATION = options(
    click.option(
        "--evaluate",
        multiple=True,
        metavar="NAME=DATA",
        help="Measure before, after each epoch and at the end; may be repeated. A task of that "
        "NAME whose output layer was put aside is measured with that.",
    ),
    click.option(
        "--max-forgetting",
        type=click.FloatRange(min=0),
        metavar="X",
        help="Leave with exit code 5, the output kept as DIR.failed-forgetting, where an old task "
        "that --evaluate names loses more than this in score: accuracy, else minus the loss.",
    ),
    click.option(
        "--evaluate-every",
        type=click.IntRange(min=1),
        metavar="STEPS",
        help="Measure after so many optimizer steps too, and at the last.",
    ),
    click.option(
        "--log-every", type=click.IntRange(min=1), default=50, show_default=True, help="In steps."
    ),
)
