"""Selections: maps whose pairs depend on the queries and keys of a call."""

from sadsl.selections.base import Content as Content
from sadsl.selections.base import Selection as Selection
from sadsl.selections.budgets import mass as mass
from sadsl.selections.budgets import share as share
from sadsl.selections.budgets import threshold as threshold
from sadsl.selections.budgets import tokens as tokens
from sadsl.selections.budgets import topk as topk
from sadsl.selections.cell_scores import scored as scored
from sadsl.selections.cells import rules as rules
from sadsl.selections.chunk_budget import chunk_budget as chunk_budget
from sadsl.selections.descent import descent as descent
from sadsl.selections.factorised_topk import factorised_topk as factorised_topk
from sadsl.selections.kept_keys import kept_keys as kept_keys
from sadsl.selections.key_topw import key_positive as key_positive
from sadsl.selections.key_topw import key_topw as key_topw
from sadsl.selections.kmeans import kmeans as kmeans
from sadsl.selections.lsh import lsh as lsh
from sadsl.selections.lsh import sorted_chunks as sorted_chunks
from sadsl.selections.modalities import modalities as modalities
from sadsl.selections.stripes import stripes as stripes
from sadsl.selections.teacher_boundaries import teacher_boundaries as teacher_boundaries
from sadsl.selections.tiles import tiles as tiles
from sadsl.selections.tiles import within as within
from sadsl.selections.vertical_slash import vertical_slash as vertical_slash
from sadsl.selections.vertical_slash import vertical_slash_mass as vertical_slash_mass
