"""Run networks faster or in less memory."""
