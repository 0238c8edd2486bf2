"""The report page of a sweep: one self-contained HTML file."""
