"""Report the fate of every clip: the ledger, its summary, tables and plots."""
