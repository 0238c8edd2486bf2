"""Tables of runs: one row a setting, with refusals of unfair comparisons."""
