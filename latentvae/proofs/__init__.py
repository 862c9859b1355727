"""Test a user's training: `preflight` checks its first updates, `verify_resume` its resume."""
