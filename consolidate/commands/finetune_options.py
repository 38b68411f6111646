"""What the options of `finetune` exclude for any checkpoint and data."""

from consolidate.options import Estimation, FinetuneOptions
from formats.benchmark import benchmark_task
from formats.errors import UsageError


def check_options(options: FinetuneOptions) -> None:
    """Refuse with UsageError options that contradict each other."""
    penalty, recipe, adapter = options.penalty, options.recipe, options.adapter
    ewc_lambda = options.search.ewc_lambda
    free = penalty.penalty == "none" and "--penalty none"
    plain = recipe.optimizer != "sgd" and f"--optimizer {recipe.optimizer}"
    trains_head = adapter.lora_train_head
    kept = options.head.head == "keep" and not trains_head and "--head keep"
    fresh = options.head.head == "new" and "--head new, which has no output for the old labels"
    trained = options.head.head != "keep" and f"--head {options.head.head}, which trains its head"
    whole = adapter.lora_rank is None
    for option, given, other in (
        ("ewc-lambda", ewc_lambda is not None, free),
        ("penalty-step", recipe.penalty_step != "gradient", free),
        ("penalty-dtype", penalty.penalty_dtype is not None, free),
        ("penalty-device", penalty.penalty_device is not None, free),
        ("compare-none", options.gate.compare_none, free),
        ("momentum", recipe.momentum is not None, plain),
        ("adam-betas", recipe.adam_betas is not None, not plain and "--optimizer sgd"),
        ("head-parameters", bool(options.head.head_parameters), kept),
        ("lora-train-head", trains_head, not whole and trained),
        ("replay", options.replaying.replay is not None, fresh),
        ("protect-self", penalty.protect_self is not None, _excluded_by_protect_self(options)),
        ("budget", options.search.budget is not None, _excluded_by_budget(options)),
    ):
        if given and other:
            raise UsageError(f"--{option} cannot be combined with {other}: leave one of them out")
    for option, given in (
        ("lora-targets", bool(adapter.lora_targets)),
        ("lora-alpha", adapter.lora_alpha is not None),
        ("lora-train-head", trains_head),
    ):
        if given and whole:
            raise UsageError(f"--{option} needs --lora-rank: give both, or leave it out")
    if options.replaying.replay_share is not None and options.replaying.replay is None:
        raise UsageError("--replay-share needs --replay: name the old rows, or leave it out")
    if penalty.save_generated is not None and penalty.protect_self is None:
        raise UsageError("--save-generated needs --protect-self: give both, or leave it out")
    if recipe.adam_betas is not None and len(recipe.adam_betas) != 2:
        found = ",".join(map(str, recipe.adam_betas))
        raise UsageError(f"--adam-betas {found}: expected two numbers, β₁ and β₂")
    if not free and ewc_lambda is None and options.search.budget is None:
        raise UsageError(
            f"--penalty {penalty.penalty} needs --ewc-lambda: a number, or auto, which searches; "
            "the strength has no default"
        )
    _check_measuring(options)
    if recipe.evaluate_every is not None and not options.gate.evaluate:
        raise UsageError("--evaluate-every needs test data: name it with --evaluate NAME=DATA")
    _check_choosing(options)
    evaluated = (options.gate.evaluate or {}).values()
    if options.parameters.shard and any(benchmark_task(data) is not None for data in evaluated):
        raise UsageError("--shard cannot run a benchmark of lm-eval: evaluate it afterwards")


def _check_choosing(options: FinetuneOptions) -> None:
    """Refuse what only a search for λ or α needs without one, and either with --shard."""
    search, interpolating = options.search, options.interpolating
    if is_search(options):
        if options.parameters.shard:
            raise UsageError("--shard needs one --ewc-lambda: search for λ without --shard")
    elif search.select or search.search_plot:
        raise UsageError(
            "--select and --search-plot need a search: give --ewc-lambda several numbers or auto"
        )
    elif search.validation and search.budget is None and interpolating.interpolate != "auto":
        raise UsageError(
            "--validation needs a search: give --ewc-lambda several numbers or auto, or "
            "--interpolate auto, or --budget"
        )
    if interpolating.interpolation != "plain" and interpolating.interpolate is None:
        raise UsageError(
            f"--interpolation {interpolating.interpolation} needs --interpolate: give α, or auto"
        )
    if interpolating.interpolate is not None and options.parameters.shard:
        raise UsageError(
            "--interpolate cannot be combined with --shard, where no process has whole weights: "
            "leave one of them out"
        )


def _excluded_by_protect_self(options: FinetuneOptions) -> str:
    """Name what cannot be combined with --protect-self, if anything."""
    penalty = options.penalty
    if penalty.penalty != "ewc":
        return f"--penalty {penalty.penalty}"
    if penalty.fisher is not None:
        return "--fisher"
    return "--shard, in which no process has a whole model" if options.parameters.shard else ""


def _excluded_by_budget(options: FinetuneOptions) -> str:
    """Name what cannot be combined with --budget, if anything."""
    if options.penalty.penalty == "none":
        return "--penalty none, which has no λ to set"
    if options.search.ewc_lambda is not None:
        return "--ewc-lambda, as it sets λ itself"
    if options.interpolating.interpolate is not None:
        return "--interpolate, as it sets α itself"
    if options.gate.compare_none:
        return "--compare-none, as the run without a penalty would not go back to any α"
    if options.search.select or options.search.search_plot:
        return "--select or --search-plot, as it does not search"
    if options.recipe.norm_statistics == "update":
        return "--norm-statistics update, with which no α is sure to keep it"
    return "--shard, where no process has whole weights" if options.parameters.shard else ""


def _check_measuring(options: FinetuneOptions) -> None:
    """Refuse what only a Fisher needs where none is measured, and what one run cannot compare."""
    fisher, measuring = options.estimation, options.measuring
    used = measuring.measure or options.interpolating.interpolation == "fisher"
    default = Estimation(batch_size=None)
    if measuring.no_fisher and not used and fisher != default:
        name = next(n for n, value in vars(fisher).items() if value != getattr(default, n))
        raise UsageError(
            f"--fisher-{name.replace('_', '-')} cannot be combined with --no-fisher: leave one of "
            "them out"
        )
    if not options.gate.compare_none:
        return
    for other, given in (
        ("--interpolate", options.interpolating.interpolate is not None),
        ("--shard", options.parameters.shard),
    ):
        if given:
            raise UsageError(f"--compare-none cannot be combined with {other}: train twice instead")


def is_search(options: FinetuneOptions) -> bool:
    """Return whether λ is to be chosen among several."""
    ewc_lambda = options.search.ewc_lambda
    return ewc_lambda is not None and not isinstance(ewc_lambda, int | float)
