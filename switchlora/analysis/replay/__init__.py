"""Replay: ask other criteria on the history of a run when they would have switched."""
