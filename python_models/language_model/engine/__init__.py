"""The engine: scheduler, KV blocks, runner, sampler and the loop that joins them. No Triton, no families."""
