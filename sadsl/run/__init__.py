"""Runs a checked call on arrays; each kind of term has a file.

Importing this package registers the rule of every kind of term with ``attend``.
"""

from sadsl.run import channel as channel
from sadsl.run import compressed as compressed
from sadsl.run import delta as delta
from sadsl.run import heads as heads
from sadsl.run import latent as latent
from sadsl.run import linear as linear
from sadsl.run import linear_features as linear_features
from sadsl.run import local_linear as local_linear
from sadsl.run import mixtures as mixtures
from sadsl.run import over as over
from sadsl.run import scatter_mean as scatter_mean
from sadsl.run import softmax as softmax
from sadsl.run import summaries as summaries
