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
    ReportResult,
    RunResult,
    ShowResult,
    VerifyResult,
)
from consolidate.training.loop import Step


def fisher(
    checkpoint: str | Path,
    data: str | Path,
    *,
    task: str | None = None,
    objective: str | None = None,
    model: str | None = None,
    revision: str | None = None,
    base_model: str | Path | None = None,
    device: str | None = None,
    columns: Columns | None = None,
    split: str | None = None,
    max_length: int | None = None,
    pack: bool = False,
    estimator: str | None = None,
    mc_samples: int | None = None,
    max_outcomes: int | None = None,
    max_examples: int | None = None,
    batch_size: int | None = 16,
    tolerance: float | None = None,
    accumulate_dtype: torch.dtype | str = "float32",
    check: bool = False,
    seed: int = 0,
    dtype: torch.dtype | str | None = None,
    freeze: Sequence[str] = (),
    gradient_checkpointing: bool = False,
    shard: bool = False,
    add: bool = False,
    merge_rule: str | None = None,
    gamma: float | None = None,
    task_weight: float | str = 1.0,
    output_dir: str | Path | None = None,
    save_every: float = 5.0,
    restart: bool = False,
    overwrite: bool = False,
    data_digest: bool = True,
    dry_run: bool = False,
) -> FisherResult:
    """Measure the Fisher diagonal of a checkpoint on a task's data and store it beside the weights.

    F_i = (1/N) Σ_x E_{y ~ p(y|x, θ)} [(∂ log p(y|x, θ)/∂θ_i)²], summed over units of each example.

    Args:
        checkpoint: A folder, a weights file, or a repository on the Hub.
        data: The task's data: a file, a folder, a dataset on the Hub, or a task.toml.
        task: Name of the task; that of the data by default.
        objective: What is predicted; the architecture's own by default. One of sequence-
            classification, multi-label, token-classification, regression, causal-lm, masked-lm,
            seq2seq-lm, image-classification, classification.
        model: Function that makes the torch module, called with the contents of config.json, for
            models that transformers does not know.
        revision: Branch, tag or commit of a checkpoint on the Hub.
        base_model: Base model of a checkpoint that is an adapter of peft; the folder that its
            config names by default, if that is there.
        device: cpu, cuda, mps, …; the best there is by default.
        columns: The names of the columns with each role; None takes the usual ones.
        split: Split of a dataset that has several.
        max_length: Truncate texts after this many tokens; the model's own limit by default.
        pack: Fill sequences with consecutive texts (language models).
        estimator: Labels the Fisher is an expectation over: all of them (exact), sampled from the
            model (mc), the data's own (empirical), or sampled and squared per batch (batched). By
            default exact up to 16 outcomes, else mc.
        mc_samples: Labels sampled per example by mc and batched; 1 by default.
        max_outcomes: Refuse exact above this many backward passes per example; 4096 by default.
        max_examples: Measure on a seeded random subset of this size.
        batch_size: Examples measured at a time; the Fisher is that of single examples. In finetune
            as `batch_size` by default.
        tolerance: Read in random order, and stop once the relative standard error of every
            parameter's trace is at most this, after 64 examples at the earliest.
        accumulate_dtype: Dtype for squaring and accumulating gradients. One of float32, float64.
        check: Verify per-example gradients on every batch, not only the first.
        seed: Random seed.
        dtype: Dtype of the weights; as stored by default. A Fisher is float32 in any case. One of
            float32, float64, bfloat16, float16.
        freeze: Neither train nor measure the parameters whose name matches, such as 'encoder.*'.
        gradient_checkpointing: Layers keep only their inputs, and run again in the backward pass:
            less memory for long examples, more time, the same result. For transformers' models.
        shard: Each of several processes (torchrun) holds a shard of weights, Fisher and optimizer's
            state (FSDP2): for models that no device holds whole.
        add: Add another task measured at the same weights.
        merge_rule: online protects all tasks around the new weights, separate each around the
            weights it was learned at. As for the task before by default, online at first.
        gamma: With online: the share of the earlier Fisher that is kept. As before by default, 1 at
            first.
        task_weight: Factor of the task's Fisher: a number, or such that, relative to the first
            task, it counts by the units it was measured on, or has as large a trace.
        output_dir: Write a whole checkpoint here instead of a folder fisher into CHECKPOINT.
        save_every: Save progress every MINUTES beside the output; rerunning the command resumes and
            gives bit-identical results. 0: as often as possible, inf: never. SIGTERM and Ctrl-C
            save too.
        restart: Discard saved progress and start over.
        overwrite: Replace the output that is there. One that is up to date is left as it is.
        data_digest: Keep a digest of the data in the ledger (kept by default).
        dry_run: Only say what it would take: time, memory, sizes of files. Nothing is written.

    Returns:
        What was done: the folder, the task, counts, the Fisher's trace and how certain it is by
        parameter; with `dry_run`, what it would take. A Fisher that is up to date is left as it
        is, and the ``status`` is ``cached``.

    Raises:
        InputError: Something in the checkpoint or the data does not fit.
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
    ewc_lambda: float | Sequence[float] | str | None = None,
    validation: Mapping[str, str | Path] | None = None,
    choose: str | None = None,
    search_plot: str | Path | None = None,
    penalty: str = "ewc",
    penalty_dtype: torch.dtype | str | None = None,
    penalty_device: str | None = None,
    fisher: str | Path | None = None,
    penalty_on: str | None = None,
    lora_rank: int | None = None,
    lora_targets: Sequence[str] = (),
    lora_alpha: float | None = None,
    lora_train_head: bool = False,
    interpolate: float | str | None = None,
    interpolation: str = "plain",
    task: str | None = None,
    objective: str | None = None,
    model: str | None = None,
    revision: str | None = None,
    base_model: str | Path | None = None,
    device: str | None = None,
    head: str = "keep",
    head_parameters: Sequence[str] = (),
    columns: Columns | None = None,
    split: str | None = None,
    max_length: int | None = None,
    pack: bool = False,
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
    evaluate: Mapping[str, str | Path] | None = None,
    max_forgetting: float | None = None,
    freeze: Sequence[str] = (),
    gradient_checkpointing: bool = False,
    shard: bool = False,
    save_every: float = 5.0,
    restart: bool = False,
    overwrite: bool = False,
    data_digest: bool = True,
    fisher_estimator: str | None = None,
    fisher_mc_samples: int | None = None,
    fisher_max_outcomes: int | None = None,
    fisher_max_examples: int | None = None,
    fisher_batch_size: int | None = None,
    fisher_tolerance: float | None = None,
    fisher_accumulate_dtype: torch.dtype | str = "float32",
    fisher_check: bool = False,
    merge_rule: str | None = None,
    gamma: float | None = None,
    task_weight: float | str = 1.0,
    on_step: Callable[[Step], None] | None = None,
) -> FinetuneResult:
    """Fine-tune a checkpoint on a new task with a penalty that protects the earlier ones.

    L(θ) = L_new(θ) + (λ/2) Σ_i Λ_i (θ_i − μ_i)², Kirkpatrick et al. 2017, eq. 3. The output is a
    whole checkpoint whose Fisher protects the new task as well, so that the next call starts from
    it.

    Args:
        checkpoint: A folder, a weights file, or a repository on the Hub.
        data: The new task's data: a file, a folder, a dataset on the Hub, or a task.toml.
        output_dir: Where the new checkpoint goes.
        ewc_lambda: λ, the strength of the penalty. Several, or auto, are trained from the same
            start and one of them is chosen: see `validation` and `choose`.
        validation: Held-out data to choose λ by, of old tasks and of the new one. A tenth of the
            new task's data is held out where none is given for it.
        choose: mean: the λ of the largest mean score. least: the smallest that stays under
            `max_forgetting`. most: the largest that keeps 95% of what the new task gains. By
            default most without old data, least with `max_forgetting`, else mean.
        search_plot: Draw the search as .png, .svg or .pdf (needs matplotlib).
        penalty: ewc: Fisher-weighted penalty; l2: uniform penalty; none: no penalty.
        penalty_dtype: Dtype of Λ and μ in memory; as they are stored by default. One of float32,
            bfloat16.
        penalty_device: Where Λ and μ are; beside the weights by default.
        fisher: Take the Fisher from here; from beside the weights by default.
        penalty_on: Where an adapter is trained: adapter protects its own parameters by their
            Fisher, merged protects W + s·B·A by the Fisher of the whole weights. By default adapter
            for a checkpoint that is an adapter with a Fisher, else merged.
        lora_rank: Train a fresh low-rank adapter W + s·B·A in place of the weights W (Hu et al.
            2021). The output is a whole checkpoint, with the adapter merged (needs peft).
        lora_targets: Layers that get one, such as '*.q_proj' or q_proj. By default those that peft
            has for the architecture.
        lora_alpha: α of s = α/R; R by default, so that s = 1.
        lora_train_head: Train the head of `head` keep in full beside the adapter (modules_to_save
            in peft), penalized by its Fisher; frozen by default. A new or extended head trains in
            any case.
        interpolate: α: save the weights μ + α (θ − μ) between the start μ and the trained θ, and
            measure them and their Fisher. auto: try 0.1, 0.2, …, 1 on held-out data, and take the α
            of the best mean score where `validation` has old tasks, else the smallest that keeps
            95% of what the new task gains.
        interpolation: plain: α for all weights; fisher: each weight's start and end weighted by the
            Fishers of the earlier tasks and of the new one, for which a second pass measures it.
        task: Name of the task; that of the data by default.
        objective: What is predicted; the architecture's own by default. One of sequence-
            classification, multi-label, token-classification, regression, causal-lm, masked-lm,
            seq2seq-lm, image-classification, classification.
        model: Function that makes the torch module, called with the contents of config.json, for
            models that transformers does not know.
        revision: Branch, tag or commit of a checkpoint on the Hub.
        base_model: Base model of a checkpoint that is an adapter of peft; the folder that its
            config names by default, if that is there.
        device: cpu, cuda, mps, …; the best there is by default.
        head: The output layer: keep it, for data with its labels; new saves it for the tasks that
            use it and initializes a new, unpenalized one; extend adds rows for new labels.
        head_parameters: Names of the output layer's parameters; by default those outside the base
            model of transformers, else those of the last module that has some.
        columns: The names of the columns with each role; None takes the usual ones.
        split: Split of a dataset that has several.
        max_length: Truncate texts after this many tokens; the model's own limit by default.
        pack: Fill sequences with consecutive texts (language models).
        epochs: Passes over the data; 1 unless `max_steps` is given.
        max_steps: Optimizer steps in all; ends the run before `epochs` do.
        max_examples: Train on a seeded random subset of this size.
        batch_size: Examples per batch and process.
        gradient_accumulation_steps: Batches per optimizer step.
        learning_rate: The peak of the schedule.
        optimizer: The optimizer, torch's own. One of adamw, adam, sgd.
        momentum: Of sgd; 0 by default.
        adam_betas: β₁,β₂ of adam and adamw, the decay rates of their moments; 0.9,0.999 by default.
        weight_decay: 0 by default: it would pull unprotected weights to zero, task after task.
        lr_scheduler: After the warm-up. One of constant, linear, cosine.
        warmup_steps: Steps from zero to the peak.
        max_grad_norm: Clip the norm of the whole gradient, an added penalty's included.
        mixed_precision: Autocast of the forward pass; the master weights are float32. One of no,
            bf16, fp16.
        norm_statistics: Running statistics of batch norms. By default frozen, whatever the penalty;
            update only without a penalty, a Fisher and another task to evaluate.
        penalty_step: gradient adds λ Λ (θ − μ) to the gradient; proximal takes the penalty's step
            implicitly after the optimizer's, stable for every λ.
        evaluate_every: Measure after so many optimizer steps too, and at the last.
        log_every: Log every N optimizer steps.
        seed: Random seed.
        evaluate: Measure before, after each epoch and at the end. A task of that NAME that has a
            head of its own is measured with that.
        max_forgetting: Exit with code 5 and save the output as DIR.failed-forgetting where an old
            task that `evaluate` names loses more than this in score: accuracy, else minus the loss.
        freeze: Neither train nor measure the parameters whose name matches, such as 'encoder.*'.
        gradient_checkpointing: Layers keep only their inputs, and run again in the backward pass:
            less memory for long examples, more time, the same result. For transformers' models.
        shard: Each of several processes (torchrun) holds a shard of weights, Fisher and optimizer's
            state (FSDP2): for models that no device holds whole.
        save_every: Save progress every MINUTES beside the output; rerunning the command resumes and
            gives bit-identical results. 0: as often as possible, inf: never. SIGTERM and Ctrl-C
            save too.
        restart: Discard saved progress and start over.
        overwrite: Replace the output that is there. One that is up to date is left as it is.
        data_digest: Keep a digest of the data in the ledger (kept by default).
        fisher_estimator: Labels the Fisher is an expectation over: all of them (exact), sampled
            from the model (mc), the data's own (empirical), or sampled and squared per batch
            (batched). By default exact up to 16 outcomes, else mc.
        fisher_mc_samples: Labels sampled per example by mc and batched; 1 by default.
        fisher_max_outcomes: Refuse exact above this many backward passes per example; 4096 by
            default.
        fisher_max_examples: Measure on a seeded random subset of this size.
        fisher_batch_size: Examples measured at a time; the Fisher is that of single examples. In
            finetune as `batch_size` by default.
        fisher_tolerance: Read in random order, and stop once the relative standard error of every
            parameter's trace is at most this, after 64 examples at the earliest.
        fisher_accumulate_dtype: Dtype for squaring and accumulating gradients. One of float32,
            float64.
        fisher_check: Verify per-example gradients on every batch, not only the first.
        merge_rule: online protects all tasks around the new weights, separate each around the
            weights it was learned at. As for the task before by default, online at first.
        gamma: With online: the share of the earlier Fisher that is kept. As before by default, 1 at
            first.
        task_weight: Factor of the task's Fisher: a number, or such that, relative to the first
            task, it counts by the units it was measured on, or has as large a trace.
        on_step: Called after each optimizer step with its loss, its penalty and its learning rate;
            not for the candidates of a search.

    Returns:
        What was done: steps, loss, penalty, the share of weights that moved, metrics, history;
        the searches, if any, under ``lambda_search`` and ``alpha_search``. An output that is up to
        date is not written again: the ``status`` is ``cached``, with what the ledger records.

    Raises:
        InputError: Something in the checkpoint, its Fisher or the data does not fit.
        UsageError: The options contradict each other or the checkpoint.
        NonFiniteError: NaN or infinity in weights, loss or Fisher; nothing is written.
        ForgettingError: An old task lost more than `max_forgetting`; the output is saved as
            `output_dir` with ``.failed-forgetting`` behind its name.
    """
    given = locals()
    from consolidate.commands import finetune as command

    return command.finetune(gather(FinetuneOptions, given))


def evaluate(
    checkpoint: str | Path,
    data: str | Path | Mapping[str, str | Path],
    *,
    task: str | None = None,
    objective: str | None = None,
    model: str | None = None,
    revision: str | None = None,
    base_model: str | Path | None = None,
    device: str | None = None,
    columns: Columns | None = None,
    split: str | None = None,
    max_length: int | None = None,
    pack: bool = False,
    batch_size: int = 16,
    seed: int = 0,
    dtype: torch.dtype | str | None = None,
) -> EvaluateResult:
    """Measure a checkpoint on each task: loss, and accuracy or perplexity.

    Args:
        checkpoint: A folder, a weights file, or a repository on the Hub.
        data: The data by task name. A task of that NAME that has a head of its own is measured with
            that.
        task: Measure with the output layer of this task, whatever the data is named.
        objective: What is predicted; the architecture's own by default. One of sequence-
            classification, multi-label, token-classification, regression, causal-lm, masked-lm,
            seq2seq-lm, image-classification, classification.
        model: Function that makes the torch module, called with the contents of config.json, for
            models that transformers does not know.
        revision: Branch, tag or commit of a checkpoint on the Hub.
        base_model: Base model of a checkpoint that is an adapter of peft; the folder that its
            config names by default, if that is there.
        device: cpu, cuda, mps, …; the best there is by default.
        columns: The names of the columns with each role; None takes the usual ones.
        split: Split of a dataset that has several.
        max_length: Truncate texts after this many tokens; the model's own limit by default.
        pack: Fill sequences with consecutive texts (language models).
        batch_size: Examples at a time.
        seed: Random seed.
        dtype: Dtype of the weights; as stored by default. A Fisher is float32 in any case. One of
            float32, float64, bfloat16, float16.

    Returns:
        The metrics of each task, by name.

    Raises:
        InputError: Something in the checkpoint or the data does not fit.
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
    Λ = 0 the mean weighed by c_k. With a base, Σ c_k − 1 times its own is taken from each of the
    sums, so that what all hold of it is held once. Other files are the first checkpoint's.

    Args:
        checkpoints: Folders or repositories on the Hub, each with its Fisher.
        output_dir: Where the merged checkpoint goes.
        weights: Coefficients of the checkpoints, in their order; 1 each by default.
        base: Common ancestor of the checkpoints, with its Fisher; its tasks are counted once.
        overwrite: Replace the output that is there. One that is up to date is left as it is.

    Returns:
        What was done: the folder, the models, the tasks, the Fisher's trace and the offset. Where
        the output is there, whole and made from the same, nothing is done, and the ``status`` is
        ``cached``.

    Raises:
        InputError: A checkpoint has no Fisher, is damaged, is of another architecture, or holds a
            task that another one holds; or the base is not what they share.
        UsageError: The coefficients are not positive numbers, one a checkpoint.
        NonFiniteError: NaN or infinity in weights or Fisher.
    """
    given = locals()
    from consolidate.commands import merge as command

    return command.merge(gather(MergeOptions, given))


def run(
    path: str | Path,
    *,
    output_dir: str | Path | None = None,
    dry_run: bool = False,
    restart: bool = False,
) -> RunResult:
    """Train a chain of tasks, one after the other, skipping what is done already.

    A step is done if its checkpoint is whole and was made from the same content: the checkpoint
    before it, data, test data, options and versions of programs. Times of files mean nothing.
    A step that was broken off goes on from what was kept of it, unless it is to be made from
    something else now.

    Args:
        path: The run file; docs/run.md tells what it may say.
        output_dir: Where the checkpoints go; as the file says by default.
        dry_run: Only say what would be done or skipped, and why.
        restart: Discard saved progress and start over.

    Returns:
        The steps with what was done and why, the last checkpoint, and the accuracy matrix.

    Raises:
        InputError: Something in the file, a checkpoint or the data does not fit, or a folder is in
            the way that no run has made.
        UsageError: Options contradict each other.
        NonFiniteError: As `finetune`, as is ForgettingError.
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
    """Summarize the ledger and the Fisher of a checkpoint; nothing is compared with the weights.

    Of a repository on the Hub only the ledger and the headers of the Fisher are read. The traces
    are then those of the ledger, Σ_t γ^(T − t) w_t tr F_t, and the largest values are not known.

    Args:
        checkpoint: A folder, a weights file, or a repository on the Hub.
        revision: Branch, tag or commit of a checkpoint on the Hub.
        top: How many parameters to list.
        csv: Write the accuracy matrix and the curves over training steps here.
        plot: Draw them here; needs matplotlib.
        overlap: Another checkpoint: how far its Fisher lies on the same weights, 0 to 1 for each
            layer.

    Returns:
        JSON-ready. A parameter's trace is Σ_i Λ_i; the ``accuracy_matrix`` is None where nothing
        was measured; ``overlap``, None unless asked for, is that of `fisher_overlap` over all
        parameters of a module.

    Raises:
        InputError: There is no Fisher folder, `read_fisher` refuses it, there is nothing to write
            to `csv` or `plot`, or no place for it; or the two Fishers share no parameter, or one
            that has another shape.
        UsageError: `plot` is no kind of plot that is known, or matplotlib is missing.
    """
    given = locals()
    from consolidate.commands import show as command

    return command.show(gather(ShowOptions, given))


def report(
    checkpoint: str | Path,
    *,
    output: str | Path | None = None,
    plots: str | Path | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> ReportResult:
    """Write what a checkpoint's ledger and Fisher say as one HTML page that needs no network.

    Files that an earlier report made are replaced, others only with `overwrite`.

    Args:
        checkpoint: A folder, a weights file, or a repository on the Hub.
        output: NAME-report.html in the current folder by default.
        plots: Write the pictures here too, as SVG and PNG; needs matplotlib.
        revision: Branch, tag or commit of a checkpoint on the Hub.
        overwrite: Replace files that are there; those of an earlier report are replaced anyway.

    Returns:
        JSON-ready: ``checkpoint``, ``report`` (the page), ``plots`` (the pictures), ``tasks``.

    Raises:
        UsageError: `plots` without matplotlib, or a revision of a local path.
        InputError: There is no such checkpoint or no Fisher in it, `read_fisher` refuses it, or a
            file is in the way or cannot be written.
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
    """Check every digest, name, shape and value, and that what the ledger tells fits together.

    Args:
        checkpoints: A checkpoint, and then others that were made from it, each from the one before.
        revision: Branch, tag or commit of a checkpoint on the Hub.
        base_model: Base model of a checkpoint that is an adapter of peft; the folder that its
            config names by default, if that is there. Of one that holds a Fisher alone: the weights
            it is of.

    Returns:
        JSON-ready: of each set of tensors how many there are, their bytes and the set's digest;
        ``other_files`` that no digest covers; and under ``later`` the same of the others, with
        ``descends_by``: ``weights``, or ``tasks`` where the ledger has no digest of the parent.

    Raises:
        InputError: Anything that is missing, extra, renamed, resized, of another dtype, with other
            bytes, or negative in the Fisher; each finding names the file and the tensor. Or the
            ledger contradicts itself, the Fisher's traces, or the checkpoint before.
        NonFiniteError: Values that are NaN or infinite, and nothing else is wrong.
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
    fisher_only: bool = False,
    dry_run: bool = False,
) -> PushResult:
    """Publish a checkpoint with its Fisher, ledger and card on the Hub, in one commit.

    The checkpoint is verified before anything is sent, and what the repository holds after. A
    commit is made only upon the one that was looked at; until it is made the repository is as it
    was, and a push that is started again sends what is missing.

    Args:
        checkpoint: A folder, a weights file, or a repository on the Hub.
        repository: Where to, such as user/model; created where it is missing.
        public: Create the repository as public, and allow pushing to a public one.
        create_pr: Open a pull request instead of committing.
        revision: The branch; created where it is missing.
        commit_message: Message of the commit.
        tag: Tag the commit with this name.
        token: Token for the Hub; that of `hf auth login` or HF_TOKEN by default.
        base_model: For the card: what this model was made from. May be repeated, for a merge.
        fisher_dtype: Dtype of the Fisher, as it is by default; bfloat16 is half as large. One of
            float32, bfloat16.
        fisher_only: Publish the Fisher alone, for the weights in the repository `base_model`.
        dry_run: Only list what would be sent, with sizes, and what is there already; without a
            network all of it.

    Returns:
        What was done: the commit, every file with its size and what became of it, and digests.

    Raises:
        UsageError: The options contradict each other or the repository.
        InputError: The checkpoint is not intact, or the Hub refuses.
        NonFiniteError: NaN or infinity in the weights or in the Fisher.
        NetworkError: The Hub cannot be reached or fails, or does not hold what was sent.
    """
    given = locals()
    from consolidate.commands import push as command

    return command.push(gather(PushOptions, given))
