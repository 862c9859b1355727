"""Test a user's training: `preflight` checks its first updates, and `verify_resume` its resume."""
