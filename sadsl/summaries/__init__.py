"""Summaries of regions: Combiner's abstractions as terms of a spec."""

from sadsl.summaries.clustered import clusters as clusters
from sadsl.summaries.custom import regions as regions
from sadsl.summaries.partitions import columns as columns
from sadsl.summaries.partitions import rowmajor as rowmajor
from sadsl.summaries.partitions import rows as rows
from sadsl.summaries.partitions import spans as spans
from sadsl.summaries.partitions import tower as tower
from sadsl.summaries.term import Summaries as Summaries
from sadsl.summaries.term import summaries as summaries
