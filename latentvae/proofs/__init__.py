"""Test a user's run: `preflight` checks its first updates, `verify_resume` checks its resume."""
