"""The one loop: optimiser, schedule, runtime, distributed start-up, checkpoints, evaluation, training."""
