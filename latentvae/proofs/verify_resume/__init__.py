"""`latentvae verify-resume`: train with and without kills, and compare the results."""

from latentvae.proofs.verify_resume.verify_resume import verify_resume

__all__ = ["verify_resume"]
