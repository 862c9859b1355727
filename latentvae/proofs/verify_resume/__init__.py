"""`latentvae verify-resume`: train straight, then with kills and resumes, and compare all that is
left."""

from latentvae.proofs.verify_resume.verify_resume import verify_resume

__all__ = ["verify_resume"]
