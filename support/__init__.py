"""What the five scripts share; drr.py needs nothing of it."""
