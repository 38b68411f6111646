# The public names, once: type checkers and editors read them here, and so does __init__.py.
from consolidate.api import evaluate as evaluate
from consolidate.api import finetune as finetune
from consolidate.api import fisher as fisher
from consolidate.api import merge as merge
from consolidate.api import push as push
from consolidate.api import remap as remap
from consolidate.api import report as report
from consolidate.api import run as run
from consolidate.api import show as show
from consolidate.api import verify as verify
from consolidate.chain.module_fisher import store_fisher as store_fisher
from consolidate.chain.module_penalty import load_penalty as load_penalty
from consolidate.estimation.estimates import FisherDiagonal as FisherDiagonal
from consolidate.estimation.fisher_diagonal import fisher_diagonal as fisher_diagonal
from consolidate.ewc.block_penalty import BlockPenalty as BlockPenalty
from consolidate.ewc.fisher_merging import merge_online as merge_online
from consolidate.ewc.fisher_merging import merge_separate as merge_separate
from consolidate.ewc.overlap import fisher_overlap as fisher_overlap
from consolidate.ewc.penalty import Penalty as Penalty
from consolidate.options import Columns as Columns
from consolidate.training.trainer_callback import penalty_callback as penalty_callback
from formats.errors import BusyError as BusyError
from formats.errors import ConsolidateError as ConsolidateError
from formats.errors import ForgettingError as ForgettingError
from formats.errors import InputError as InputError
from formats.errors import NetworkError as NetworkError
from formats.errors import NonFiniteError as NonFiniteError
from formats.errors import UsageError as UsageError
from formats.fisher_folder import read_fisher as read_fisher

__all__: list[str]
