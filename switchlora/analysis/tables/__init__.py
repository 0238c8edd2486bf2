"""Tables of runs, one row per configuration; unfair comparisons are refused."""
