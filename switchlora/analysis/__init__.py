"""Reports on finished runs: pictures, tables, the page, the replay of a run's history."""
