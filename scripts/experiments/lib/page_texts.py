"""Texts of the pages of the trade-off."""

from dataclasses import dataclass
from typing import NamedTuple

TITLES = {
    "lora": "LoRA, rank 8",
    "lora_convolutions": "LoRA, rank 8, with convolutions",
    "interpolation": "interpolation with the start",
    "free": "no penalty, several learning rates",
    "l2": "L2 penalty around the start",
    "l2_growing": "L2 penalty that grows with the tasks",
    "ewc": "EWC",
    "inputs": "EWC, structure inputs",
    "l2_faster": "L2 penalty, larger rate",
    "ewc_faster": "EWC, larger rate",
    "interpolation_faster": "interpolation, larger rate",
    "fewer_steps": "no penalty, fewer steps",
    "freeze": "frozen embeddings and lower layers",
    "distill": "distillation from the start",
    "lora_ewc": "LoRA, rank 8, with EWC",
    "replay": "replay of 1 % of the old data",
    "joint": "joint training on all old data",
    "ewc_generated": "EWC, Fisher of generated texts",
    "ewc_many": "EWC, Fisher of 1,024 generated texts",
    "ewc_data_many": "EWC, Fisher of 1,024 rows of data",
    "ewc_prompted": "EWC, Fisher of generated answers",
    "inputs_prompted": "EWC, structure inputs, of generated answers",
    "ewc_opened": "EWC, Fisher of generated turns of a user",
    "inputs_opened": "EWC, structure inputs, of generated turns of a user",
    "ewc_mails": "EWC, Fisher of mails",
    "ewc_random": "EWC, Fisher of random tokens",
    "inputs_generated": "EWC, structure inputs, of generated texts",
    "inputs_many": "EWC, structure inputs, of 1,024 generated texts",
    "inputs_data_many": "EWC, structure inputs, of 1,024 rows of data",
    "ewc_random_many": "EWC, Fisher of 1,024 random texts",
    "inputs_random_many": "EWC, structure inputs, of 1,024 random texts",
    "replay_generated": "replay of generated texts",
    "ewc_floor": "EWC with a floor",
    "ewc_tempered": "EWC, tempered Fisher",
    "ewc_interpolated": "EWC, then interpolation",
    "inputs_interpolated": "EWC, structure inputs, then interpolation",
}


class Scale(NamedTuple):
    """How scores of a setting are written."""

    factor: float  # from a score to the unit
    unit: str
    below: tuple[float, ...]  # levels: the best new score less these, in the unit
    digits: int


POINTS = Scale(100.0, "points", (2.0, 5.0), 1)
NATS = Scale(1.0, "nats", (0.02, 0.05, 0.2), 3)


@dataclass(frozen=True)
class Page:
    """What a page says of its setting."""

    title: str
    text: str
    rows: tuple[int, int]  # test rows of the old and of the new task
    score: str  # on the axes
    scale: Scale = POINTS
    limits: str = ""  # a section on what the comparison leaves open
    kinds: tuple[str, ...] = ()  # of old text, with as many test rows each, one after the other
    own_best: bool = False  # levels count from each seed's best, whose test rows are not alike


ALIKE = """
The test rows of the seeds are not equally hard. So new scores, here and in the picture, count from
the best point of any method with the same seed, to which the mean of these best is added; where
rows are drawn, so are those of the best. A part of the best is the luck of one training. (Until 28
November 2026 the level was one for all seeds, and at the highest one seed alone counted; the curves
were known when this was changed.)
"""
PRECISION = """
All methods multiply matrices in bfloat16; weights, Fisher and penalty are in float32.
"""
SOURCES = """
Unless another number is given, Fishers are measured on 64 texts, with one sampled text for each
(`mc`): on training rows of the old task, on mails (another domain), or on random tokens. Generated
texts are drawn by the model from its end-of-text token and count with their own labels. All of them
have the learning rate that EWC's search chose with the Fisher of the data. The third of the levels
below was added after the curves of the small model had been seen.
"""
PAGES = {
    "newsgroups": Page(
        title="20 Newsgroups: the same four labels, other groups",
        rows=(1000, 1000),
        score="accuracy",
        text=f"""
Model: the encoder MiniLM (22.7 million weights) with one classification head. Old task: the
top-level names comp, rec, sci and talk on nine groups of 20 Newsgroups; 1,600 texts, two epochs,
AdamW, learning rate 1e-4 with linear decay. New task: the same four labels on eight other groups;
1,600 texts in batches of 16, one epoch (100 steps). Texts are truncated at 64 tokens. Each task has
300 validation texts and 1,000 test texts; every seed draws its own of the same pool. The Fisher is
exact, measured on 400 training texts of the old task. {PRECISION}
""",
        limits="""
## What the rates do

The search gave EWC and L2 the rate 1e-4 and the structure `inputs` 3e-4, the upper edge of the
grid, with one seed and 600 validation texts. EWC scored the same at 3e-4, where the smaller rate
wins a tie, and L2 and interpolation little less. So these three were run at 3e-4 too, once all
other figures were known (`larger rate`).

Most of the other methods have three strengths where EWC has four. In the search freezing learned
more at larger rates than at the one with the best mean, distillation has no weight below 1, and
joint training has one learning rate, that of the old task.
""",
    ),
    "language_model": Page(
        title="A language model, from edited prose to Usenet",
        rows=(60, 60),
        kinds=("news", "science", "addresses"),
        score="log-likelihood per token",
        scale=NATS,
        own_best=True,
        text=f"""
Model: SmolLM2-135M-Instruct as published (4 bits per weight, expanded to float32). Old task: edited
prose of three kinds in equal parts, namely news and science from the Brown corpus and State of the
Union addresses. The model is not fine-tuned on it, and the text that it was made of is not known:
the old task is a proxy, and measures what the published model loses. New task: messages of
rec.sport.hockey, in lower case and without punctuation; 30 steps of 4 rows of 128 tokens, AdamW
with linear decay. The score is the mean log-likelihood per token in nats. Each task has 24
validation rows and 60 test rows; every seed deals the same documents out anew. {SOURCES} Rows have
128 tokens. Both tasks are running text, which the instruction-tuned model does not expect, so the
new task can also improve the old score. {PRECISION}
""",
        limits="""
## What the comparison leaves open

**Little is forgotten.** Where the new task is learned 0.2 nats less well than by the best method,
every method but LoRA scores higher on prose than the untouched model, no penalty too: there the
figures compare how much hockey improves the model's prose, not how much it forgets. The new task's
own score stands for learning: whoever learns less also improves less.

**Three seeds are few**, and the 60 test rows of the old task are cut from a few documents of each
kind, while rows are drawn as independent: the errors are rather too small.

**The curves are coarse.** λ steps are tenfold, interpolation has five shares of the way, and lines
between points are straight: with fewer shares interpolation would read lower. The structure
`inputs` kept and learned most at a λ of 100, and kept less at 10: its curve where much is learned
is hardly more than this one point. LoRA's largest rate, 0.003, is the edge of its grid, and still
rising. Replay of the 64 generated texts has two rates and two strengths.
""",
    ),
    "small_language_model": Page(
        title="A small language model, from edited prose to Usenet",
        rows=(240, 240),
        kinds=("news", "science", "addresses"),
        score="log-likelihood per token",
        scale=NATS,
        own_best=True,
        text=f"""
Model: a Llama of 1.1 million weights (four layers of width 128, 2,000 byte pairs), trained here on
the old task alone, so that its training text is known: news and science from the Brown corpus and
State of the Union addresses in equal parts, 4,224 rows of 64 tokens, 3,000 steps of 8 rows, AdamW,
learning rate 3e-3 with linear decay. New task: messages of rec.sport.hockey, in lower case and
without punctuation; 60 steps of 8 rows. The score is the mean log-likelihood per token in nats.
Test rows of the old task are from documents that the model has not seen (the byte pairs are of all
prose). Old: 120 validation rows and 240 test rows; new: 96 and 240; every seed draws documents
anew, from the same few. {SOURCES} Rows have 64 tokens. {PRECISION}
""",
        limits="""
## What the comparison leaves open

The model is small and weak: its perplexity on prose is 107 before the new task, and about 140 after
it with the best of the usual methods. The 240 test rows of the old task come from about five
documents in each seed, and the errors take rows as independent: they are too small.

`Joint training` draws 480 of the 4,224 old rows, with one weight and three rates of which the
largest is best: it is no upper bound. `Replay of 1 %` has 42 rows of one news document, and its
rate is a third of most others'. The chosen rate, 0.003, is the edge of the grid for all others that
were searched; EWC's variants take it without a search of their own. Replay of generated texts has
64 of them.

Figures of a level that not all seeds reach are means over different seeds: compare the paired
differences.
""",
    ),
    "text_chain": Page(
        title="Reuters, then spam, then 20 Newsgroups: a head for each",
        rows=(2000, 2000),
        score="accuracy",
        text=f"""
Model: the encoder MiniLM (22.7 million weights) with a task-specific head for each of three tasks.
Every method starts from the same checkpoint, which has learned the eight topics of Reuters R8 (two
epochs, AdamW, learning rate 1e-4 with linear decay). It then learns to tell spam from other mail
(one epoch) and the twenty groups of 20 Newsgroups (three epochs): 1,500 texts per task, truncated
at 48 tokens, batches of 16. Old score: mean accuracy on Reuters and spam after the last task. New
score: mean accuracy on spam and 20 Newsgroups, each right after it was learned. Each task has 300
validation texts and 1,000 test texts; every seed draws its own of the same pool. Fishers are exact,
on 1,000 training texts, scaled to the trace of the first and added up; the penalty is centred on
the weights before each task. Interpolation is applied after each task. The head of a new task is
free: no method penalizes it, or takes it back to its random start. {PRECISION}
""",
        limits="""
## What the comparison leaves open

**Rates.** The search, with one seed, gave EWC the rate 1e-4, the lower edge of the grid, and the
structure `inputs` 1e-3, the upper edge. The rate is not what `inputs` gains by: with the same seed
and λ = 10,000 it kept 5.2 points more than the diagonal at 1e-4, and 8.0 more at 3e-4, and learned
0.5 and 3.0 points more, on validation rows. But at 3e-4 the diagonal learned 2.7 points more than
at 1e-4 and kept 4.3 fewer, so that "not reached" is of its rate.

**Strengths.** Of three λ of `inputs` the largest, 30,000, kept and learned most: its curve is this
one point, and a larger λ could be better still.

**Growth.** EWC's penalty is the sum over the earlier tasks, L2's is not; an L2 that grows was not
run here. On [ten permutations](permutations.md#what-ewcs-gain-over-l2-is-due-to) that explains half
of what EWC gains over L2.

**LoRA's** largest rate, 0.003, learned most of those that were tried: a larger one could learn
more.

**No penalty** at a rate of 3e-4 failed on 20 Newsgroups with two of three seeds (5 and 16 %), and
what it had learned before went with it.

**Interpolation** has the rate 3e-4, at which training without a penalty failed with two seeds.
""",
    ),
    "permutations": Page(
        title="Ten permutations of MNIST: a small network",
        rows=(4500, 4500),
        score="accuracy",
        text="""
Model: a network of 784–256–256–10 units from random weights. Every method starts from the same
network, which has learned MNIST (200 steps of 64 images, AdamW, learning rate 1e-3 with linear
decay). It then learns nine permutations of the pixels, 200 steps each, with the same ten outputs.
Old score: mean accuracy on the first nine tasks after the last one. New score: mean accuracy on the
last nine, each right after it was learned. Each task has 300 validation images and 500 test images;
every seed draws its own images and permutations. Fishers are exact, on 1,000 training images,
scaled to the trace of the first and added up; the penalty is centred on the weights before each
task. Interpolation is applied after each task. Replay is of 1 % of each earlier task. Nobody
fine-tunes such a network; the page shows the
methods in the setting that papers on forgetting use.
""",
        limits="""
## What EWC's gain over L2 is due to

Each task's Fisher is added, so that EWC's penalty grows with the number of earlier tasks, while the
λ of L2 is the same for every task. `L2 penalty that grows with the tasks` multiplies λ by the
number of earlier tasks: what EWC gains over it is not due to the growth. {growing}

EWC's Fisher uses 1,000 training images of each old task; L2, LoRA and interpolation use none.

`Joint training` has 64 old rows, of all earlier tasks, beside the 64 new ones of each of 200 steps
a task, and its best rate is the largest of three: it is no upper bound ([joint training with more
steps](../paper/many-tasks.md) reaches 97.6 %, EWC 89.8 % there).

The best rate of EWC with both structures, of both kinds of L2 and of freezing (0.003) and of LoRA
with EWC (0.01) is the upper edge of their grid: a larger one could be better.
""",
    ),
    "tagging": Page(
        title="Parts of speech in the Brown corpus: another genre",
        rows=(1000, 1000),
        score="accuracy per word",
        text=f"""
Model: the encoder MiniLM (22.7 million weights) with one token-classification head. Old task: the
40 most frequent parts of speech, and one label for the others, in news of the Brown corpus; 1,600
sentences, two epochs, AdamW, learning rate 3e-4 with linear decay. New task: the same tags in
romances; 1,600 sentences in batches of 16, one epoch (100 steps). Sentences are truncated at 64
tokens. Each task has 300 validation sentences and 1,000 test sentences from files that training
does not see; the score is the mean over sentences of the share of correct tags; every seed draws
other files. The Fisher (`mc`, one sampled tag per word) is measured on 400 training sentences of
the old task. {PRECISION}
""",
        limits="""
## What this setting shows

Little: the tags are the same in both genres, the model tags romances at the start almost as well as
at the end, and training without a penalty at a usual rate forgets next to nothing. Both levels are
below the new score of the start, so that no method has to learn anything for them.
""",
    ),
    "vision": Page(
        title="Turned digits, with a network that read house numbers",
        rows=(1000, 1000),
        score="accuracy",
        text="""
Model: a convolutional network trained on the house numbers of SVHN (815,018 weights: six
convolutions with batch norm, two linear layers). Old task: digits of MNIST; 3,840 images of 32 × 32
pixels, two epochs, AdamW, learning rate 1e-3 with linear decay. New task: other digits, turned by a
right angle, with the same ten outputs; 3,840 images in batches of 32, one epoch (120 steps). The
running statistics of the batch norms stay as published. Each task has 300 validation images and
1,000 test images; every seed draws its own of the same pool. The Fisher is exact, measured on 400
training images of the old task. Matrix products are in float32.
""",
        limits="""
## What the structure `inputs` covers here

A layer has a matrix R only where the matrix has at most four times the elements of its weight. A
convolution of 3 × 3 with as many inputs as outputs has nine times as many. Here that leaves the
first convolution alone, 864 of 815,018 weights. The two curves also differ by their learning rates:
0.01 for EWC, the upper edge of its grid, and 0.003 for `inputs`. At 0.01 and the same λ `inputs`
kept 6.0 points less of the old score in the search, with its one seed: why is not known. LoRA
adapts all convolutions and linear layers.

L2's search preferred 0.003 to 0.01 by one image of 600: it was run at 0.01 too, once all other
figures were known (`larger rate`).
""",
    ),
}
CANDIDATE_TEXT = {
    "ewc_floor": " `EWC with a floor` adds 0.1 of the mean Fisher to that of every weight.",
    "ewc_tempered": (
        " `EWC, tempered Fisher` measures the Fisher of softmax(z/T), times T², with T = 4."
    ),
}
TRIAL = """
It is not complete yet. In a trial, which has no curve and whose strengths were seen on test rows,
it kept 86.6, 88.4 and 89.3 at the first level with seeds 0, 1 and 2 (read by eye), and EWC 90.6,
89.6 and 90.2, L2 with one λ 83.5, 85.4 and 84.3: most of EWC's gain over L2 is due to the growth.
"""
TEXT = """{setting}

## Choosing the learning rate

Every method has its own search: its learning rates with seed 0, at the third of four or five
strengths or the second of fewer (interpolation: half of the way), compared by the mean of the two
validation scores; the smallest rate wins a tie. All strengths then run with that rate and every
seed. Where the curve is one of learning rates there is no search. Test scores choose no rate; the
levels below and each curve's envelope are made of them.

{done}

## How much is forgotten

{forgotten}

## The curves

![Score on the old task against score on the new task]({name}.png)

Means over seeds on test rows; in brackets the number of seeds. Bands are one standard error of the
old score over seeds. Dotted lines are the levels of the next section. Where a method's limit is
training without a penalty (λ = 0, all steps, all of the way), its curve ends there, at its rate (in
the picture only where that learned most).
Replay of old data and joint training, where they are run, train on data of the old task, which the
other methods do not: they are references, not rivals. EWC measures its Fisher on such data, unless
its name says otherwise.
{candidates}

## Old score at equal new score

{levels}

Each seed's curve is its upper envelope, interpolated linearly between neighbouring points and never
extrapolated. "Not reached": no point learns that much. "≥": in some seed every point learns more
(the end without a penalty does not count), and the one that learns least stands in; a difference to
such a figure has "≤", and "~" where both are. In brackets, the seeds that reach the level out of
those that are done: compare figures of other seeds by their differences, which are paired by seed
and test row. Errors are standard errors from a bootstrap over seeds and test rows, of the draws
that reach the level, with the share of the seeds' variance added that a bootstrap of few seeds
lacks; where one seed alone reaches the level there is none. The seeds draw their rows from one
pool, which makes the errors rather too small.
{alike}

{limits}## The search for the learning rate

{search}

## All points

Means over seeds, in {unit}; seconds are processor time of training on one core.

{tried}

## What was not tried

{untried}
"""
UNTRIED = """
other ranks and targets of LoRA; OSFT and other projections; optimizers other than AdamW; EWC by
proximal steps; other numbers of steps on the new task, except by the method with fewer steps;
larger models.
"""
OVERVIEW = """# What is kept against what is learned

Fine-tuning makes a model forget, and every method against forgetting also limits what the model
learns. The pages below measure both sides for EWC and for what a user would choose instead: whole
curves, with a separate search of the learning rate for every method. One command produces
everything and resumes after an interruption:

```sh
.venv/bin/python scripts/experiments/tasks/tradeoff.py --plan     # how long it takes
.venv/bin/python scripts/experiments/tasks/tradeoff.py --data-dir tradeoff-data
```

The table gives the old score at equal new score: the best new score of any method (of language
models, with the same seed), less a margin. In brackets, the seeds that reach it out of those that
are done. Each page has the curves, and the differences with their errors. In the chains EWC's
penalty grows with the tasks, and L2's does not: [what EWC's gain is due
to](tradeoff/permutations.md#what-ewcs-gain-over-l2-is-due-to).{quick}

{table}

{pages}

## What training without a penalty forgets

Where it forgets nothing, no method can show anything. Old score on test rows before the new task,
less the one after it, mean over seeds; in chains, the mean over tasks of the score when the task
was learned, less the one at the end.

{forgotten}

## What was not tried

{untried}
"""
