"""How networks are computed faster or in less memory, never what. Nothing below imports it."""
