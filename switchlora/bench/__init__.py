"""What is timed anew: updates, the switch, low-rank layers, whole systems."""
