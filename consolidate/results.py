"""What the commands return, one record each; the JSON schema is made from these.

Results are plain dicts, which `--json` writes as they are.
"""

from typing import Annotated, Any, Literal, NotRequired, TypedDict

from msgspec import Meta


def about(description: str, **bounds: Any) -> Meta:
    """Describe a field for the schema."""
    return Meta(description=description, **bounds)


def one_of(*choices: str) -> Meta:
    """List the possible values."""
    return Meta(extra_json_schema={"enum": list(choices)})


Path = Annotated[str, about("As given.")]
Digest = Annotated[str, about("SHA-256 over names, dtypes, shapes and values.")]
Count = Annotated[int, Meta(ge=0)]
Bytes = Annotated[int, about("In bytes.", ge=0)]
Commits = Annotated[dict[str, str], about("Of each Hub repository that was read.")]
# JSON has no NaN or infinity: one of these may be null there.
Score = Annotated[float, Meta(extra_json_schema={"or null": True})]
Metrics = Annotated[
    dict[str, Score],
    about("loss, and accuracy or perplexity; score is the accuracy, else minus the loss."),
]
Evaluations = dict[str, Metrics]
Times = Annotated[
    dict[str, Evaluations],
    about("By time (before, step N, epoch N, after), then by dataset and metric."),
]
BaseDigest = Annotated[
    str | None, about("Digest of the base model if the weights are an adapter's.")
]
Anchor = Literal["the weights", "fisher/anchor"]
FactorAnchor = Literal["the weights", "fisher/factor_anchor"]
FisherDtype = Literal["F32", "BF16"]
Descent = Literal["weights", "tasks"]
Format = Literal["consolidate-fisher"]
Estimator = Annotated[str, one_of("exact", "mc", "empirical", "batched")]
Structure = Annotated[str, one_of("diagonal", "inputs")]
MergeRule = Annotated[str, one_of("online", "separate")]
PenaltyOn = Annotated[
    Annotated[str, one_of("adapter", "merged")] | None,
    about("What the penalty applied to, if an adapter was trained with one."),
]
DoneOrCached = Annotated[Literal["done", "cached"], about("cached: the output was up to date.")]
FORGOT = about("With `--json`, if it forgot too much.")
Change = Annotated[
    Literal["new", "changed", "unchanged", "not compared"],
    about("not compared: a dry run that could not reach the Hub."),
]


class _Of(TypedDict):
    checkpoint: Path
    commits: Commits


class ErrorResult(TypedDict):
    """A command that failed; the process exits with exit_code."""

    status: Literal["failed"]
    exit_code: Literal[1, 2, 3, 4, 5, 75, 130, 143]
    error: Annotated[str, about("The message on stderr, without `error: `.")]


class MeasuredLayer(TypedDict):
    """The Fisher of one parameter."""

    trace: float
    relative_error: Annotated[
        float | None,
        about("Standard error of the trace over the trace; null where not known."),
    ]


class FactorTotals(TypedDict):
    """The matrices beside a Fisher."""

    layers: Annotated[int, about("Layers that have one.", ge=0)]
    bytes: Bytes


class MeasuredFisher(TypedDict):
    """The Fisher of one task, as measured."""

    task: str
    weight: Annotated[float, about("Factor of the task's Fisher.")]
    merge_rule: MergeRule
    gamma: float
    estimator: Estimator
    examples: Count
    units: Annotated[int, about("Examples, or predicted tokens.", ge=0)]
    parameters: Annotated[int, about("Number of measured values.", ge=0)]
    trace: Annotated[float, about("Sum of the values of the task's Fisher.")]
    structure: Structure
    factors: Annotated[FactorTotals | None, about("Of all tasks; null with the diagonal alone.")]
    layers: dict[str, MeasuredLayer]
    methods: NotRequired[
        Annotated[
            dict[str, Count],
            about("Parameters by rule, by recomputing a module, by a loop; absent if cached."),
        ]
    ]


class EncodedAs(TypedDict):
    """How the rows of a task became examples."""

    loss_on: Annotated[
        Annotated[str, one_of("assistant", "completion", "all")] | None,
        about("Tokens that are predicted; null if the model is not a causal language model."),
    ]
    max_length: Annotated[
        int | None, about("`--max-length`; null if it was not given, unless texts were generated.")
    ]


class Generated(TypedDict):
    """Texts that the model generated, in place of data."""

    sequences: Count
    max_length: Annotated[int, about("Tokens that each has at most, without its prompt.")]
    temperature: float
    top_p: float
    seed: int
    prompts: Annotated[str | None, about("Digest of the file; null without prompts.")]
    label_draws: Annotated[
        int | None, about("Labels sampled for each text; null: its own, or all with exact.")
    ]
    batch_size: Annotated[int, about("As given; for texts as for the pass.")]
    halvings: Annotated[int, about("How often memory was not enough for a batch of texts.")]
    texts: Annotated[
        str | None, about("Digest of the file that --save-generated writes; null without digests.")
    ]


class ImagePreprocessing(TypedDict):
    """How images became inputs of a user's own module."""

    size: Annotated[list[Count], about("Height and width of the model's input.")]
    resize: Annotated[
        list[Count] | None,
        about("Height and width to resize to before the center crop; null: no resizing."),
    ]
    crop_mode: Annotated[
        str, one_of("center", "squash"), about("center: the ratio of the sides is kept.")
    ]
    interpolation: str
    mean: list[float]
    std: list[float]
    channels: Count


class FisherDone(MeasuredFisher, EncodedAs, _Of):
    """A Fisher that was measured and stored."""

    status: DoneOrCached
    fisher: Path
    generated: Annotated[Generated | None, about("null: measured on data.")]
    images: NotRequired[ImagePreprocessing]
    seconds: NotRequired[Annotated[float, about("Of the pass, in this call; absent if cached.")]]


class PeakMemory(TypedDict):
    """The most memory that was taken."""

    peak_memory: Bytes
    peak_device_memory: Annotated[int | None, about("In bytes.")]


class PassCost(PeakMemory):
    """What a pass over data takes."""

    estimator: Estimator
    structure: Structure
    examples: Count
    parameters: Count
    seconds_per_example: float
    seconds: Annotated[float, about("Of the whole pass.")]


class GenerationCost(TypedDict):
    """What generating texts takes."""

    generation_seconds: NotRequired[
        Annotated[float, about("Of generating all texts; absent without --generate.")]
    ]
    generation_changed: NotRequired[
        Annotated[
            float,
            about("Largest share of texts that another batch size may change, estimated from two."),
        ]
    ]


class FisherDryRun(PassCost, GenerationCost):
    """What measuring would take."""

    status: Literal["dry run"]
    task: str
    files: Annotated[dict[str, Bytes], about("Files of the result.")]
    kept: Annotated[dict[str, Bytes], about("Saved progress, which is removed at the end.")]


FisherResult = FisherDone | FisherDryRun


class Trial(TypedDict):
    """One candidate of a search for λ."""

    ewc_lambda: float
    steps: Count
    metrics: Annotated[Evaluations | None, about("null if it diverged.")]
    forgetting: float | None
    penalty_per_lambda: float | None
    divergence: float | None
    seconds: float
    mean: float | None
    chosen: bool


class SearchCost(TypedDict):
    """What a search for λ took."""

    runs: Count
    steps: Count
    full_runs: float
    seconds: float


class LambdaSearch(TypedDict):
    """A search for λ: the candidates, their metrics, and the chosen one."""

    ewc_lambda: Annotated[float, about("The chosen λ.")]
    select: Annotated[str, one_of("best-mean", "smallest", "largest")]
    max_forgetting: float | None
    measured: str
    new_task: str
    old_tasks: list[str]
    before: Evaluations
    trials: list[Trial]
    cost: SearchCost


class AlphaTrial(TypedDict):
    """The weights at one α, between the start and the end of training."""

    alpha: float
    metrics: Annotated[Evaluations | None, about("null: the loss is not finite.")]
    forgetting: float | None
    mean: float | None
    chosen: bool


class AlphaSearch(TypedDict):
    """How α was chosen: what was measured at each."""

    alpha: Annotated[float, about("What was chosen.")]
    rule: Annotated[
        str,
        one_of("best-mean", "kept-gain"),
        about("kept-gain: the smallest α that keeps 95% of what the new task gains."),
    ]
    measured: str
    new_task: str
    old_tasks: list[str]
    before: Evaluations
    trials: list[AlphaTrial]


class CurvePoint(TypedDict):
    """The score on each task at one α; at 0 before training."""

    alpha: float
    scores: dict[str, float]


class Interpolation(TypedDict):
    """Where the weights are between the start and the end of training."""

    alpha: Annotated[float, about("From 0, the start, to 1, what was trained.", ge=0, le=1)]
    method: Annotated[str, one_of("plain", "fisher")]
    curve: Annotated[list[CurvePoint], about("What α was chosen from; empty where it was given.")]


class Replayed(TypedDict):
    """Rows of earlier tasks that were trained on too."""

    data: str
    data_digest: str | None
    share: Annotated[float, about("Of the rows trained on, between 0 and 1.", gt=0, lt=1)]


class Benchmark(TypedDict):
    """A task of EleutherAI's evaluation harness that a model was scored on."""

    harness: Annotated[str, about("Version of lm-eval.")]
    task: str
    version: str | None
    metric: Annotated[str, about("Which metric is the score; `minus …` if lower is better.")]
    examples: Count
    limit: int | None
    digest: Annotated[str | None, about("SHA-256 of a local task file, its functions and data.")]


class Comparison(TypedDict):
    """What the penalty saved: the same run with it and without it."""

    new_task: str
    old_tasks: Annotated[list[str], about("Those that were measured.")]
    before: Evaluations
    with_penalty: Evaluations
    without_penalty: Annotated[Evaluations | None, about("null if it diverged.")]


class Forgotten(TypedDict):
    """The scores of an old task before and after a training."""

    before: Score
    after: Score


class TrainingStep(TypedDict):
    """What one optimizer step reported."""

    step: Count
    loss: float
    penalty: float
    learning_rate: float
    gradient_norm: float | None


class Budget(TypedDict):
    """How many nats of loss earlier tasks could gain, and what each gained on the rows given."""

    nats: Annotated[float, about("Per example or token; above 0.", ge=0)]
    lost: Annotated[dict[str, float], about("By earlier task, of the weights that were stored.")]


class BudgetPoint(TypedDict):
    """What an earlier task had lost after a step, and the λ from there on."""

    step: Count
    lost: Annotated[float, about("In nats, of the task that lost most, on the rows measured.")]
    ewc_lambda: float


class PhaseSeconds(TypedDict):
    """Wall time of each phase, in this call: not that of an interrupted one, nor of a search."""

    training: Annotated[float, about("Without the evaluations in between.")]
    evaluation: float
    fisher: float


class FinetuneFisher(MeasuredFisher):
    """The new task's Fisher, and its folder."""

    folder: Path


class Finetuned(EncodedAs, _Of):
    """What is known of a fine-tuning run, done now or earlier."""

    penalty: Annotated[str, one_of("ewc", "l2", "none")]
    penalty_on: PenaltyOn
    ewc_lambda: float | None
    norm_statistics: Annotated[
        Annotated[str, one_of("frozen", "update")] | None,
        about("What happened to running statistics; null if the model has none."),
    ]
    interpolation: Interpolation | None
    replayed: Replayed | None
    budget: Budget | None
    metrics: Times
    benchmarks: Annotated[dict[str, Benchmark], about("Those among the datasets, by name.")]
    forgotten: Annotated[
        dict[str, Forgotten], about("Scores of the old tasks that were evaluated.")
    ]
    measured_nats: Annotated[
        dict[str, Score],
        about(
            "Rise of the mean negative log-likelihood, per example or token, of each old task "
            "that was evaluated."
        ),
    ]
    fisher: Annotated[FinetuneFisher | None, about("null: not measured, with --no-fisher.")]


class FinetuneCached(Finetuned):
    """The output was up to date: what its ledger records."""

    status: Literal["cached"]
    exit_code: NotRequired[Annotated[Literal[5], FORGOT]]
    error: NotRequired[Annotated[str, FORGOT]]


class FinetuneDone(Finetuned):
    """A fine-tuning run that was done now."""

    status: Annotated[
        Literal["done", "forgot too much"],
        about("forgot too much: exit code 5, and the output is saved separately."),
    ]
    exit_code: NotRequired[Annotated[Literal[5], FORGOT]]
    error: NotRequired[Annotated[str, FORGOT]]
    steps: Count
    loss: Annotated[float | None, about("Of the last step, per unit.")]
    penalty_value: Annotated[float | None, about("Before the last step.")]
    share_moved: Annotated[float, about("Share of the weights that changed, 0 to 1.", ge=0, le=1)]
    predicted_nats: Annotated[
        Score | None,
        about(
            "What the Fisher predicts of measured_nats, to second order: ½ Σ Λ Δ² at λ = 1, the "
            "sum over the old tasks times task_weights; null without a Fisher of earlier tasks."
        ),
    ]
    task_weights: Annotated[
        dict[str, float],
        about("Weight of each old task in predicted_nats: that of the ledger, times powers of γ."),
    ]
    images: NotRequired[ImagePreprocessing]
    seconds: PhaseSeconds
    history: list[TrainingStep]
    lambda_search: NotRequired[LambdaSearch]
    alpha_search: NotRequired[AlphaSearch]
    budget_path: NotRequired[
        Annotated[list[BudgetPoint], about("With --budget: from where λ is no longer 0.")]
    ]
    comparison: NotRequired[Annotated[Comparison, about("With --compare-none.")]]


class FinetuneDryRun(PeakMemory):
    """What a training would take, without evaluation, search, and measuring Fishers."""

    status: Literal["dry run"]
    task: str
    old_tasks: Annotated[list[str], about("That the penalty protects, or would.")]
    penalty: Annotated[str, one_of("ewc", "l2", "none")]
    ewc_lambda: Annotated[float | None, about("null: none, or it is chosen on the way.")]
    examples: Annotated[Count, about("Of the new task, in an epoch.")]
    parameters: Annotated[Count, about("That are trained.")]
    steps: Count
    seconds_per_step: float
    seconds: Annotated[float, about("Of all steps.")]
    output_bytes: Annotated[Bytes, about("At most.")]
    fisher_memory: Annotated[
        int | None,
        about(
            "In bytes, what the weights and the sums of the Fisher after the training take in this "
            "process, without factors and activations. null: it is not measured."
        ),
    ]


FinetuneResult = FinetuneDone | FinetuneCached | FinetuneDryRun

EvaluateResult = Annotated[
    dict[str, dict[str, Score | Benchmark]],
    about("The metrics of each dataset, by name; with `benchmark` where it is one."),
]


class MergeResult(_Of):
    """A checkpoint that several were merged into."""

    status: DoneOrCached
    fisher: Path
    models: list[Path]
    weights: list[float]
    base: str | None
    tasks: list[str]
    parameters: Count
    trace: float
    penalty_offset: float
    anchor: Anchor
    factors: Annotated[FactorTotals | None, about("Null with the diagonal alone.")]
    without_factors: Annotated[
        list[str], about("Weights that some of the models, not all, have a factor of.")
    ]


class RemapResult(_Of):
    """A checkpoint with the Fisher of the same weights under other names."""

    status: DoneOrCached
    fisher: Path
    renamed: Annotated[Path, about("The checkpoint with the new names.")]
    fisher_of: Annotated[Path, about("The folder of the Fisher that was carried over.")]
    tasks: list[str]
    names: Annotated[dict[str, str], about("The new name of each tensor of the ledger.")]
    left_out: Annotated[
        list[str],
        about("Tensors without a Fisher that only the checkpoint with the old names has."),
    ]
    not_covered: Annotated[
        list[str], about("Tensors that only the checkpoint with the new names has.")
    ]


class Mean(TypedDict):
    """A mean over the terms that were measured."""

    value: float | None
    terms: Annotated[int, about("Number of measured terms.", ge=0)]
    of: Annotated[int, about("Number of all terms.", ge=0)]


class Point(TypedDict):
    """The scores after a number of optimizer steps of a task."""

    task: str
    step: Count
    scores: dict[str, Score]


class MatrixSummary(TypedDict):
    """scores[i][j] is the score on task j after training task i; null if not measured."""

    tasks: list[str]
    scores: list[list[float | None]]
    start: list[float | None]
    acc: Mean
    bwt: Mean
    forgetting: Annotated[Mean, about("Over the earlier tasks and the benchmarks.")]
    points: Annotated[list[Point], about("The curves over the optimizer steps of each task.")]
    benchmarks: Annotated[
        dict[str, list[float | None]],
        about("Of benchmarks that are no tasks: the score at the start and after each task."),
    ]


class RunStep(TypedDict):
    """One checkpoint of a chain."""

    step: str
    checkpoint: Path
    reason: Annotated[str | None, about("Why it is not skipped.")]
    status: Literal["done", "skipped", "to be done"]


class RunResult(TypedDict):
    """A chain of tasks."""

    status: Literal["done", "dry run"]
    output_dir: Path
    steps: list[RunStep]
    checkpoint: Path
    accuracy_matrix: MatrixSummary | None


class Task(TypedDict):
    """A task as in the ledger, which the file format specifies, without its layers."""

    name: str
    objective: str
    likelihood: str
    labels: list[str] | None
    unit: str
    examples: int | None
    units: int | None
    estimator: str | None
    mc_samples: int | None
    seed: int
    loss_on: Annotated[str | None, about("null: the default of the task's rows.")]
    max_length: Annotated[int | None, about("null: the model's limit.")]
    weight: float
    weight_by: Annotated[str | None, about("units or trace, for a task that is not measured yet.")]
    data: str
    data_digest: str | None
    generated: Generated | None
    ewc_lambda: float | None
    penalty: str | None
    penalty_on: PenaltyOn
    parent: str | None
    interpolation: Interpolation | None
    replayed: Replayed | None
    budget: Budget | None
    made_from: Annotated[str | None, about("Digest of everything that the result depends on.")]
    metrics: Times
    benchmarks: dict[str, Benchmark] | None


class WeightsTotals(TypedDict):
    """The weights that a Fisher belongs to."""

    tensors: Count
    digest: Digest


class FisherTotals(WeightsTotals):
    """A whole Fisher."""

    values: Count
    dtype: FisherDtype
    trace: float


Share = Annotated[float, about("Share of the whole trace, 0 to 1.", ge=0, le=1)]


class Factor(TypedDict):
    """A matrix beside the diagonal."""

    name: str
    matrix: Annotated[str, about("Its kind: R, A or G.")]
    size: Annotated[int, about("Rows, and columns.", ge=1)]
    bytes: Bytes
    parameters: Annotated[list[str], about("The parameters that it stands for.")]
    share: Share


class ShownFactors(WeightsTotals):
    """All matrices beside the diagonal, and what they protect in its place."""

    bytes: Bytes
    dtype: FisherDtype
    values: Annotated[int, about("Weights that they protect.", ge=0)]
    share: Share
    anchor: FactorAnchor
    offset: Annotated[float, about("In place of penalty_offset where they are used.")]
    matrices: list[Factor]


class Parameter(TypedDict):
    """How strongly a parameter is protected."""

    name: str
    shape: list[int]
    trace: float
    mean: float
    max: float | None
    share: Share
    factor: Annotated[str | None, about("The matrix that stands for it; null: its diagonal does.")]


class LayerOverlap(TypedDict):
    """How far two Fishers lie on the same weights of a layer."""

    name: str
    overlap: Annotated[float, about("From 0 to 1.", ge=0, le=1)]


_With = TypedDict("_With", {"with": str})  # no field of a class can be called so


class Overlap(_With):
    """How far this diagonal and that of another checkpoint lie on the same weights."""

    layers: list[LayerOverlap]
    left_out: list[str]


class ShowResult(_Of):
    """What a checkpoint's ledger and Fisher contain."""

    format: Format
    version: int
    merge_rule: MergeRule
    gamma: float
    penalty_offset: float
    tasks: list[Task]
    fisher: FisherTotals
    factors: ShownFactors | None
    weights: WeightsTotals
    base: BaseDigest
    anchor: Anchor
    heads: list[str]
    parameters: Annotated[list[Parameter], about("Those with the largest trace, as many as --top.")]
    parameters_left_out: Count
    unprotected: Annotated[dict[str, str], about("Why a parameter is not protected, by name.")]
    versions: dict[str, str]
    accuracy_matrix: MatrixSummary | None
    side_by_side: Annotated[
        list[list[str]],
        about("Groups of tasks that were learned from the same weights and merged."),
    ]
    overlap: Overlap | None


class TensorSet(WeightsTotals):
    """Tensors of one kind, all of them read."""

    bytes: Count


class VerifyResult(_Of):
    """An intact checkpoint."""

    tasks: list[str]
    generated: Annotated[
        list[str], about("Those of the tasks that were measured on texts of the model itself.")
    ]
    base: BaseDigest
    base_model: Annotated[
        str | None,
        about("Path of the base model, or of the weights of a Fisher alone, if compared."),
    ]
    weights: TensorSet
    fisher: TensorSet
    anchor: NotRequired[TensorSet]
    factors: NotRequired[TensorSet]
    factor_anchor: NotRequired[TensorSet]
    heads: dict[str, TensorSet]
    other_files: list[str]
    later: NotRequired[
        Annotated[
            list["VerifyResult"],
            about("The checkpoints after the first, each made from the one before."),
        ]
    ]
    descends_by: NotRequired[Descent]


class ReportResult(_Of):
    """The files of a report."""

    report: Path
    plots: list[Path]
    tasks: list[str]


class PushedFile(TypedDict):
    """A file of a repository."""

    path: str
    size: Bytes
    change: Change


class PushResult(TypedDict):
    """A checkpoint in a repository on the Hub."""

    status: Literal["done", "unchanged", "dry run"]
    repository: str
    url: str
    private: bool
    commit: str | None
    pull_request: str | None
    tag: str | None
    weights: Digest
    fisher: Digest
    files: list[PushedFile]
    deleted: list[str]
    code: Annotated[list[str], about("The files that are code, named by an auto_map.")]


RESULTS: dict[str, Any] = {
    "failed": ErrorResult,
    "fisher": FisherResult,
    "finetune": FinetuneResult,
    "evaluate": EvaluateResult,
    "merge": MergeResult,
    "remap": RemapResult,
    "run": RunResult,
    "show": ShowResult,
    "report": ReportResult,
    "verify": VerifyResult,
    "push": PushResult,
}
"""What `--json` may print, by command, and the object of a command that failed."""
