"""`latentvae verify-resume`: train straight, then with kills and resumes, and compare all that is
left."""

from latentvae.proofs.verify_resume.command import verify_resume

__all__ = ["verify_resume"]
