"""What would have switched when: criteria asked again over a finished run."""
