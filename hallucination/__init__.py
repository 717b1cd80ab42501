"""Scorers of hallucination, one file each: answers in, figures out, without torch."""
