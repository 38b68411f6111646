"""What is tried of each method in each setting: rates, strengths, and shares of the way back.

No part of the digests of code: each unit states its own rate and strength.
"""

from typing import NamedTuple

FIRST = ("lora", "lora_convolutions", "interpolation")
"""What a user would choose instead of a penalty: done before the other methods in each round."""
MAIN = (*FIRST, "free", "l2", "ewc", "inputs")
WITHOUT_DATA = (
    *("ewc_generated", "ewc_random", "replay_generated", "inputs_generated"),
    *("ewc_many", "inputs_many", "ewc_data_many", "inputs_data_many"),
    *("ewc_random_many", "inputs_random_many", "ewc_mails"),
    *("ewc_prompted", "inputs_prompted", "ewc_opened", "inputs_opened"),
)
"""What protects a language model with other text than 64 rows of the old task."""
ORDER = {
    "language_model": (
        ("free", "l2", "ewc", "ewc_generated", "ewc_random"),
        FIRST,
        ("inputs", "inputs_generated"),
    ),
    "text_chain": (MAIN,),  # a seed of all methods before the next seed
}
"""Of a setting whose units take long: what is done first, all seeds of it."""
FASTER = ("l2_faster", "ewc_faster", "interpolation_faster")
"""Methods at the rate of another penalty, where the search hardly preferred a smaller one."""
CANDIDATES = ("ewc_floor", "ewc_tempered")
"""Changes of EWC that have to earn a place: FIRST_SEEDS seeds, in few settings."""
OTHERS = (
    *WITHOUT_DATA,
    *("l2_growing", "fewer_steps", "freeze", "distill", "lora_ewc", "replay", "joint"),
    *FASTER,
    *CANDIDATES,
)
REFERENCES = ("replay", "joint")
"""What has rows of the old task, which the others do not."""
SEEDS = {"newsgroups": 5, "permutations": 5}
"""Of a setting; FIRST_SEEDS of the others, whose units take longer or which came later."""
FIRST_SEEDS = 3
"""Done of all methods before the other seeds of any."""


class Grid(NamedTuple):
    """What is tried of a method; without strengths the curve is over the rates, and none is sought.

    The search is at the third of four strengths, the second of fewer, or the first of `alphas`.
    """

    rates: tuple[float, ...]
    strengths: tuple[float, ...] = ()
    alphas: tuple[float, ...] = (1.0,)  # shares of the way from the start to what was tuned


RATES = (3e-5, 1e-4, 3e-4)
NEWSGROUPS = {
    "free": Grid((1e-5, 3e-5, 1e-4, 3e-4)),
    "fewer_steps": Grid(RATES, (0.15, 0.3, 0.6)),
    "l2": Grid(RATES, (0.1, 0.3, 1.0, 3.0)),
    "interpolation": Grid(RATES, (1.0,), (0.5, 0.2, 0.35, 0.65, 0.8)),
    "lora": Grid((3e-4, 1e-3, 3e-3, 1e-2)),
    "freeze": Grid(RATES, (0, 2, 4)),
    "distill": Grid(RATES, (1.0, 3.0, 10.0)),
    "replay": Grid(RATES, (0.3, 1.0, 3.0)),
    "joint": Grid((1e-4,)),
    "ewc": Grid(RATES, (1e4, 3e4, 1e5, 3e5), (1.0, 0.75, 0.5)),
    "inputs": Grid(RATES, (1e4, 3e4, 1e5, 4e5), (1.0, 0.75, 0.5)),
    "lora_ewc": Grid((3e-4, 1e-3, 3e-3), (3e4, 1e5, 3e5)),
    "l2_faster": Grid((3e-4,), (0.3, 1.0, 3.0)),
    "ewc_faster": Grid((3e-4,), (3e4, 1e5, 3e5)),
    "interpolation_faster": Grid((3e-4,), (1.0,), (0.5, 0.2, 0.35, 0.65, 0.8)),
    "ewc_floor": Grid(RATES, (3e4, 1e5, 3e5)),
    "ewc_tempered": Grid(RATES, (1e4, 3e4, 1e5)),  # whose trace is about 3.4 times EWC's
}
TEXT_RATES = (1e-4, 3e-4, 1e-3)
EWC_OF_TEXT = Grid(TEXT_RATES, (1e2, 1e3, 1e4))
LANGUAGE_MODEL = {
    "lora": Grid((3e-4, 1e-3, 3e-3)),
    "interpolation": Grid(TEXT_RATES, (1.0,), (0.5, 0.2, 0.35, 0.65, 0.8)),
    "free": Grid((1e-4, 3e-4, 1e-3)),
    "l2": Grid(TEXT_RATES, (0.03, 0.1, 0.3)),
    "ewc": EWC_OF_TEXT,
    "inputs": Grid(TEXT_RATES, (1e1, 1e2, 1e3, 1e4)),
    "ewc_generated": EWC_OF_TEXT,
    "ewc_random": EWC_OF_TEXT,
    "replay_generated": Grid((1e-4, 3e-4), (0.1, 0.3)),
    "inputs_generated": EWC_OF_TEXT,
    "ewc_prompted": EWC_OF_TEXT,
    "inputs_prompted": EWC_OF_TEXT,
    "ewc_opened": EWC_OF_TEXT,
    "inputs_opened": EWC_OF_TEXT,
    "ewc_mails": EWC_OF_TEXT,
}
SMALL_TEXT_RATES = (3e-4, 1e-3, 3e-3)
EWC_OF_SMALL_TEXT = Grid(SMALL_TEXT_RATES, (5.0, 30.0, 150.0, 800.0))
SMALL_LANGUAGE_MODEL = {
    "lora": Grid((1e-3, 3e-3, 1e-2, 3e-2)),
    "interpolation": Grid(SMALL_TEXT_RATES, (1.0,), (0.5, 0.2, 0.35, 0.65, 0.8)),
    "free": Grid((1e-4, 3e-4, 1e-3, 3e-3)),
    "l2": Grid(SMALL_TEXT_RATES, (0.01, 0.03, 0.1, 0.3)),
    "replay": Grid(SMALL_TEXT_RATES, (0.1, 0.3, 1.0, 3.0)),
    "joint": Grid(SMALL_TEXT_RATES),
    "replay_generated": Grid(SMALL_TEXT_RATES, (0.1, 0.3, 1.0, 3.0)),
    **dict.fromkeys(
        (
            *("ewc", "inputs", "ewc_generated", "ewc_random", "inputs_generated"),
            *("ewc_many", "inputs_many", "ewc_data_many", "inputs_data_many"),
            *("ewc_random_many", "inputs_random_many"),
            *("ewc_prompted", "ewc_mails", "ewc_floor"),
        ),
        EWC_OF_SMALL_TEXT,
    ),
}
SHARES = (0.2, 0.35, 0.5, 0.65, 0.8)
"""Of the way that is gone at each task of a chain: each is a chain of its own."""
CHAIN_RATES = (1e-4, 3e-4, 1e-3)
TEXT_CHAIN = {
    "free": Grid((3e-5, 1e-4, 3e-4)),
    "l2": Grid(CHAIN_RATES, (0.03, 0.1, 0.3)),
    "interpolation": Grid(CHAIN_RATES, (0.35, 0.5, 0.8)),
    "lora": Grid((3e-4, 1e-3, 3e-3)),
    "ewc": Grid(CHAIN_RATES, (3e3, 1e4, 3e4)),
    "inputs": Grid(CHAIN_RATES, (3e3, 1e4, 3e4)),
}
TAGGING = {
    "free": Grid(CHAIN_RATES),
    "l2": Grid(CHAIN_RATES, (0.1, 0.5, 2.0)),
    "interpolation": Grid(CHAIN_RATES, (1.0,), (0.5, 0.2, 0.35, 0.65, 0.8)),
    "lora": Grid((3e-4, 1e-3, 3e-3)),
    "ewc": Grid(CHAIN_RATES, (1e4, 5e4, 2.5e5), (1.0, 0.75, 0.5)),
    "inputs": Grid(CHAIN_RATES, (1e4, 5e4, 2.5e5), (1.0, 0.75, 0.5)),
    "ewc_floor": Grid(CHAIN_RATES, (1e4, 5e4, 2.5e5)),
    "ewc_tempered": Grid(CHAIN_RATES, (3e3, 1.5e4, 7.5e4)),
}
PICTURE_RATES = (1e-3, 3e-3, 1e-2)
VISION = {
    "free": Grid(PICTURE_RATES),
    "l2": Grid(PICTURE_RATES, (0.003, 0.015, 0.06, 0.2, 0.6)),
    "l2_faster": Grid((1e-2,), (0.003, 0.015, 0.06, 0.2, 0.6)),
    "interpolation": Grid(PICTURE_RATES, (1.0,), (0.5, 0.2, 0.35, 0.65, 0.8)),
    "lora_convolutions": Grid((3e-3, 1e-2, 3e-2)),
    "ewc": Grid(PICTURE_RATES, (3e1, 3e2, 3e3), (1.0, 0.75, 0.5)),
    "inputs": Grid(PICTURE_RATES, (3e1, 3e2, 3e3), (1.0, 0.75, 0.5)),
}
SMALL_RATES = (3e-4, 1e-3, 3e-3)
PERMUTATIONS = {
    "free": Grid((1e-4, 3e-4, 1e-3, 3e-3)),
    "fewer_steps": Grid(SMALL_RATES, (0.05, 0.15, 0.3, 0.6)),
    "l2": Grid(SMALL_RATES, (0.01, 0.03, 0.1, 0.3)),
    "interpolation": Grid(SMALL_RATES, SHARES),
    "lora": Grid((1e-3, 3e-3, 1e-2, 3e-2)),
    "freeze": Grid(SMALL_RATES, (0, 1)),
    "distill": Grid(SMALL_RATES, (0.3, 1.0, 3.0, 10.0)),
    "replay": Grid(SMALL_RATES, (0.1, 0.3, 1.0, 3.0)),
    "joint": Grid(SMALL_RATES),
    "ewc": Grid(SMALL_RATES, (3.0, 10.0, 30.0, 100.0)),
    "l2_growing": Grid(SMALL_RATES, (0.003, 0.01, 0.03, 0.1)),
    "inputs": Grid(SMALL_RATES, (30.0, 100.0, 300.0, 1000.0)),
    "lora_ewc": Grid((1e-3, 3e-3, 1e-2), (3.0, 10.0, 30.0, 100.0)),
}
GRIDS = {
    "newsgroups": NEWSGROUPS,
    "language_model": LANGUAGE_MODEL,
    "small_language_model": SMALL_LANGUAGE_MODEL,
    "text_chain": TEXT_CHAIN,
    "permutations": PERMUTATIONS,
    "tagging": TAGGING,
    "vision": VISION,
}
FISHER_METHODS = ("ewc", "ewc_faster", "lora_ewc", "ewc_floor")
TEXT_METHODS = tuple(name for name in WITHOUT_DATA if name != "replay_generated")
SAME_RATE = {name: name.partition("_")[0] for name in TEXT_METHODS}
"""What has the rate of another method, from which it differs only by the texts of its Fisher."""
BLOCK_METHODS = ("inputs",)
"""What uses the Fisher with the structure `inputs`; FISHER_METHODS use the diagonal alone."""


def seeds(setting: str, method: str = "") -> int:
    """Return how many seeds a method has in a setting; without one, most methods of it."""
    return FIRST_SEEDS if method in CANDIDATES else SEEDS.get(setting, FIRST_SEEDS)


def left_out(setting: str) -> list[str]:
    """List the methods that are tried elsewhere and not in a setting."""
    grids = GRIDS[setting]
    other = {"lora", "lora_convolutions"}  # one is in place of the other
    return [
        name
        for name in MAIN + OTHERS
        if name not in (*grids, *FASTER)
        and not (name in other and other & grids.keys())
        and not (name in WITHOUT_DATA and not grids.keys() & set(WITHOUT_DATA))
    ]
