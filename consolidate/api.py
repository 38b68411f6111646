"""The commands as functions, with all their keywords.

Written by scripts/write_docs from consolidate/options.py: change the options there.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from consolidate.fields import gather
from consolidate.options import (
    Columns,
    EvaluateOptions,
    FinetuneOptions,
    FisherOptions,
    MergeOptions,
    PushOptions,
    RemapOptions,
    ReportOptions,
    RunOptions,
    ShowOptions,
    VerifyOptions,
)
from consolidate.results import (
    EvaluateResult,
    FinetuneResult,
    FisherResult,
    MergeResult,
    PushResult,
    RemapResult,
    ReportResult,
    RunResult,
    ShowResult,
    VerifyResult,
)
from consolidate.training.loop import Step


def fisher(
    checkpoint: str | Path,
    data: str | Path | None = None,
    *,
    task: str | None = None,
    generate: int | None = None,
    prompts: str | Path | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    save_generated: str | Path | None = None,
    columns: Columns | None = None,
    split: str | None = None,
    max_length: int | None = None,
    pack: bool = False,
    loss_on: str | None = None,
    image_size: int | None = None,
    crop_pct: float | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    image_interpolation: str | None = None,
    objective: str | None = None,
    model: str | None = None,
    revision: str | None = None,
    base_model: str | Path | None = None,
    device: str | None = None,
    freeze: Sequence[str] = (),
    gradient_checkpointing: bool = False,
    shard: bool = False,
    dtype: torch.dtype | str | None = None,
    estimator: str | None = None,
    mc_samples: int | None = None,
    max_outcomes: int | None = None,
    max_examples: int | None = None,
    batch_size: int | None = 16,
    tolerance: float | None = None,
    accumulate_dtype: torch.dtype | str = "float32",
    check: bool = False,
    kernel: bool = False,
    structure: str | None = None,
    seed: int = 0,
    add: bool = False,
    after: str | Path | None = None,
    merge_rule: str | None = None,
    gamma: float | None = None,
    task_weight: float | str = 1.0,
    output_dir: str | Path | None = None,
    save_every_minutes: float = 5.0,
    restart: bool = False,
    overwrite: bool = False,
    data_digest: bool = True,
    dry_run: bool = False,
) -> FisherResult:
    """Measure the Fisher of a checkpoint on a task's data and store it beside the weights.

    F_i = (1/N) Σ_x E_{y ~ p(y|x, θ)} [(∂ log p(y|x, θ)/∂θ_i)²], summed over units of each example;
    with `generate` on texts that a language model writes itself, with `structure="inputs"` also
    matrices of the layers' inputs.

    Args:
        checkpoint: A folder, a weights file, or a repository on the Hub.
        data: The task's data: file, folder, Hub dataset or task.toml. Required without `generate`.
        task: Name of the task. (default: that of the data; self with `generate`)
        generate: Measure on N texts that a causal language model generates itself, without `data`,
            each of at most `max_length` tokens (default 128).
        prompts: File with a prompt on each line, used in turn; tokens of prompts are not counted. A
            model with a chat template reads each as a user's turn. (default: what the chat template
            writes before a user's words; without one the beginning-of-text token, else the end-of-
            text token)
        temperature: Divide the logits by this before sampling texts. Labels are then sampled again,
            from the model itself.
        top_p: Sample texts from the most likely tokens that together have this probability. Labels
            are then sampled again, from the model itself.
        save_generated: Write the texts to FILE as JSON Lines; they are not stored otherwise.
        columns: Names of the columns by role; None stands for the usual ones.
        split: Split of `data`, a dataset with several.
        max_length: Truncate texts to this many tokens. (default: the model's limit)
        pack: Fill each sequence with consecutive texts (language models).
        loss_on: Tokens that a causal language model predicts: the assistant's turns of chats, the
            completions of prompts, or all. (default: completion for prompts with completions, else
            all)
        image_size: Height and width of the model's input images, in pixels. (default: from
            config.json or preprocessor_config.json)
        crop_pct: Resize the shorter side to the size divided by this, then crop the center.
            (default: from the same file, else 1)
        image_mean: Mean to subtract from pixels in [0, 1], one for all channels or one for each.
            (default: from the same file)
        image_std: Standard deviation to divide by, one for all channels or one for each. (default:
            from the same file)
        image_interpolation: Interpolation of the resizing. One of nearest, bilinear, bicubic, box,
            hamming, lanczos. (default: from the same file, else bilinear)
        objective: What the model predicts: sequence-classification, multi-label, token-
            classification, regression, causal-lm, masked-lm, seq2seq-lm, image-classification or
            classification. (default: from the architecture)
        model: Function that builds the torch module from the contents of config.json, for models
            that transformers does not know.
        revision: Branch, tag or commit of the checkpoint on the Hub.
        base_model: Base model of a checkpoint that is a peft adapter. (default: the folder that its
            config names, if it exists)
        device: Device: cpu, cuda, mps, … (default: the best available)
        freeze: Neither train nor measure parameters whose name matches, such as 'encoder.*'.
        gradient_checkpointing: Recompute layers in the backward pass: less memory, more time, the
            same result (models of transformers).
        shard: Shard weights, Fisher and optimizer state over the processes of torchrun (FSDP2), for
            models too large for one device.
        dtype: Dtype of the weights. One of float32, float64, bfloat16, float16. (default: as
            stored, but float32 for float16)
        estimator: Labels to take the expectation over: all (exact), sampled from the model (mc),
            the data's own (empirical), or sampled, with gradients squared per batch (batched).
            (default: exact up to 16 outcomes, else mc)
        mc_samples: Labels sampled per example by mc and batched. (default: 1)
        max_outcomes: Refuse exact if it needs more backward passes per example than this. (default:
            4096)
        max_examples: Measure on a seeded random subset of this size. (default: all)
        batch_size: Examples measured at a time. Only batched depends on it: the others square
            gradients per example.
        tolerance: Read examples in random order and stop once the relative standard error of every
            parameter's trace is at most this, after 64 examples (of batched, batches) at the
            earliest. (default: read all)
        accumulate_dtype: Dtype for squaring and accumulating gradients. One of float32, float64.
        check: Verify per-example gradients on every batch, not only the first.
        kernel: Square gradients in a kernel that is compiled for this processor at the first use:
            by the C compiler for a CPU, by Triton for CUDA. The result is equal up to rounding.
        structure: diagonal: a value for each weight. inputs: also a matrix over the inputs of each
            linear or convolutional layer, which the penalty then uses instead; it takes up to 4
            times the memory of the layer's weights. (default: that of the earlier tasks, else
            diagonal)
        seed: Random seed.
        add: Add the task to the Fisher that the checkpoint already has.
        after: Where another program trained the checkpoint from the checkpoint OLD: merge the task
            with those of OLD.
        merge_rule: online: protect all tasks around the new weights; separate: protect each task
            around the weights it was learned at. (default: that of the earlier tasks, else online)
        gamma: Share of the earlier Fisher that online keeps. (default: that of the earlier tasks,
            else 1)
        task_weight: Factor of the task's Fisher. units: weight by the number of examples or tokens;
            trace: give the task the same trace as the first one.
        output_dir: Write a whole checkpoint here. Required if the checkpoint is not a local folder.
            (default: only a folder fisher in the checkpoint)
        save_every_minutes: Save progress beside the output this often; rerunning the command
            resumes and gives bit-identical results. SIGTERM and Ctrl-C save too. 0: as often as
            possible; inf: never.
        restart: Discard saved progress and start over.
        overwrite: Replace an existing output unless it is up to date.
        data_digest: Store a digest of the data in the ledger.
        dry_run: Only report what it would take: time, memory, file sizes.

    Returns:
        Folder, task, counts, and the Fisher's trace with its relative standard error by parameter;
        with `dry_run`, the estimated cost. A Fisher that is up to date is kept, and the ``status``
        is ``cached``.

    Raises:
        InputError: The checkpoint or the data are not as expected.
        UsageError: The options contradict each other or the checkpoint.
        NonFiniteError: NaN or infinity in the weights or in the Fisher.
    """
    given = locals()
    from consolidate.commands import fisher as command

    return command.fisher(gather(FisherOptions, given))


def finetune(
    checkpoint: str | Path,
    data: str | Path,
    *,
    output_dir: str | Path,
    task: str | None = None,
    columns: Columns | None = None,
    split: str | None = None,
    max_length: int | None = None,
    pack: bool = False,
    loss_on: str | None = None,
    image_size: int | None = None,
    crop_pct: float | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    image_interpolation: str | None = None,
    objective: str | None = None,
    model: str | None = None,
    revision: str | None = None,
    base_model: str | Path | None = None,
    device: str | None = None,
    freeze: Sequence[str] = (),
    gradient_checkpointing: bool = False,
    shard: bool = False,
    epochs: int | None = None,
    max_steps: int | None = None,
    max_examples: int | None = None,
    batch_size: int = 16,
    gradient_accumulation_steps: int = 1,
    learning_rate: float = 5e-05,
    optimizer: str = "adamw",
    momentum: float | None = None,
    adam_betas: Sequence[float] | None = None,
    weight_decay: float = 0.0,
    lr_scheduler: str = "constant",
    warmup_steps: int = 0,
    max_grad_norm: float | None = None,
    mixed_precision: str = "no",
    norm_statistics: str | None = None,
    penalty_step: str = "gradient",
    evaluate_every: int | None = None,
    log_every: int = 50,
    seed: int = 0,
    ewc_lambda: float | Sequence[float] | str | None = None,
    budget: float | None = None,
    validation: Mapping[str, str | Path] | None = None,
    select: str | None = None,
    search_plot: str | Path | None = None,
    penalty: str = "ewc",
    fisher: str | Path | None = None,
    protect_self: int | None = None,
    save_generated: str | Path | None = None,
    penalty_dtype: torch.dtype | str | None = None,
    penalty_device: str | None = None,
    penalty_on: str | None = None,
    replay: str | Path | None = None,
    replay_share: float | None = None,
    interpolate: float | str | None = None,
    interpolation: str = "plain",
    structure: str | None = None,
    fisher_estimator: str | None = None,
    fisher_mc_samples: int | None = None,
    fisher_max_outcomes: int | None = None,
    fisher_max_examples: int | None = None,
    fisher_batch_size: int | None = None,
    fisher_tolerance: float | None = None,
    fisher_accumulate_dtype: torch.dtype | str = "float32",
    fisher_check: bool = False,
    fisher_kernel: bool = False,
    no_fisher: bool = False,
    measure: Mapping[str, str | Path] | None = None,
    merge_rule: str | None = None,
    gamma: float | None = None,
    task_weight: float | str = 1.0,
    head: str = "keep",
    head_parameters: Sequence[str] = (),
    lora_rank: int | None = None,
    lora_targets: Sequence[str] = (),
    lora_alpha: float | None = None,
    lora_train_head: bool = False,
    evaluate: Mapping[str, str | Path] | None = None,
    max_forgetting: float | None = None,
    benchmark_limit: int | None = None,
    compare_none: bool = False,
    save_every_minutes: float = 5.0,
    restart: bool = False,
    overwrite: bool = False,
    data_digest: bool = True,
    dry_run: bool = False,
    on_step: Callable[[Step], None] | None = None,
) -> FinetuneResult:
    """Fine-tune a checkpoint on a new task with a penalty that protects the earlier ones.

    L(θ) = L_new(θ) + (λ/2) Σ_i Λ_i (θ_i − μ_i)², Kirkpatrick et al. 2017, eq. 3. The output is a
    whole checkpoint whose Fisher protects the new task as well, so that the next call starts from
    it.

    Args:
        checkpoint: A folder, a weights file, or a repository on the Hub.
        data: The new task's data: file, folder, Hub dataset or task.toml.
        output_dir: Where to write the new checkpoint, whose Fisher covers the new task too.
        task: Name of the task. (default: that of the data)
        columns: Names of the columns by role; None stands for the usual ones.
        split: Split of `data`, a dataset with several.
        max_length: Truncate texts to this many tokens. (default: the model's limit)
        pack: Fill each sequence with consecutive texts (language models).
        loss_on: Tokens that a causal language model predicts: the assistant's turns of chats, the
            completions of prompts, or all. (default: completion for prompts with completions, else
            all)
        image_size: Height and width of the model's input images, in pixels. (default: from
            config.json or preprocessor_config.json)
        crop_pct: Resize the shorter side to the size divided by this, then crop the center.
            (default: from the same file, else 1)
        image_mean: Mean to subtract from pixels in [0, 1], one for all channels or one for each.
            (default: from the same file)
        image_std: Standard deviation to divide by, one for all channels or one for each. (default:
            from the same file)
        image_interpolation: Interpolation of the resizing. One of nearest, bilinear, bicubic, box,
            hamming, lanczos. (default: from the same file, else bilinear)
        objective: What the model predicts: sequence-classification, multi-label, token-
            classification, regression, causal-lm, masked-lm, seq2seq-lm, image-classification or
            classification. (default: from the architecture)
        model: Function that builds the torch module from the contents of config.json, for models
            that transformers does not know.
        revision: Branch, tag or commit of the checkpoint on the Hub.
        base_model: Base model of a checkpoint that is a peft adapter. (default: the folder that its
            config names, if it exists)
        device: Device: cpu, cuda, mps, … (default: the best available)
        freeze: Neither train nor measure parameters whose name matches, such as 'encoder.*'.
        gradient_checkpointing: Recompute layers in the backward pass: less memory, more time, the
            same result (models of transformers).
        shard: Shard weights, Fisher and optimizer state over the processes of torchrun (FSDP2), for
            models too large for one device.
        epochs: Passes over the data. (default: 1 or `max_steps`)
        max_steps: Train for this many optimizer steps, with as many passes over the data as they
            take. With `epochs` too, the shorter of both counts.
        max_examples: Train on a seeded random subset of this size. (default: all)
        batch_size: Examples per batch on each process.
        gradient_accumulation_steps: Batches per optimizer step.
        learning_rate: Peak learning rate.
        optimizer: Optimizer from torch. One of adamw, adam, sgd.
        momentum: Momentum of sgd. (default: 0)
        adam_betas: Decay rates β₁,β₂ of the moments of adam and adamw. (default: 0.9,0.999)
        weight_decay: Weight decay. It pulls unprotected weights to zero, task after task.
        lr_scheduler: Learning rate after the warm-up; linear and cosine end at zero. One of
            constant, linear, cosine.
        warmup_steps: Steps from zero to the peak learning rate.
        max_grad_norm: Clip the norm of the gradient, including the penalty's. (default: no
            clipping)
        mixed_precision: Autocast of the forward pass; the master weights stay float32. One of no,
            bf16, fp16.
        norm_statistics: Running statistics of batch norms: keep those of the checkpoint, or follow
            the new data. One of frozen, update. (default: frozen with a penalty, a Fisher or an old
            task to evaluate, else update)
        penalty_step: gradient: add λΛ(θ − μ) to the gradient; proximal: apply the penalty
            implicitly after the optimizer's step, stable for every λ.
        evaluate_every: Evaluate every STEPS optimizer steps too, and at the last step.
        log_every: Log every N optimizer steps.
        seed: Random seed.
        ewc_lambda: Strength λ: a number, several, or auto to search. Required with a penalty, but
            not with `budget`.
        budget: In place of `ewc_lambda`: by how many nats the loss per example or token may rise on
            each earlier task in `validation`. λ is adjusted during the training; if the loss still
            rises more, the weights are interpolated with the start. Exit with code 5 if the new
            task cannot be learned within the budget.
        validation: Held-out data of earlier tasks and of the new one, to choose λ or α on.
            (default: a tenth of the new task's data)
        select: Which λ to take. best-mean: the one with the best mean score; smallest: the smallest
            that stays within `max_forgetting`; largest: the largest that keeps 95% of what the new
            task gains. (default: smallest with `max_forgetting`, largest without old data, else
            best-mean)
        search_plot: Plot the search to a .png, .svg or .pdf file (needs matplotlib).
        penalty: ewc: Fisher-weighted penalty; l2: uniform penalty; none: no penalty.
        fisher: Folder or repository with the Fisher. (default: in the checkpoint)
        protect_self: For a causal language model without a Fisher: first measure one on N texts
            that it generates itself, as `fisher --generate N` does.
        save_generated: Write the texts of `protect_self` to FILE as JSON Lines; they are not stored
            otherwise.
        penalty_dtype: Dtype of Fisher Λ and anchor μ in memory. One of float32, bfloat16. (default:
            as stored)
        penalty_device: Device of Λ and μ. (default: that of the weights)
        penalty_on: What to penalize if an adapter is trained. adapter: its own parameters, by their
            Fisher; merged: the weights W + s·B·A, by the Fisher of all weights. (default: adapter
            for an adapter with a Fisher, else merged)
        replay: Rows of earlier tasks to mix into the batches, with the columns and labels of
            `data`; a language model takes any text.
        replay_share: Share of replayed rows among all that are trained on. An epoch takes 1/(1 − X)
            times the steps. (default: 0.1)
        interpolate: α: save the weights μ + α (θ − μ) between the start μ and the trained θ, and
            measure them and their Fisher. auto: try 0.1, 0.2, …, 1 on held-out data, and take the α
            of the best mean score where `validation` has old tasks, else the smallest that keeps
            95% of what the new task gains.
        interpolation: plain: α for all weights; fisher: each weight's start and end weighted by the
            Fishers of the earlier tasks and of the new one, measured in one more pass.
        structure: diagonal: a value for each weight. inputs: also a matrix over the inputs of each
            linear or convolutional layer, which the penalty then uses instead; it takes up to 4
            times the memory of the layer's weights. (default: that of the earlier tasks, else
            diagonal)
        fisher_estimator: Labels to take the expectation over: all (exact), sampled from the model
            (mc), the data's own (empirical), or sampled, with gradients squared per batch
            (batched). (default: exact up to 16 outcomes, else mc)
        fisher_mc_samples: Labels sampled per example by mc and batched. (default: 1)
        fisher_max_outcomes: Refuse exact if it needs more backward passes per example than this.
            (default: 4096)
        fisher_max_examples: Measure on a seeded random subset of this size. (default: all)
        fisher_batch_size: Examples measured at a time. Only batched depends on it: the others
            square gradients per example. (default: `batch_size`)
        fisher_tolerance: Read examples in random order and stop once the relative standard error of
            every parameter's trace is at most this, after 64 examples (of batched, batches) at the
            earliest. (default: read all)
        fisher_accumulate_dtype: Dtype for squaring and accumulating gradients. One of float32,
            float64.
        fisher_check: Verify per-example gradients on every batch, not only the first.
        fisher_kernel: Square gradients in a kernel that is compiled for this processor at the first
            use: by the C compiler for a CPU, by Triton for CUDA. The result is equal up to
            rounding.
        no_fisher: Do not measure the new task's Fisher: the ledger lists the task as not measured.
            The next finetune can measure it with `measure`.
        measure: First measure the Fisher of the checkpoint's last task, which `no_fisher` left out,
            on that task's data, with the options of this command except `split`.
        merge_rule: online: protect all tasks around the new weights; separate: protect each task
            around the weights it was learned at. (default: that of the earlier tasks, else online)
        gamma: Share of the earlier Fisher that online keeps. (default: that of the earlier tasks,
            else 1)
        task_weight: Factor of the task's Fisher. units: weight by the number of examples or tokens;
            trace: give the task the same trace as the first one.
        head: keep: for data with the same labels; new: keep the present head for its tasks,
            initialize a new, unpenalized one; extend: add rows for new labels.
        head_parameters: Names of the head's parameters. (default: those outside transformers' base
            model, else the last module that has any)
        lora_rank: Train a new low-rank adapter W + s·B·A of rank R in place of the weights W (Hu et
            al. 2021). The output is a whole checkpoint with the adapter merged (needs peft).
        lora_targets: Layers to adapt, such as '*.q_proj' or q_proj. (default: those that peft knows
            for the architecture)
        lora_alpha: α of s = α/R. (default: R, so that s = 1)
        lora_train_head: Train the head of `head` keep in full beside the adapter, penalized with
            its Fisher (modules_to_save in peft). A new or extended head is always trained.
        evaluate: Evaluate before training, after each epoch and at the end, with the head of task
            NAME if any. DATA may be lm-eval:TASK.
        max_forgetting: Exit with code 5 and save the output as DIR.failed-forgetting if an old task
            in `evaluate` (else in `validation`), or a benchmark, loses more score than this
            (accuracy, 0.01 is one point; else minus the loss).
        benchmark_limit: Score a benchmark on its first N examples only, a group on N of each of its
            tasks. (default: all)
        compare_none: Also train without a penalty, and report what the penalty saved of the old
            tasks in `evaluate`.
        save_every_minutes: Save progress beside the output this often; rerunning the command
            resumes and gives bit-identical results. SIGTERM and Ctrl-C save too. 0: as often as
            possible; inf: never.
        restart: Discard saved progress and start over.
        overwrite: Replace an existing output unless it is up to date.
        data_digest: Store a digest of the data in the ledger.
        dry_run: Check what can be checked, take a few steps, and only report what training would
            take.
        on_step: Called after each optimizer step with its loss, its penalty and its learning rate;
            not for the candidates of a search.

    Returns:
        What was done: steps, loss, penalty, the share of weights that moved, the nats of old loss
        that the Fisher predicts and those that were measured, metrics, history;
        the searches, if any, under ``lambda_search`` and ``alpha_search``. An output that is up to
        date is not written again: the ``status`` is ``cached``, with what the ledger records. With
        `dry_run`, the estimated cost.

    Raises:
        InputError: Something in the checkpoint, its Fisher or the data does not fit.
        UsageError: The options contradict each other or the checkpoint.
        NonFiniteError: NaN or infinity in weights, loss or Fisher; nothing is written.
        ForgettingError: An old task lost more than `max_forgetting`; the output is saved as
            `output_dir` with ``.failed-forgetting`` behind its name. Or no α keeps
            `budget`; nothing is written.
    """
    given = locals()
    from consolidate.commands import finetune as command

    return command.finetune(gather(FinetuneOptions, given))


def evaluate(
    checkpoint: str | Path,
    data: str | Path | Mapping[str, str | Path],
    *,
    task: str | None = None,
    columns: Columns | None = None,
    split: str | None = None,
    max_length: int | None = None,
    pack: bool = False,
    loss_on: str | None = None,
    image_size: int | None = None,
    crop_pct: float | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    image_interpolation: str | None = None,
    objective: str | None = None,
    model: str | None = None,
    revision: str | None = None,
    base_model: str | Path | None = None,
    device: str | None = None,
    batch_size: int = 16,
    benchmark_limit: int | None = None,
    seed: int = 0,
    dtype: torch.dtype | str | None = None,
) -> EvaluateResult:
    """Evaluate a checkpoint on each task: loss, and accuracy or perplexity.

    Args:
        checkpoint: A folder, a weights file, or a repository on the Hub.
        data: Data to evaluate on, with the head of task NAME if it has one. A language model can be
            scored on a benchmark of EleutherAI's harness: lm-eval:TASK, by a task's name or the
            path of a task file (.yaml; its functions are run).
        task: Use the head of this task for all data.
        columns: Names of the columns by role; None stands for the usual ones.
        split: Split of `data`, a dataset with several.
        max_length: Truncate texts to this many tokens. (default: the model's limit)
        pack: Fill each sequence with consecutive texts (language models).
        loss_on: Tokens that a causal language model predicts: the assistant's turns of chats, the
            completions of prompts, or all. (default: completion for prompts with completions, else
            all)
        image_size: Height and width of the model's input images, in pixels. (default: from
            config.json or preprocessor_config.json)
        crop_pct: Resize the shorter side to the size divided by this, then crop the center.
            (default: from the same file, else 1)
        image_mean: Mean to subtract from pixels in [0, 1], one for all channels or one for each.
            (default: from the same file)
        image_std: Standard deviation to divide by, one for all channels or one for each. (default:
            from the same file)
        image_interpolation: Interpolation of the resizing. One of nearest, bilinear, bicubic, box,
            hamming, lanczos. (default: from the same file, else bilinear)
        objective: What the model predicts: sequence-classification, multi-label, token-
            classification, regression, causal-lm, masked-lm, seq2seq-lm, image-classification or
            classification. (default: from the architecture)
        model: Function that builds the torch module from the contents of config.json, for models
            that transformers does not know.
        revision: Branch, tag or commit of the checkpoint on the Hub.
        base_model: Base model of a checkpoint that is a peft adapter. (default: the folder that its
            config names, if it exists)
        device: Device: cpu, cuda, mps, … (default: the best available)
        batch_size: Examples per batch.
        benchmark_limit: Score a benchmark on its first N examples only, a group on N of each of its
            tasks. (default: all)
        seed: Random seed.
        dtype: Dtype of the weights. One of float32, float64, bfloat16, float16. (default: as
            stored)

    Returns:
        The metrics of each task, by name.

    Raises:
        InputError: Something in the checkpoint or the data does not fit.
        UsageError: No dataset is given.
        NonFiniteError: NaN or infinity in the weights.
    """
    given = locals()
    from consolidate.commands import evaluate as command

    return command.evaluate(gather(EvaluateOptions, given))


def merge(
    checkpoints: Sequence[str | Path],
    *,
    output_dir: str | Path,
    weights: Sequence[float] | None = None,
    base: str | Path | None = None,
    overwrite: bool = False,
) -> MergeResult:
    """Merge checkpoints of one architecture, and their Fishers, into one checkpoint.

    Λ = Σ c_k Λ_k, θ = Σ c_k Λ_k θ_k / Λ, μ = Σ c_k Λ_k μ_k / Λ (Matena & Raffel 2022), and where
    Λ = 0 the mean weighted by c_k. A layer that all have a factor of takes R = Σ c_k R_k, and W
    where W R = Σ c_k W_k R_k (Jin et al. 2023). With a base, Σ c_k − 1 times its terms are
    subtracted from each sum, so that the tasks of the base count once. Other files are the first
    checkpoint's.

    Args:
        checkpoints: Folders or repositories on the Hub, each with its Fisher.
        output_dir: Where to write the merged checkpoint.
        weights: Coefficients of the checkpoints, in their order. (default: 1 each)
        base: Common ancestor of the checkpoints, with its Fisher; its tasks are counted once.
        overwrite: Replace an existing output unless it is up to date.

    Returns:
        The folder, the models, the tasks, the Fisher's trace, the offset, the factors, and the
        layers ``without_factors``, which some of the checkpoints have factors of. If the output is
        up to date, nothing is done, and the ``status`` is ``cached``.

    Raises:
        InputError: A checkpoint has no Fisher, is damaged, is of another architecture, or has a
            task that another one has; or the base is not their common ancestor.
        UsageError: The coefficients are not positive numbers, one per checkpoint.
        NonFiniteError: NaN or infinity in weights or Fisher.
    """
    given = locals()
    from consolidate.commands import merge as command

    return command.merge(gather(MergeOptions, given))


def remap(
    checkpoint: str | Path,
    *,
    output_dir: str | Path,
    fisher_of: str | Path | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> RemapResult:
    """Carry a Fisher with anchor, factors, heads and ledger over to the same weights, renamed.

    Tensors are paired by dtype, shape and bytes; several that are alike, such as norms of ones, by
    where the other tensors of their module went, then by the longest common suffix of their names.

    Args:
        checkpoint: A folder, a weights file, or a repository on the Hub.
        output_dir: Where to write the checkpoint with its Fisher.
        fisher_of: Checkpoint with the old names, whose Fisher is carried over. (default: the
            checkpoint itself, with a fisher folder copied beside its weights)
        revision: Branch, tag or commit of the checkpoint on the Hub.
        overwrite: Replace an existing output unless it is up to date.

    Returns:
        The folder, the tasks, and the new name of each tensor of the ledger; the tensors that only
        one of the two checkpoints has. If the output is up to date, nothing is done, and the
        ``status`` is ``cached``.

    Raises:
        InputError: There is no Fisher or it is damaged, values differ, a tensor with a Fisher is
            missing, or alike tensors cannot be told apart by their names.
        NonFiniteError: NaN or infinity in the Fisher.
    """
    given = locals()
    from consolidate.commands import remap as command

    return command.remap(gather(RemapOptions, given))


def run(
    path: str | Path,
    *,
    output_dir: str | Path | None = None,
    dry_run: bool = False,
    restart: bool = False,
) -> RunResult:
    """Train a chain of tasks, one after the other, skipping the steps that are up to date.

    A step is up to date if its checkpoint is intact and was made from the same content: the
    checkpoint before it, data, test data, options and versions of programs. Times of files are
    ignored. An interrupted step resumes from its saved progress, unless its inputs changed.

    Args:
        path: The run file: the first checkpoint, the tasks and their options.
        output_dir: Where to write the checkpoints. (default: as the file says)
        dry_run: Only report which steps would run or be skipped, and why.
        restart: Discard saved progress and start over.

    Returns:
        The steps with their status and the reason, the last checkpoint, and the accuracy matrix.

    Raises:
        InputError: The run file, a checkpoint or the data are not as expected, or a step's folder
            exists that no run has made.
        UsageError: Options contradict each other.
        NonFiniteError, ForgettingError: As for `finetune`.
    """
    given = locals()
    from consolidate.commands import run as command

    return command.run(gather(RunOptions, given))


def show(
    checkpoint: str | Path,
    *,
    revision: str | None = None,
    top: int = 10,
    csv: str | Path | None = None,
    plot: str | Path | None = None,
    overlap: str | Path | None = None,
) -> ShowResult:
    """Summarize the ledger and the Fisher of a checkpoint, without checking the weights.

    From a repository on the Hub only the ledger and the headers of the Fisher are read. The traces
    are then those of the ledger, Σ_t γ^(T − t) w_t tr F_t, and the largest values are unknown.

    Args:
        checkpoint: A folder or a repository on the Hub, with its Fisher.
        revision: Branch, tag or commit of the checkpoint on the Hub.
        top: Number of parameters to list.
        csv: Write the accuracy matrix and the curves over training steps to FILE.
        plot: Plot the accuracy matrix and the curves (needs matplotlib).
        overlap: Print the overlap with the Fisher of another checkpoint, from 0 to 1, for each
            layer.

    Returns:
        JSON-ready. A parameter's trace is Σ_i Λ_i, and ``factors`` are None where the Fisher is a
        diagonal alone; the ``accuracy_matrix`` is None if nothing was measured; ``overlap``, None
        unless requested, is that of `fisher_overlap` of the diagonals, over all parameters of a
        module.

    Raises:
        InputError: There is no Fisher folder, `read_fisher` refuses it, there are no scores for
            `csv` or `plot`, or these cannot be written; or the two Fishers share no parameter, or
            one with different shapes.
        UsageError: `plot` has an unknown suffix, or matplotlib is missing.
    """
    given = locals()
    from consolidate.commands import show as command

    return command.show(gather(ShowOptions, given))


def report(
    checkpoint: str | Path,
    *,
    output: str | Path | None = None,
    plots: str | Path | None = None,
    search: str | Path | None = None,
    comparison: str | Path | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> ReportResult:
    """Write an HTML report of a checkpoint's ledger and Fisher, one page that needs no network.

    Files of an earlier report are replaced, others only with `overwrite`.

    Args:
        checkpoint: A folder or a repository on the Hub, with its Fisher.
        output: Where to write the report. (default: NAME-report.html in the current folder)
        plots: Write the figures here too, as SVG and PNG (needs matplotlib).
        search: Show the search for λ in this JSON output of `finetune`.
        comparison: Show what the penalty saved, from this JSON output of `finetune --compare-none`.
        revision: Branch, tag or commit of the checkpoint on the Hub.
        overwrite: Replace existing files; those of an earlier report are always replaced.

    Returns:
        JSON-ready: ``checkpoint``, ``report`` (the page), ``plots`` (the files), ``tasks``.

    Raises:
        UsageError: `plots` without matplotlib, or a revision with a local path.
        InputError: There is no checkpoint or no Fisher in it, `read_fisher` refuses it, or a file
            already exists or cannot be written, or `search` or `comparison` is not of this
            checkpoint.
        NetworkError: The Hub cannot be reached.
    """
    given = locals()
    from consolidate.commands import report as command

    return command.report(gather(ReportOptions, given))


def verify(
    *checkpoints: str | Path,
    revision: str | None = None,
    base_model: str | Path | None = None,
) -> VerifyResult:
    """Check every digest, name, shape and value, and the consistency of the ledger.

    Args:
        checkpoints: A checkpoint, and then others that were made from it, each from the one before.
        revision: Branch, tag or commit of the checkpoint on the Hub.
        base_model: Base model of a checkpoint that is a peft adapter, or the weights that belong to
            a Fisher alone. (default: the folder that the adapter's config names, if it exists)

    Returns:
        JSON-ready: for each set of tensors their number, bytes and the set's digest;
        ``other_files`` that no digest covers; and in ``later`` the same for the other checkpoints,
        with ``descends_by``: ``weights``, or ``tasks`` if the ledger has no digest of the parent.

    Raises:
        InputError: Anything missing, extra, renamed, resized, of another dtype, with other bytes,
            or negative in the Fisher; each finding names the file and the tensor. Or the ledger
            contradicts itself, the Fisher's traces, or the previous checkpoint; or a factor is
            asymmetric, has a negative eigenvalue, or another trace than the Fisher it stands for.
        NonFiniteError: Values are NaN or infinite, and nothing else is wrong.
    """
    given = locals()
    from consolidate.commands import verify as command

    return command.verify(gather(VerifyOptions, given))


def push(
    checkpoint: str | Path,
    repository: str,
    *,
    public: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    tag: str | None = None,
    token: str | None = None,
    base_model: Sequence[str] = (),
    fisher_dtype: torch.dtype | str | None = None,
    structure: str | None = None,
    fisher_only: bool = False,
    dry_run: bool = False,
) -> PushResult:
    """Publish a checkpoint with its Fisher, ledger and card on the Hub, in one commit.

    The checkpoint is verified before anything is sent, and the repository's contents after. The
    commit is made only if the repository has not changed meanwhile. Until then the repository is
    unchanged, and pushing again sends only what is missing.

    Args:
        checkpoint: A folder or a repository on the Hub, with its Fisher.
        repository: Where to, such as user/model; created if it does not exist.
        public: Create the repository as public, and allow pushing to a public one.
        create_pr: Open a pull request instead of committing.
        revision: Branch to push to; created if it does not exist.
        commit_message: Message of the commit.
        tag: Tag the commit with this name.
        token: Token for REPO; what else is read from the Hub needs `hf auth login` or HF_TOKEN.
            (default: that of `hf auth login` or HF_TOKEN)
        base_model: Model that this one was made from, for the card; several for a merge.
        fisher_dtype: Dtype of the published Fisher; bfloat16 is half as large. One of float32,
            bfloat16. (default: as stored)
        structure: Structure of the published Fisher; diagonal leaves its factors out. One of
            diagonal, inputs. (default: as stored)
        fisher_only: Publish the Fisher alone; `base_model` names the weights' repository.
        dry_run: Only list the files that would be sent, with sizes, and which of them the
            repository already has (offline: all files).

    Returns:
        The commit, every file with its size and change, and digests.

    Raises:
        UsageError: The options contradict each other or the repository.
        InputError: The checkpoint is damaged, or the Hub refuses.
        NonFiniteError: NaN or infinity in the weights or in the Fisher.
        NetworkError: The Hub cannot be reached or fails, or does not have what was sent.
    """
    given = locals()
    from consolidate.commands import push as command

    return command.push(gather(PushOptions, given))
