"""Scorers of hallucination, one file each: answers in, figures out.

Only answers.py and gradients.py import torch, so that saved answers are scored without it.
"""
