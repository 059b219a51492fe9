"""Tensor and expert parallel: rank 0 in the caller's process, one worker process for each further GPU.

Rank 0 (:class:`.runner.ParallelRunner`) tells every worker of each step, then runs the step itself; the workers
(:mod:`.worker`) run the same step on their shards of the weights and of the KV cache, and the ranks meet in the
collectives of the layers. :mod:`.watch` ends the whole group when one rank dies or gets stuck.
"""
