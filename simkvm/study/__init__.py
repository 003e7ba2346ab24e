"""Many runs: sweeps, workers, the store of results, statistics."""
