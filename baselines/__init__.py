"""The systems that the paper compares COPO with, each on the same model and the same images."""
