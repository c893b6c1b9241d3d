"""Maps decided by content: what is scored, who competes, how many win."""

from sadsl.selections.anchor import stripes as stripes
from sadsl.selections.boundaries import teacher_boundaries as teacher_boundaries
from sadsl.selections.budgets import mass as mass
from sadsl.selections.budgets import share as share
from sadsl.selections.budgets import threshold as threshold
from sadsl.selections.budgets import tokens as tokens
from sadsl.selections.budgets import topk as topk
from sadsl.selections.cells import rules as rules
from sadsl.selections.chunks import chunk_budget as chunk_budget
from sadsl.selections.content import Content as Content
from sadsl.selections.content import Selection as Selection
from sadsl.selections.estimate import vertical_slash as vertical_slash
from sadsl.selections.estimate import vertical_slash_mass as vertical_slash_mass
from sadsl.selections.eviction import kept_keys as kept_keys
from sadsl.selections.factorised import factorised_topk as factorised_topk
from sadsl.selections.hashing import lsh as lsh
from sadsl.selections.hashing import sorted_chunks as sorted_chunks
from sadsl.selections.key_ranks import key_positive as key_positive
from sadsl.selections.key_ranks import key_topw as key_topw
from sadsl.selections.kmeans import kmeans as kmeans
from sadsl.selections.modality import modalities as modalities
from sadsl.selections.partitions import tiles as tiles
from sadsl.selections.partitions import within as within
from sadsl.selections.pruning import descent as descent
from sadsl.selections.scores import scored as scored
