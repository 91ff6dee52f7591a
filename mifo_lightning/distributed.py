"""Where module.py, steps and stopping find the collectives of `mifo_callbacks.collectives`, and `full`."""

from mifo_callbacks.collectives import gather_ranks as gather_ranks
from mifo_callbacks.collectives import mean_ranks as mean_ranks
from mifo_callbacks.collectives import rank as rank
from mifo_callbacks.collectives import ranks as ranks
from mifo_callbacks.collectives import sum_ranks as sum_ranks
from mifo_callbacks.sharding import full as full
