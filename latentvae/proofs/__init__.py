"""Test a training: its first updates (`preflight`) and its resume after kills (`verify_resume`)."""
