"""Where a run's numbers and pictures go: one interface, a file per place."""
