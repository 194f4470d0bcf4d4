"""What may be wrong with preference data: `python -m rm.audit`."""
