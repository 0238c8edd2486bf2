"""The commands of a registry: publish, promote, rollback, verify, log."""
