"""Comparisons: tables of variants, run over several seeds, and the reports about them."""
