"""Sweeps: values of settings that are drawn, tried by trainings, and compared by one number."""
